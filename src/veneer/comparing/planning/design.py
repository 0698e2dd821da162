"""The design: everything that is fixed before the first run, and what it will be able to find.

A `Comparison` is data. Its canonical JSON is hashed, and the hash stands in every result, so that a result
can always be traced to the question that was asked before it was known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from veneer.comparing.inference.statistics import Spread, sign_flip_can_decide, smallest_for
from veneer.comparing.planning.arms import Arm, parse_arm
from veneer.comparing.planning.halving import trials_of
from veneer.errors import BadOption, UnknownName, nearest

DEMO = "demonstration budget: a screen, no claims"
BUDGET_KINDS = ("published", "demo", "examples", "tokens", "minutes")


@dataclass(frozen=True)
class Budget:
    """What every arm may use. `minutes` is the equal-time kind; all others are equal trained tokens."""

    kind: str = "published"
    amount: float | None = None

    def __str__(self) -> str:
        return self.kind if self.amount is None else f"{self.kind}={self.amount:.12g}"

    @property
    def label(self) -> str:
        if self.kind == "demo":
            return DEMO
        if self.kind == "minutes":
            return f"equal time: {self.amount:g} minutes of training steps for every run, on the same machine"
        if self.kind == "published":
            return "as published: every arm sees the same examples, in the same order, equally often"
        kind = "real (unpadded) tokens" if self.kind == "tokens" else self.kind
        return f"equal {self.kind}: {self.amount:,.0f} {kind} trained on by every run"


def parse_budget(text: str | Budget) -> Budget:
    """`"demo"`, `"published"`, `"examples=20000"`, `"tokens=1e6"`, `"minutes=5"` -> Budget."""
    if isinstance(text, Budget):
        return text
    kind, equals, amount = text.partition("=")
    kind = kind.strip()
    if kind not in BUDGET_KINDS:
        raise UnknownName(
            f"no budget is called '{kind}'.",
            nearest=nearest(kind, BUDGET_KINDS) or BUDGET_KINDS,
            next_step="--budget examples=20000, tokens=1000000, minutes=5, demo or published",
        )
    needs_amount = kind in ("examples", "tokens", "minutes")
    try:
        number = float(amount) if equals else None
    except ValueError:
        number = -1.0
    if needs_amount != (number is not None) or (number is not None and number <= 0):
        expected = "a positive number after '='" if needs_amount else "no number"
        raise BadOption(
            f"the budget '{text}' cannot be read: '{kind}' takes {expected}.",
            next_step="--budget examples=20000, tokens=1000000, minutes=5, demo or published",
        )
    return Budget(kind, number)


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


# -- what it will be able to find, and what it will cost ----------------------------------------


@dataclass(frozen=True)
class Assumed:
    """Variances that are assumed before anything is known, for a paired difference of two arms.

    seed_deviation: standard deviation over seeds. disagreement: share of items on which two runs differ (the
    variance of an item's difference). persistent: share of it that is the same for all seeds.
    """

    seed_deviation: float = 0.01
    disagreement: float = 0.10
    persistent: float = 0.5


def smallest_findable(
    seeds: int,
    items: int,
    contrasts: int = 1,
    assumed: Assumed | None = None,
    power: float = 0.8,
    level: float = 0.05,
) -> float:
    """The difference that is found with probability `power` at `level`, corrected for `contrasts`.

    By the crossed interval of `statistics`, for the variances that are assumed.
    """
    assumed = assumed or Assumed()
    rest = assumed.disagreement * (1 - assumed.persistent) / (seeds * items)
    expected = Spread(
        0.0,
        assumed.seed_deviation**2 / seeds + rest,
        assumed.disagreement * assumed.persistent / items + rest,
        rest,
        max(1.0, seeds - 1.0),
        max(1.0, items - 1.0),
    )
    return smallest_for(expected, contrasts, power, level)


@dataclass(frozen=True)
class Forecast:
    """What a design costs and what it can find, said before it runs."""

    tuning_runs: int
    confirming_runs: int
    seconds: float | None
    time_from: str
    memory: tuple[int, str] | None
    done: int
    validation_items: int | None
    test_items: int | None
    smallest_findable: float | None
    smallest_effect: float
    contrasts: int
    assumed: Assumed
    sign_flip_decides: bool

    @property
    def runs(self) -> int:
        return self.tuning_runs + self.confirming_runs

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"runs": self.runs}

    def __str__(self) -> str:
        how = f" ({self.time_from})" if self.time_from else ""
        left = " left" if self.done else ""
        time = "" if self.seconds is None else f", about {duration(self.seconds)}{left}"
        done = f", {self.done} of them done" if self.done else ""
        lines = [
            f"{self.runs} runs: {self.tuning_runs} for learning rates, "
            f"{self.confirming_runs} to confirm{done}{time}"
        ]
        if self.seconds is not None and how:
            lines[0] += how
        elif how:
            lines.append(f"time is {self.time_from}")
        if self.memory is not None:
            size, arm = self.memory
            text = f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
            lines.append(f"memory of a step: about {text} at most ({arm})")
        if self.smallest_findable is not None:
            found = self.smallest_findable
            several = "1 contrast" if self.contrasts == 1 else f"{self.contrasts} corrected contrasts"
            points = "none" if found >= 1 else f"{100 * found:.1f} points"
            lines.append(
                f"smallest effect it can find (power 0.8, {several}, {self.test_items} test items): "
                f"{points}, if runs of one arm differ by "
                f"{100 * self.assumed.seed_deviation:g} points and two arms disagree on "
                f"{100 * self.assumed.disagreement:g} % of items"
            )
            if self.smallest_findable > self.smallest_effect:
                lines.append(
                    f"  more than the {100 * self.smallest_effect:g} points that would matter: "
                    "'not separable' will not mean 'equal'"
                )
        if self.validation_items is not None and self.validation_items < 500:
            error = 100 * (0.25 / self.validation_items) ** 0.5
            lines.append(
                f"rates are chosen on {self.validation_items} validation items "
                f"(standard error up to {error:.1f} points)"
            )
        return "\n".join(lines)


def forecast(
    design: Comparison,
    sizes: Mapping[str, int] | None = None,
    seconds: Mapping[str, float] | None = None,
    assumed: Assumed | None = None,
    *,
    time_from: str = "",
    memory: tuple[int, str] | None = None,
    done: Mapping[str, int] | None = None,
) -> Forecast:
    """Runs, time and the smallest effect, from the design and, where known, the sizes of the splits.

    seconds: of one run, by arm. memory: bytes of the largest step, and its arm. done: runs that have ended, by arm.
    """
    sizes, assumed, done = sizes or {}, assumed or Assumed(), done or {}
    trained = sum(arm.is_trained for arm in design.parsed_arms)
    ladders = {arm: trials_of(len(rates), design.halving) for arm, rates in design.rates.items()}
    trials = sum(size for ladder in ladders.values() for size, _ in ladder) * len(design.tuning_seeds)
    shares = {arm: sum(size * share for size, share in ladder) for arm, ladder in ladders.items()}
    runs, left = {}, {}  # by arm: as many as whole ones, and the part of them that has not ended
    for arm in (str(arm) for arm in design.parsed_arms if arm.is_trained):
        runs[arm] = shares.get(arm, 0) * len(design.tuning_seeds) + len(design.seeds)
        count = sum(size for size, _ in ladders.get(arm, ())) * len(design.tuning_seeds) + len(design.seeds)
        left[arm] = max(0.0, 1 - done.get(arm, 0) / count)
    contrasts = len(design.contrasts) or len(design.arms) - 1
    test = sizes.get("test")
    return Forecast(
        tuning_runs=trials,
        confirming_runs=trained * len(design.seeds) + len(design.arms) - trained,
        seconds=sum(count * left[arm] * seconds.get(arm, 0.0) for arm, count in runs.items())
        if seconds
        else None,
        time_from=time_from,
        memory=memory,
        done=sum(done.values()),
        validation_items=sizes.get("validation"),
        test_items=test,
        smallest_findable=smallest_findable(len(design.seeds), test, contrasts, assumed) if test else None,
        smallest_effect=design.smallest_effect,
        contrasts=contrasts,
        assumed=assumed,
        sign_flip_decides=sign_flip_can_decide(len(design.seeds), contrasts),
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def choose_seeds(count: int | Sequence[int], first: int = 1) -> tuple[int, ...]:
    """6 -> (1, 2, 3, 4, 5, 6): the same list for every arm; a list is taken as it is."""
    if isinstance(count, int):
        return tuple(range(first, first + count))
    return tuple(int(seed) for seed in count)
