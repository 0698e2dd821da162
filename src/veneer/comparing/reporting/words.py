"""Words and numbers for people: the conclusion in a sentence, values on the metric's own scale, the table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from veneer.comparing.inference.analysis import Analysis
from veneer.comparing.inference.statistics import Array
from veneer.comparing.planning.budget import DEMO


@dataclass(frozen=True)
class Scale:
    """How scores are shown. Scores within [0, 1] are shown in per cent and differences in points.

    sign: -1 where lower is better; the analysis works on sign * score.
    """

    metric: str
    sign: float
    is_share: bool

    @classmethod
    def of(cls, metric: str, sign: float, scores: Iterable[Array]) -> Scale:
        return cls(metric, sign, all(float(s.min()) >= 0 and float(s.max()) <= 1 for s in scores))

    def bounds(self, low: float, high: float) -> tuple[float, float]:
        """An oriented interval in the metric's own direction."""
        return (low, high) if self.sign > 0 else (-high, -low)

    def value(self, score: float) -> str:
        return f"{100 * score:.1f}" if self.is_share else f"{score:.4g}"

    def size(self, difference: float) -> str:
        """The size of a difference, with its unit."""
        return f"{100 * abs(difference):.1f} points" if self.is_share else f"{abs(difference):.3g}"

    def missed(self, difference: float) -> str:
        """What a design misses that finds no less than `difference`."""
        if self.is_share and difference >= 1:
            return "any difference"
        return f"differences below about {self.size(difference)}"

    @property
    def unit(self) -> str:
        return f"{self.metric.replace('_', ' ')}, %" if self.is_share else self.metric.replace("_", " ")


def conclusion(
    analysis: Analysis, scale: Scale, costs: Mapping[str, Mapping[str, Any]], is_demo: bool
) -> str:
    """What a person should take away, and how sure it is, in two or three plain sentences."""
    chosen = analysis.arm(analysis.recommended)
    low, high = scale.bounds(chosen.interval.low, chosen.interval.high)
    percent = " %" if scale.is_share else ""
    result = (
        f"{scale.metric.replace('_', ' ')} {scale.value(scale.sign * chosen.interval.estimate)}{percent} "
        f"(95 % interval {scale.value(low)} to {scale.value(high)})"
    )
    trained = costs.get(chosen.arm, {}).get("trainable_parameters")
    price = "" if trained is None else f" with {count(trained)} trained parameters"
    tied = [arm.arm for arm in analysis.arms if arm.tied_with_best]
    best = analysis.arm(analysis.best)
    highest = "highest" if scale.sign > 0 else "lowest"
    if chosen.arm == "untrained":
        first = f"Nothing that was tried is shown to be better than the untrained base: {result}. "
        first += f"{len(tied)} arms cannot be told from the best. " if len(tied) > 1 else ""
        first += (
            f"{best.arm} has the {highest} mean, {scale.value(scale.sign * best.interval.estimate)}{percent}."
        )
    elif len(tied) == 1:
        first = f"{chosen.arm} is better than all others: {result}{price}."
    elif chosen.arm == best.arm:
        first = (
            f"{chosen.arm} has the {highest} mean and is the cheapest of the {len(tied)} arms that this test "
        )
        first += f"cannot tell apart: {result}{price}."
    else:
        first = f"{chosen.arm} is the cheapest of {len(tied)} arms that this test cannot tell from the best: "
        first += f"{result}{price}. "
        first += (
            f"{best.arm} has the {highest} mean, {scale.value(scale.sign * best.interval.estimate)}{percent}."
        )
    over = f"{analysis.seeds} seed{'s' if analysis.seeds != 1 else ''}"
    over = f"{analysis.items} test items and {over}" if analysis.items else over
    second = ""
    if analysis.seeds > 1 and len(tied) > 1:
        second = f"The best arm is one of those {len(tied)}, with 95 % confidence. "
    if analysis.smallest_found > 1e-9:
        second += f"With {over}, {scale.missed(analysis.smallest_found)} would usually be missed."
    else:
        second += (
            f"Over {over} the closest arms gave the same scores, so that what would be missed is not known."
        )
    if analysis.seeds == 1:
        second += " One seed: how much a repeated run would differ is unknown."
    third = f" {DEMO[0].upper()}{DEMO[1:]}." if is_demo else ""
    return f"{first} {second}{third}"


def count(number: float | None) -> str:
    """1234567 -> 1.23 M."""
    if number is None:
        return "–"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= limit:
            size = number / (1e3 if unit == "k" else limit)
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
    return f"{number:,.0f}".replace(",", " ")


def bytes_text(number: float | None) -> str:
    if number is None:
        return "–"
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f} B"


def seconds_text(seconds: float | None) -> str:
    if seconds is None or math.isnan(seconds):
        return "–"
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def table_text(summary: Mapping[str, Any]) -> str:
    """The arms, best first, in columns that line up."""
    scale = Scale(summary["analysed"], 1.0 if summary["higher_is_better"] else -1.0, summary["in_percent"])
    head = (
        "arm",
        scale.unit,
        "95 % interval",
        "trained",
        "step",
        "tied with best",
        "p (is best)",
        "on front",
    )
    lines = [head]
    for arm in summary["arms"]:
        lines.append(
            (
                arm["arm"] + (" *" if arm["arm"] == summary["recommendation"]["arm"] else ""),
                scale.value(arm["mean"]),
                f"{scale.value(arm['low'])} to {scale.value(arm['high'])}",
                count(arm["trainable_parameters"]),
                seconds_text(arm["step_seconds"]),
                "yes" if arm["tied_with_best"] else "no",
                p_text(arm["p_adjusted"]),
                f"{arm['front_probability']:.2f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    texts = [
        "  ".join(
            _pad(cell, width, place) for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    texts.insert(1, "  ".join("-" * width for width in widths))
    for other in summary["not_measured"]:
        texts.append(f"{other['arm']}: {other['status'].replace('_', ' ')} ({other['reason'].rstrip('.')})")
    texts.append("* recommended: the cheapest arm that cannot be told apart from the best")
    if summary["claim"]:
        texts.append(summary["claim"])
    return "\n".join(texts)


def _pad(cell: str, width: int, place: int) -> str:
    return cell.ljust(width) if place == 0 else cell.rjust(width)
