"""Axes and marks of inline SVG, shared by all charts of the report.

A chart is 480 units wide, so that its text stays readable on a phone and two stand side by side on a desk.
Form says what colour says: a diamond is the recommended arm, a full circle is tied with the best, an empty one
is separably worse. A mark is a group with `data-arm` and a title: the title is its text for whoever hovers or
reads without a script, the script shows the same text on hover and on arrow keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape as escape
from typing import Any

from veneer.comparing.reporting.words import Scale

WIDTH = 480.0
CHARACTER = 7.6  # mean width of a character of the labels, in units

Arm = Mapping[str, Any]


@dataclass(frozen=True)
class Quantity:
    """What an axis shows: its title, a value as text, and a tick as text where that is shorter."""

    title: str
    text: Callable[[float], str]
    tick: Callable[[float], str] | None = None

    @classmethod
    def of(cls, title: str, in_percent: bool) -> Quantity:
        if in_percent:
            return cls(f"{title}, %", lambda value: f"{100 * value:.1f}", lambda value: f"{100 * value:.4g}")
        return cls(title, lambda value: f"{value:.3g}")

    @property
    def ticks(self) -> Callable[[float], str]:
        return self.tick or self.text


class Axis:
    """A linear axis with round ticks. `of(..., start, end)` with start > end runs upwards."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    @classmethod
    def of(cls, lows: Sequence[float], highs: Sequence[float], start: float, end: float) -> Axis:
        low, high = min(lows, default=0.0), max(highs, default=1.0)
        room = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        raw = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * size for size in (1, 2, 5, 10) if power * size >= raw)
        first = math.ceil(self.low / step)
        return [place * step for place in range(first, math.floor(self.high / step) + 1)]


class LogAxis(Axis):
    """A log axis with ticks at decades, or at 1, 2 and 5 where it spans few of them."""

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> LogAxis:  # type: ignore[override]
        low, high = math.log10(min(values)), math.log10(max(values))
        room = max(0.06 * (high - low), 0.08)
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        return super().__call__(math.log10(value))

    def ticks(self, about: int = 5) -> list[float]:
        low, high = math.floor(self.low), math.ceil(self.high)
        steps = (
            (1,) if self.high - self.low > 2 else (1, 2, 5) if self.high - self.low > 0.5 else range(1, 10)
        )
        all_ticks = [size * 10.0**power for power in range(low, high + 1) for size in steps]
        inside = [tick for tick in all_ticks if self.low <= math.log10(tick) <= self.high]
        return inside[:: math.ceil(len(inside) / 6) or 1]


class ByteAxis(LogAxis):
    """A log axis of bytes, with ticks at powers of two, or evenly spaced where it spans few of them."""

    def ticks(self, about: int = 5) -> list[float]:
        low, high = 10**self.low, 10**self.high
        powers = [2.0**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
        if len(powers) >= 3:
            return powers[:: math.ceil(len(powers) / 5)]
        unit = 1024.0 ** max(0, math.floor(math.log2(high) / 10))
        return [unit * tick for tick in Axis(low / unit, high / unit, 0, 1).ticks(3)]


def quality_axis(
    lows: Sequence[float], highs: Sequence[float], bottom: float, top: float, scale: Scale
) -> Axis:
    """A vertical axis on which better is up, also where lower scores are better."""
    return Axis.of(lows, highs, bottom, top) if scale.sign > 0 else Axis.of(lows, highs, top, bottom)


def svg(height: float, what: str, parts: Sequence[str], width: float = WIDTH) -> str:
    """The chart as an element; `what` says in words what it shows and where its numbers stand."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(what)}" '
        f'preserveAspectRatio="xMinYMin meet">{"".join(parts)}</svg>'
    )


def marked(kind: str, arm: str, title: str, inside: str) -> str:
    """A mark with its text."""
    return f'<g class="{kind}" data-arm="{escape(arm)}"><title>{escape(title)}</title>{inside}</g>'


def mark(kind: str, x: float, y: float, size: float = 5.0) -> str:
    if kind == "recommended":
        r = size + 2
        return f'<path class="mark" d="M{x:.1f} {y - r:.1f}l{r:g} {r:g}l-{r:g} {r:g}l-{r:g} -{r:g}z"/>'
    return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{size:g}"/>'


def line(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def words(name: str, x: float, y: float, text: str) -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def kind_of(arm: Arm, recommended: str) -> str:
    """`recommended`, `tied` or `worse`: the class of an arm's marks and names."""
    if arm["arm"] == recommended:
        return "recommended"
    return "tied" if arm["tied_with_best"] else "worse"


def grid_x(axis: Axis, top: float, bottom: float, text: Callable[[float], str]) -> str:
    return "".join(
        line("grid", axis(tick), top, axis(tick), bottom)
        + words("tick-label middle", axis(tick), bottom + 15, text(tick))
        for tick in axis.ticks()
    )


def grid_y(axis: Axis, left: float, right: float, text: Callable[[float], str]) -> str:
    return "".join(
        line("grid", left, axis(tick), right, axis(tick))
        + words("tick-label end", left - 6, axis(tick) + 4, text(tick))
        for tick in axis.ticks()
    )


def foot(
    axis: Axis,
    left: float,
    right: float,
    bottom: float,
    text: Callable[[float], str],
    ticks: Sequence[float] | None = None,
) -> str:
    """A horizontal axis without a grid: its line, ticks and their labels."""
    return line("baseline", left, bottom, right, bottom) + "".join(
        line("tick", axis(tick), bottom, axis(tick), bottom + 4)
        + words("tick-label middle", axis(tick), bottom + 17, text(tick))
        for tick in (axis.ticks() if ticks is None else ticks)
    )


def tick_text(scale: Scale) -> Callable[[float], str]:
    return lambda value: (f"{100 * value:.4g}" if scale.is_share else f"{value:.4g}").replace("-", "−")


def short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def brief(arms: Sequence[str]) -> dict[str, str]:
    """The method alone where only one arm has it, else as much of the arm as there is room for."""
    methods = [arm.split(":")[0].split("+")[0] for arm in arms]
    return {
        arm: short(method if methods.count(method) == 1 else arm, 24) for arm, method in zip(arms, methods)
    }


def sentence(arm: Arm, scale: Scale) -> str:
    tied = "tied with the best" if arm["tied_with_best"] else "worse than the best"
    interval = f"{scale.value(arm['low'])} to {scale.value(arm['high'])}"
    return f"{arm['arm']}: {scale.value(arm['mean'])} ({interval}), {tied}"


def overlap(one: tuple[float, ...], two: tuple[float, ...]) -> bool:
    """Whether two boxes (left, top, right, bottom) share a point."""
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def spread_out(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`heights`, moved as little as needed to lie `gap` apart within [low, high], order kept."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    found = [0.0] * len(heights)
    last = low - gap
    for place in order:
        last = found[place] = max(heights[place], last + gap)
    ceiling = high
    for place in reversed(order):
        found[place] = min(found[place], ceiling)
        ceiling = found[place] - gap
    return found
