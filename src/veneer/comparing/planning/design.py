"""The design: everything that is fixed before the first run, and what it will be able to find.

A `Comparison` is data. Its canonical JSON is hashed, and the hash stands in every result, so that a result
can always be traced to the question that was asked before it was known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.comparing.planning.arms import Arm, parse_arm
from veneer.comparing.planning.budget import parse_budget
from veneer.errors import BadOption, UnknownName, nearest


@dataclass(frozen=True)
class Comparison:
    """The question, before any run.

    arms: normal forms, controls included. rates: learning rates by arm. extension: further rates allowed on
    each side where the best lies on the edge. contrasts: pairs "first - second" that were planned; none means
    every arm against the best. smallest_effect: the smallest difference of the metric that would matter.
    options: of every training. reading: how the data were read. claim: a published claim, and its rule.
    beyond: groups of test items and further sets, each with its digest (`further`).
    near_duplicates: how many rows were left out as such.
    halving: learning-rate trials by successive halving (`halving`), the same rungs for every arm.
    match_parameters: how near the trained parameters are to the anchor's, and matched what became of each arm.
    """

    model: str
    data: str
    arms: tuple[str, ...]
    rates: Mapping[str, tuple[float, ...]]
    task: str | None = None
    metric: str = "accuracy"
    higher_is_better: bool = True
    budget: str = "published"
    seeds: tuple[Any, ...] = (1, 2, 3, 4, 5, 6)
    tuning_seeds: tuple[int, ...] = (0,)
    extension: int = 0
    contrasts: tuple[tuple[str, str], ...] = ()
    correction: str = "holm"
    smallest_effect: float = 0.01
    data_sha256: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    reading: Mapping[str, Any] = field(default_factory=dict)
    claim: Mapping[str, Any] = field(default_factory=dict)
    beyond: Mapping[str, Any] = field(default_factory=dict)
    near_duplicates: Mapping[str, Any] = field(default_factory=dict)
    match_parameters: str = ""
    matched: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    halving: bool = False

    def __post_init__(self) -> None:
        if self.correction not in ("holm", "fdr_bh"):
            raise BadOption(
                f"correction is '{self.correction}': expected 'holm' (planned) or 'fdr_bh' (screens).",
                next_step="leave it out for 'holm'",
            )
        enough = 2 if self.tuning_seeds else 1  # results made elsewhere may have one seed, and are marked so
        if len(self.seeds) < enough or len(set(self.seeds)) != len(self.seeds):
            raise BadOption(
                f"seeds are {list(self.seeds)}: expected at least 2 different ones.",
                next_step="seeds=6 is the least for which a sign-flip test can decide one contrast",
            )
        again = sorted(set(self.seeds) & set(self.tuning_seeds))
        if again:
            raise BadOption(
                f"seeds {again} are used for tuning and for confirmation: the rate would fit its own noise.",
                next_step="confirm on new seeds, as the default does (tuning 0, confirmation 1, 2, ...)",
            )
        for pair in self.contrasts:
            for name in pair:
                if name not in self.arms:
                    raise UnknownName(
                        f"the contrast {' - '.join(pair)} names the arm '{name}', which is not compared.",
                        nearest=nearest(name, self.arms),
                        next_step="add it to methods, or leave the contrast out",
                    )

    @property
    def parsed_arms(self) -> tuple[Arm, ...]:
        return tuple(parse_arm(text) for text in self.arms)

    @property
    def is_demo(self) -> bool:
        return parse_budget(self.budget).kind == "demo"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as hashed and as written to design.json."""
        return {
            "model": self.model,
            "data": self.data,
            "data_sha256": self.data_sha256,
            "sizes": dict(self.sizes),
            "task": self.task,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "arms": list(self.arms),
            "rates": {arm: list(rates) for arm, rates in self.rates.items()},
            "extension": self.extension,
            "budget": self.budget,
            "seeds": list(self.seeds),
            "tuning_seeds": list(self.tuning_seeds),
            "contrasts": [list(pair) for pair in self.contrasts],
            "correction": self.correction,
            "smallest_effect": self.smallest_effect,
            "options": dict(self.options),
            "reading": dict(self.reading),
            "claim": dict(self.claim),
            "beyond": dict(self.beyond),
            "near_duplicates": dict(self.near_duplicates),
            "match_parameters": self.match_parameters,
            "matched": {arm: dict(said) for arm, said in self.matched.items()},
            # Only where it is on: designs that were hashed before there was a choice keep their hash.
            **({"halving": True} if self.halving else {}),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Comparison:
        """From `to_dict`'s form, or a comparison file. Unknown keys are an error."""
        valid = cls.__dataclass_fields__
        for key in plain:
            if key not in valid:
                raise BadOption(
                    f"a comparison has no field '{key}'.",
                    nearest=nearest(key, valid),
                    next_step="the fields are " + ", ".join(valid),
                )
        read = dict(plain)
        for key in ("arms", "seeds", "tuning_seeds"):
            if key in read:
                read[key] = tuple(read[key])
        if "rates" in read:
            read["rates"] = {arm: tuple(rates) for arm, rates in read["rates"].items()}
        if "contrasts" in read:
            read["contrasts"] = tuple((first, second) for first, second in read["contrasts"])
        return cls(**read)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()


def canonical_json(value: Any, default: Callable[[Any], str] = str) -> str:
    """One text for one value: sorted keys, no spaces, no NaN; what JSON lacks is written as its text."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=default
    )


def same_question(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The fields in which two designs differ, and whether `new` only adds arms or seeds to `old`."""
    # Through JSON, because one of them was read from a file.
    left, right = json.loads(canonical_json(old)), json.loads(canonical_json(new))
    differing = [key for key in sorted({*left, *right}) if left.get(key) != right.get(key)]
    only_adds = set(differing) <= {"arms", "rates", "seeds"} and all(
        set(left[key]) <= set(right[key]) for key in ("arms", "seeds")
    )
    only_adds = only_adds and all(right["rates"].get(arm) == rates for arm, rates in left["rates"].items())
    return differing, only_adds


def choose_seeds(count: int | Sequence[int], first: int = 1) -> tuple[int, ...]:
    """6 -> (1, 2, 3, 4, 5, 6): the same list for every arm; a list is taken as it is."""
    if isinstance(count, int):
        return tuple(range(first, first + count))
    return tuple(int(seed) for seed in count)
