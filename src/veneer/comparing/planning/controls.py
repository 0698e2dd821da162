"""Controls: arms whose result is known beforehand, so that a comparison that goes wrong shows it.

All are made from the anchor, the LoRA of the comparison:

random_direction   LoRA's update replaced by one of equal norm at every site and of a direction drawn at random. The
                   anchor is trained first, with the same seed and its chosen rate; then its A and B are drawn anew,
                   scaled to the norm that B A had, and kept, while the head trains. What the anchor gains on it is
                   owed to the direction that was learned, not to a change of that size. It takes the anchor's rate:
                   with trials of its own it would choose the smallest change, and be a linear probe.
duplicate          the anchor under another name, with other draws and trials of its own: must not be separable.
broken_scale       the anchor's update times -8 once it is trained, as by a sign and a factor lost on the way: must
                   lose. It takes the anchor's rate too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from veneer.comparing.inference.analysis import Scores
from veneer.comparing.inference.statistics import difference
from veneer.comparing.planning.arms import CONTROLS, OPTIONAL_CONTROLS, Arm, parse_arm
from veneer.comparing.planning.match import anchor_of
from veneer.errors import BadOption, UnknownName, nearest

LEVEL = 0.05

EXPECTED = {
    "untrained": "below the best trained arm",
    "random_direction": "not better than its anchor",
    "duplicate": "not separable from its anchor",
    "broken_scale": "below its anchor",
}


def parse_controls(given: str | Iterable[str] | None) -> tuple[str, ...]:
    """None: random_direction; "none" or nothing: none of these; else random_direction and the listed ones."""
    if given is None:
        return ("random_direction",)
    names = [n.strip() for n in (given.split(",") if isinstance(given, str) else given)]
    if names in ([], ["none"], [""]):
        return ()
    for name in names:
        if name not in OPTIONAL_CONTROLS:
            raise UnknownName(
                f"no control is called '{name}'.",
                nearest=nearest(name, OPTIONAL_CONTROLS) or OPTIONAL_CONTROLS,
                next_step="--controls duplicate,broken_scale; untrained, linear_probe, full and lora are there always",
            )
    return tuple(dict.fromkeys(["random_direction", *names]))


def with_controls(arms: Sequence[Arm], wanted: Sequence[str], anchored: bool = True) -> tuple[Arm, ...]:
    """The arms with the anchor and the controls that are asked for, behind those that are always there."""
    anchor = anchor_of(arms)
    typed = [
        anchor.as_control(arm.method) if arm.method in OPTIONAL_CONTROLS and not arm.options else arm
        for arm in arms
    ]
    more = [anchor.as_control(name) for name in wanted]
    if anchored:
        more = [anchor, *more]
    head = [arm for arm in typed if arm.method in CONTROLS]
    rest = [arm for arm in typed if arm.method not in CONTROLS]
    found = tuple(dict.fromkeys([*head, *(arm for arm in more if arm not in rest), *rest]))
    for arm in found:
        if arm.method in OPTIONAL_CONTROLS and arm.anchor not in found:
            raise BadOption(
                f"the control '{arm}' needs the arm '{arm.anchor}' beside it.",
                next_step=f"add {arm.anchor} to the methods, or leave out the control's options",
            )
    return found


def judged(scores: Scores, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each control among the arms: what was expected of it, and whether it behaved.

    scores: higher is better. names: the arms, best first. behaved is None where it cannot be said. A duplicate is
    separable by chance in one comparison of twenty.
    """
    arms = {name: parse_arm(name) for name in names}
    best = next((n for n, a in arms.items() if a.method not in (*OPTIONAL_CONTROLS, "untrained")), "")
    found = []
    for control, expected in EXPECTED.items():
        for name, arm in arms.items():
            if arm.method != control:
                continue
            other = best if control == "untrained" else str(arm.anchor)
            line: dict[str, Any] = {"arm": name, "control": control, "expected": expected, "against": other}
            if other in scores.of:
                line |= _verdict(control, name, other, scores)
            else:
                line |= {"behaved": None, "said": f"{other or 'every trained arm'} was not measured"}
            found.append(line)
    return found


def _verdict(control: str, name: str, other: str, scores: Scores) -> dict[str, Any]:
    gap = difference(scores.of[other], scores.of[name], scores.same_seeds(other, name), flips=False)
    is_below, is_above = gap.p_greater <= LEVEL, 1 - gap.p_greater <= LEVEL
    is_separable = gap.p_value <= LEVEL
    behaved = {
        "untrained": is_below,
        "random_direction": not is_above,
        "duplicate": not is_separable,
        "broken_scale": is_below,
    }[control]
    said = f"{other} is better than {name}" if is_below else f"{name} is better than {other}" if is_above else (
        f"{name} and {other} cannot be told apart"
    )  # fmt: skip
    if (is_below or is_above) and not is_separable:  # the interval beside it, of both sides, holds zero
        said += ", by a test of that side alone"
    return {
        "behaved": behaved,
        "said": said,
        "difference": gap.estimate,
        "low": gap.low,
        "high": gap.high,
        "p": gap.p_value,
    }
