"""Learning rates to try: fixed in advance, public, the same number for every arm.

A grid is `trials` points, evenly spaced in the logarithm over the range that the method (or its recipe)
declares, and never dependent on the task. Where the best lies on the edge, an extension allowance adds points
on that side, the same allowance for all (Biderman et al., 2024, arXiv:2405.09673: the rate decides more than
the method).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from veneer.comparing.planning.arms import Arm
from veneer.errors import BadOption

FACTOR = 10**0.5
"""Between neighbouring rates, where a method declares no range."""

CENTRES: dict[str, float] = {
    "full": 3e-5,
    "linear_probe": 3e-3,
    "selective": 1e-3,
    "additive": 1e-3,
    "additive/prompt": 1e-2,
    "additive/representation": 1e-3,
    "reparameterized": 1e-3,
    "reparameterized/low-rank": 5e-4,
    "hybrid": 1e-3,
    "mixture": 1e-3,
    "side": 1e-3,
    "": 1e-3,
}
"""Centre of the grid by method, else by the longest prefix of its family. The empty key is for all others."""


def centre(method: str, family: str = "") -> float:
    """The centre of a method's grid: by its own name, else by the longest matching prefix of its family."""
    if method in CENTRES:
        return CENTRES[method]
    parts = family.split("/")
    prefixes = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((CENTRES[prefix] for prefix in prefixes if prefix in CENTRES), CENTRES[""])


def grid(middle: float, trials: int, factor: float = FACTOR) -> tuple[float, ...]:
    """`trials` rates around `middle`, rising, rounded to three digits so that they read and hash alike."""
    start = -(trials - 1) / 2
    return tuple(round_rate(middle * factor ** (start + step)) for step in range(trials))


def round_rate(rate: float) -> float:
    return float(f"{rate:.3g}")


def spaced(low: float, high: float, trials: int) -> tuple[float, ...]:
    """`trials` rates from `low` to `high`; a single one is in their middle."""
    if trials == 1:
        return (round_rate((low * high) ** 0.5),)
    ratio = high / low
    return tuple(round_rate(low * ratio ** (step / (trials - 1))) for step in range(trials))


def grids(
    arms: Sequence[Arm],
    trials: int,
    given: Mapping[str, Sequence[float]] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    families: Mapping[str, str] | None = None,
) -> dict[str, tuple[float, ...]]:
    """The rates of every arm that has trials: `{str(arm): rising rates}`.

    `given` are rates by arm text or by method name; each list must hold `trials` different positive rates,
    because an arm with more trials would have more chances. `ranges` are what methods and recipes declare
    (`"+name"` for a recipe, which goes before); `families` are of methods, for those without a range.
    """
    given, ranges, families = given or {}, ranges or {}, families or {}
    found: dict[str, tuple[float, ...]] = {}
    for arm in arms:
        if not arm.is_trained or arm.takes_rate_of_anchor:
            continue
        method = arm.anchor.method
        rates = given.get(str(arm), given.get(arm.method, given.get(method)))
        names = [f"+{recipe.name}" for recipe in arm.recipes] + [method]
        span = next((ranges[name] for name in names if name in ranges), None)
        if rates is not None:
            found[str(arm)] = _checked(arm, rates, trials)
        elif span is not None:
            found[str(arm)] = spaced(*span, trials)
        else:
            found[str(arm)] = grid(centre(method, families.get(method, "")), trials)
    return found


def _checked(arm: Arm, given: Sequence[float], trials: int) -> tuple[float, ...]:
    rates = tuple(sorted({float(rate) for rate in given}))
    if len(rates) != trials or rates[0] <= 0:
        raise BadOption(
            f"rates for '{arm}' are {list(given)}: expected {trials} different positive numbers, "
            "as many as every other arm has.",
            next_step=f"give {trials} rates, or leave '{arm.method}' out of rates= for the public grid",
        )
    return rates


def extension(rates: Sequence[float], best: float, side_left: Mapping[str, int]) -> float | None:
    """The next rate to try where the best lies on an edge, or None; `side_left` is the allowance by side.

    It is as far from the edge as the edge is from its neighbour.
    """
    rising = sorted(set(rates))
    if best == rising[0] and side_left["low"] > 0:
        return round_rate(rising[0] ** 2 / rising[1] if len(rising) > 1 else rising[0] / FACTOR)
    if best == rising[-1] and side_left["high"] > 0:
        return round_rate(rising[-1] ** 2 / rising[-2] if len(rising) > 1 else rising[-1] * FACTOR)
    return None
