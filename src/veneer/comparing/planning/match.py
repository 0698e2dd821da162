"""Equal trained parameters: each arm's size is chosen so that it trains as many as the anchor, the head apart.

A method marks the option that sets its size (`size=True`). The option is searched by plans alone, on the base that
is compared, so nothing is trained or allocated. An arm that cannot come near enough stays at its nearest point, and
says so; an arm whose size was typed, or whose method has none, stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.comparing.planning.arms import ANCHOR, Arm
from veneer.errors import BadOption, VeneerError

FIXED = ("untrained", "linear_probe", "full")
MOST, HALVINGS = 4096, 24


@dataclass(frozen=True)
class Match:
    """What became of one arm. parameters: trained ones without the head; None where it cannot be on this base."""

    arm: str
    parameters: int | None
    target: int
    within: bool
    said: str

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "arm"}


def parse_tolerance(text: str | float) -> float:
    """`"2%"` or 0.02 -> 0.02."""
    try:
        number = float(str(text).strip().removesuffix("%").strip())
    except ValueError:
        number = -1.0
    share = number / 100 if str(text).strip().endswith("%") else number
    if not 0 <= share < 1:
        raise BadOption(
            f"match_parameters={text!r}: expected a part in per cent, as 2%, or below 1, as 0.02.",
            next_step="--match-parameters 2%",
        )
    return share


def anchor_of(arms: Sequence[Arm]) -> Arm:
    """The LoRA that the others are measured by: the first among the arms, else LoRA at its defaults."""
    return next((arm for arm in arms if arm.method == ANCHOR), Arm(ANCHOR))


def matched(
    arms: Sequence[Arm],
    count: Callable[[Arm], int],
    tolerance: float,
    target: int | None = None,
    fields: Callable[[str], Mapping[str, Any]] | None = None,
) -> dict[Arm, tuple[Arm, Match]]:
    """{arm: (the arm in its chosen size, what is to be said)} of all arms that can have a size.

    count: trained parameters of an arm on the base, the head apart; raises where it cannot be. target: None for
    the anchor's. fields: {option: dataclass field} of a method.
    """
    fields = fields or _fields
    anchor = anchor_of(arms)
    wanted = count(anchor) if target is None else target
    found: dict[Arm, tuple[Arm, Match]] = {}
    for arm in arms:
        if arm.method in FIXED:
            continue
        if target is None and arm == anchor:
            found[arm] = (arm, Match(str(arm), wanted, wanted, True, "the anchor"))
            continue
        knob = next((f for f in fields(arm.method).values() if f.metadata.get("size")), None)
        given = (
            None if knob is None else set(dict(arm.options)) & {knob.name, *knob.metadata.get("alias", ())}
        )
        sized, why = arm, "its method has no option for its size" if knob is None else "its size was typed"
        if knob is not None and not given:
            sized, why = _sized(arm, knob, count, wanted, tolerance)
        found[arm] = (sized, _match(sized, count, wanted, tolerance, why))
    return found


def _match(arm: Arm, count: Callable[[Arm], int], target: int, tolerance: float, why: str) -> Match:
    try:
        number = count(arm)
    except VeneerError as error:
        return Match(str(arm), None, target, False, str(error).split("\n")[0])
    off = number / target - 1 if target else float(number > 0)
    within = abs(off) <= tolerance
    said = f"{number:,} of {target:,} ({100 * off:+.1f} %)" + ("" if within else f": {why}")
    return Match(str(arm), number, target, within, said)


def _sized(
    arm: Arm, knob: Any, count: Callable[[Arm], int], target: int, tolerance: float
) -> tuple[Arm, str]:
    """The arm whose trained parameters are nearest to `target`, by halving the bracket of its option."""
    search = _Search(arm, knob, count)
    value = knob.default or 8
    here, twice = search(value), search(2 * value)
    if here is None or (twice is None and search(value / 2) is None):
        return arm, f"no other {knob.name} fits this base"
    rises = twice > here if twice is not None else (search(value / 2) or here) < here
    factor = 2.0 if (here < target) == rises else 0.5
    while (found := search(value)) is not None and (found < target) == (here < target):
        before, value = value, search.allowed(value * factor)
        if value == before:
            break
    low, high = sorted((value, search.allowed(value / factor)))
    for _ in range(HALVINGS):
        nearest, _value = search.nearest(target)
        if abs(nearest - target) <= tolerance * target / 20:
            break
        middle = search.between(low, high)
        if middle is None:
            break
        low, high = (middle, high) if (search.known[middle] < target) == rises else (low, middle)
    _, value = search.nearest(target)
    text = f"{knob.name}={value:g} is the nearest that this base allows"
    return search.arm_at(value), text


class _Search:
    """Trained parameters as a function of one option; what a method or the base refuses is None."""

    def __init__(self, arm: Arm, knob: Any, count: Callable[[Arm], int]) -> None:
        self.arm, self.knob, self.count = arm, knob, count
        self.is_whole = isinstance(knob.default, int)
        self.known: dict[float, int] = {}
        self.refused: set[float] = set()

    def allowed(self, value: float) -> float:
        limits = self.knob.metadata
        low = limits.get("at_least") or (1 if self.is_whole else 1e-9)
        high = limits.get("at_most") or MOST
        value = min(max(value, low), high)
        return max(1, round(value)) if self.is_whole else float(f"{value:.4g}")

    def arm_at(self, value: float) -> Arm:
        options = {**dict(self.arm.options), self.knob.name: value}
        return dataclasses.replace(self.arm, options=tuple(sorted(options.items())))

    def __call__(self, value: float) -> int | None:
        value = self.allowed(value)
        if value not in self.known and value not in self.refused:
            try:
                self.known[value] = self.count(self.arm_at(value))
            except VeneerError:
                self.refused.add(value)
        return self.known.get(value)

    def between(self, low: float, high: float) -> float | None:
        """A value inside of the bracket that is not refused, the middle before others; None where none is left."""
        if self.is_whole:
            middle = (low + high) // 2
            inside = [middle + step for step in (0, 1, -1, 2, -2, 3, -3, 4, -4) if low < middle + step < high]
        else:
            middle = self.allowed(math.sqrt(low * high))
            inside = [middle] if low < middle < high else []
        return next((value for value in inside if self(value) is not None), None)

    def nearest(self, target: int) -> tuple[int, float]:
        value = min(self.known, key=lambda value: (abs(self.known[value] - target), value))
        return self.known[value], value


def _fields(method: str) -> dict[str, Any]:
    from veneer.edits import lookup

    return {field.name: field for field in dataclasses.fields(lookup(method))}  # type: ignore[arg-type]
