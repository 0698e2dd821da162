"""Published claims, decided by a rule that was fixed before the runs: "agrees", "contradicts" or "cannot tell".

The `[claim]` table of a comparison file names the claim and its rule; it is hashed with the design. A comparison of
another size on another base never reproduces a published number: it can agree with its direction, or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from veneer.comparing.inference.cells import Cell, read_cell
from veneer.comparing.inference.equivalence import equivalence, orders, slope_of_deviation, variance_share
from veneer.comparing.inference.statistics import adjust
from veneer.comparing.planning.arms import parse_arm
from veneer.errors import BadData, BadOption, UnknownName, UnknownOption, VeneerError, nearest

AGREES, CONTRADICTS, CANNOT_TELL = "agrees", "contradicts", "cannot tell"
LEVEL = 0.05
NO_ARMS = ("untrained", "linear_probe", "random_direction", "duplicate", "broken_scale")


@dataclass(frozen=True)
class Verdict:
    """What a comparison says of a claim, and why."""

    id: str
    says: str
    source: str
    rule: str
    verdict: str
    because: str
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        return f"{self.id}: {self.says}{where}\n{self.verdict}: {self.because}"


Found = tuple[str, str, dict[str, Any]]
Rule = Callable[[Mapping[str, Any], Sequence[Cell]], Found]


def decide(folder: str | Path | Cell) -> Verdict:
    """The verdict on the claim of the comparison in `folder`.

    A claim `with = ["other"]` needs the comparisons in the folders of these names beside it; without them it
    cannot tell. Errors: BadOption where the comparison has no claim, or one that is no claim.
    """
    cell = folder if isinstance(folder, Cell) else read_cell(folder)
    claim = dict(cell.summary["comparison"].get("claim") or {})
    if "rule" not in claim:
        raise BadOption(
            f"the comparison in {cell.folder} has no claim with a rule.",
            next_step='[claim] with id, says, source and rule = "equivalent" in its file',
        )
    check_claim(claim)
    try:
        cells = [cell, *(read_cell(cell.folder.parent / name) for name in claim.get("with", ()))]
        verdict, because, numbers = RULES[claim["rule"]].decide(claim, cells)
    except VeneerError as error:
        verdict, because, numbers = CANNOT_TELL, str(error).split("\n")[0], {}
    identity, says, source, rule = (str(claim.get(key, "")) for key in ("id", "says", "source", "rule"))
    return Verdict(identity, says, source, rule, verdict, because, numbers)


def check_claim(claim: Mapping[str, Any], arms: Sequence[str] | None = None) -> None:
    """Before anything runs: the rule is known and has what it needs, and its arms are among `arms`.

    Errors: UnknownName, UnknownOption, BadOption.
    """
    rule = str(claim.get("rule", ""))
    if rule not in RULES:
        raise UnknownName(
            f"no rule of a claim is called '{rule}'.",
            nearest=nearest(rule, RULES) or list(RULES),
            next_step="; ".join(f"{name}: {one.meaning}" for name, one in RULES.items()),
        )
    known = ("id", "says", "source", "rule", "with", *RULES[rule].fields)
    for key in claim:
        if key not in known:
            raise UnknownOption(
                f"a claim by the rule '{rule}' has no field '{key}'.",
                nearest=nearest(key, known),
                next_step="its fields are " + ", ".join(known),
            )
    missing = [key for key in RULES[rule].needs if key not in claim]
    if missing:
        raise BadOption(f"a claim by the rule '{rule}' needs '{missing[0]}'.", next_step=RULES[rule].meaning)
    named = [claim[key] for key in ("anchor", "first", "second") if key in claim]
    if arms is not None:
        for name in (*claim.get("arms", ()), *named):
            _found(str(name), arms, "the comparison does not have")


# -- the rules -------------------------------------------------------------------------------------


def _equivalent(claim: Mapping[str, Any], cells: Sequence[Cell]) -> Found:
    """Agrees where all arms are within the margin of the anchor, contradicts where one is surely beyond it."""
    scores, anchor, margin = (
        cells[0].scores,
        _arm(cells[0], claim.get("anchor", "lora")),
        float(claim["margin"]),
    )
    arms = [arm for arm in _arms(claim, cells[0]) if arm != anchor]
    gaps = {arm: scores.difference(arm, anchor, flips=False) for arm in arms}
    tests = {arm: equivalence(gap, margin) for arm, gap in gaps.items()}
    beyond = dict(zip(arms, adjust([tests[arm].p_beyond for arm in arms]).tolist(), strict=True))
    numbers = {
        arm: {"difference": gaps[arm].estimate, "low": gaps[arm].low, "high": gaps[arm].high,
              "p_equal": tests[arm].p_equal, "p_beyond": beyond[arm]}
        for arm in arms
    }  # fmt: skip
    equal = [arm for arm in arms if tests[arm].p_equal <= LEVEL]
    far = [arm for arm in arms if beyond[arm] <= LEVEL]
    if far:
        return CONTRADICTS, f"{', '.join(far)} differ from {anchor} by more than {margin:g}", numbers
    if len(equal) == len(arms):
        return (
            AGREES,
            f"all {len(arms)} arms are within {margin:g} of {anchor}, by two one-sided tests",
            numbers,
        )
    open_arms = [arm for arm in arms if arm not in equal]
    because = f"{len(equal)} of {len(arms)} arms are within {margin:g} of {anchor}"
    return CANNOT_TELL, f"{because}; of {', '.join(open_arms)} it is open", numbers


def _signs(claim: Mapping[str, Any], cells: Sequence[Cell]) -> Found:
    """Agrees where every difference has its sign and an interval without zero; contradicts where one has the other."""
    signs = [1 if sign == "+" else -1 for sign in claim["signs"]]
    if len(signs) != len(cells):
        raise BadData(f"{len(cells)} comparisons have {len(signs)} signs.", next_step="one sign a comparison")
    for cell in cells:
        first, second = (_arm(cell, claim[key]) for key in ("first", "second"))
    gaps = [cell.scores.difference(first, second, flips=False) for cell in cells]
    corrected = adjust([gap.p_value for gap in gaps])
    numbers = {
        cell.name: {"difference": gap.estimate, "low": gap.low, "high": gap.high, "p": gap.p_value}
        for cell, gap in zip(cells, gaps, strict=True)
    }
    wrong = [
        cell.name
        for cell, gap, sign, p in zip(cells, gaps, signs, corrected, strict=True)
        if sign * gap.estimate < 0 and p <= LEVEL
    ]
    if wrong:
        return CONTRADICTS, f"{first} - {second} has the other sign in {', '.join(wrong)}", numbers
    if all(sign * gap.estimate > 0 and gap.p_value <= LEVEL for gap, sign in zip(gaps, signs, strict=True)):
        return AGREES, f"{first} - {second} has the published sign in all {len(cells)} comparisons", numbers
    return CANNOT_TELL, f"an interval of {first} - {second} holds zero", numbers


def _reordered(claim: Mapping[str, Any], cells: Sequence[Cell]) -> Found:
    """Agrees where a pair is surely the other way round; contradicts where the orders are surely alike."""
    if len(cells) != 2:
        raise BadData(
            f"an order is compared with one other, not {len(cells) - 1}.", next_step='with = ["other"]'
        )
    wanted = _arms(claim, cells[0])
    kept = [_only(cell, wanted) for cell in cells]
    found = orders(*kept)
    above = float(claim.get("alike_above", 0.6))
    numbers = {"tau": found.tau, "low": found.low, "high": found.high,
               "reversed": [list(pair) for pair in found.reversed_pairs]}  # fmt: skip
    said = f"Kendall's tau is {found.tau:.2f} ({found.low:.2f} to {found.high:.2f})"
    if found.reversed_pairs:
        pairs = "; ".join(f"{one} and {two}" for one, two in found.reversed_pairs)
        return AGREES, f"{said}, and these are surely the other way round: {pairs}", numbers
    if found.low > above:
        return CONTRADICTS, f"{said}, surely above {above:g}", numbers
    return CANNOT_TELL, f"{said}, and no pair is surely the other way round", numbers


def _variance(claim: Mapping[str, Any], cells: Sequence[Cell]) -> Found:
    """Agrees where arm and learning rate surely explain more than the share; contradicts where surely less."""
    arms = _arms(claim, cells[0])
    values = trial_table(cells[0], arms)
    found = variance_share(values, ("arm", "learning_rate"))
    least = float(claim.get("share", 0.5))
    numbers = {"share": found.share, "low": found.low, "high": found.high, **found.of}
    said = (
        f"the arm and the learning rate explain {100 * found.share:.0f} % of the variance of a run "
        f"({100 * found.low:.0f} to {100 * found.high:.0f} %)"
    )
    verdict = AGREES if found.low > least else CONTRADICTS if found.high < least else CANNOT_TELL
    return verdict, f"{said}; {100 * least:.0f} % was the bound", numbers


def _slope(claim: Mapping[str, Any], cells: Sequence[Cell]) -> Found:
    """Agrees where the deviation over seeds surely grows with trained parameters; contradicts where it falls."""
    cell = cells[0]
    arms = [arm for arm in _arms(claim, cell) if cell.parameters(arm)]
    seeds = min(len(cell.scores.seeds[arm]) for arm in arms) if arms else 0
    if len(arms) < 4 or seeds < 3:
        raise BadData(
            f"{len(arms)} arms of known size with {seeds} seeds: expected at least 4 and 3.",
            next_step="compare more sizes and seeds",
        )
    deviations = np.array([cell.scores.of[arm].mean(1).std(ddof=1) for arm in arms])
    found = slope_of_deviation(
        deviations, np.array([cell.parameters(arm) for arm in arms], dtype=float), seeds
    )
    numbers = {**asdict(found), "deviations": dict(zip(arms, deviations.tolist(), strict=True))}
    said = (
        f"with ten times the parameters the deviation over seeds is {10**found.slope:.2f} times as large "
        f"({10**found.low:.2f} to {10**found.high:.2f}), over {found.arms} arms"
    )
    return (AGREES if found.low > 0 else CONTRADICTS if found.high < 0 else CANNOT_TELL), said, numbers


def trial_table(cell: Cell, arms: Sequence[str]) -> np.ndarray:
    """(arm, learning rate, seed) validation values, of the rates and seeds that all have. A run that diverged counts
    with the worst value of all.
    """
    rising = bool(cell.summary["comparison"].get("higher_is_better", True))
    sign = 1.0 if rising else -1.0
    known: dict[tuple[str, float, Any], float | None] = {}
    for trial in cell.trials():
        value = trial.get("validation") if trial["status"] == "ok" else None
        known[trial["arm"], trial["learning_rate"], trial["seed"]] = None if value is None else sign * value
    rates = [sorted({r for a, r, _ in known if a == arm}) for arm in arms]
    seeds = sorted({s for _, _, s in known}, key=str)
    measured = [value for value in known.values() if value is not None]
    same = [rate for rate in (rates[0] if rates else []) if all(rate in of for of in rates)]
    complete = all((arm, rate, seed) in known for arm in arms for rate in same for seed in seeds)
    if len(arms) < 2 or len(same) < 2 or len(seeds) < 2 or not complete or not measured:
        raise BadData(
            f"{len(arms)} arms share {len(same)} learning rates over {len(seeds)} tuning seeds: expected at least 2 "
            "of each, and every one tried.",
            next_step="rates = {arm = [...]} alike for all, extend_rates = 0, tuning_seeds = [0, 1, 2]",
        )
    worst = min(measured)
    table = [[[known[arm, rate, seed] for seed in seeds] for rate in same] for arm in arms]
    return np.array([[[worst if v is None else v for v in row] for row in of] for of in table])


def _arms(claim: Mapping[str, Any], cell: Cell) -> list[str]:
    """The arms that the claim names; without names all that train, controls and full fine-tuning apart."""
    named = [_arm(cell, arm) for arm in claim.get("arms", ())]
    return named or [arm for arm in cell.scores.of if arm.split(":")[0] not in (*NO_ARMS, "full")]


def _arm(cell: Cell, name: Any) -> str:
    return _found(str(name), list(cell.scores.of), f"{cell.name} has not measured")


def _found(name: str, arms: Sequence[str], which: str) -> str:
    """The arm of this name, however its options are ordered."""
    normal = name if name in arms else str(parse_arm(name))
    if normal not in arms:
        raise UnknownName(
            f"the claim names '{name}', which {which}.",
            nearest=nearest(normal, arms) or list(arms)[:5],
            next_step="name arms as the table does",
        )
    return normal


def _only(cell: Cell, arms: Sequence[str]) -> Any:
    from dataclasses import replace

    return replace(cell.scores, of={arm: of for arm, of in cell.scores.of.items() if arm in arms})


@dataclass(frozen=True)
class RuleOf:
    """A rule: how it decides, what it means, the fields of the claim that it reads, and those that it needs."""

    decide: Rule
    meaning: str
    fields: tuple[str, ...]
    needs: tuple[str, ...] = ()


RULES: dict[str, RuleOf] = {
    "equivalent": RuleOf(_equivalent, "all arms within margin of anchor", ("arms", "anchor", "margin"), ("margin",)),
    "signs": RuleOf(_signs, "first is better (+) or worse (-) than second, a sign for each comparison",
                    ("first", "second", "signs"), ("first", "second", "signs")),
    "reordered": RuleOf(_reordered, "the arms are in another order than in the comparison that 'with' names",
                        ("arms", "alike_above"), ("with",)),
    "variance": RuleOf(_variance, "arm and learning rate explain more than share of the variance", ("arms", "share")),
    "slope": RuleOf(_slope, "the deviation over seeds grows with trained parameters", ("arms",)),
}  # fmt: skip
