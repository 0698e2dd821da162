"""Charts as inline SVG: text of the report's own font, colours from its style sheet, a title for every mark.

All are drawn 480 units wide, so that their text stays readable on a phone and two stand side by side on a
desk. Form says what colour says: a diamond is the recommended arm, a full circle is tied with the best, an
empty one is separably worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from veneer.comparing.words import Scale

WIDTH = 480.0
CHARACTER = 7.6  # mean width of a character of the labels, in units

Arm = Mapping[str, Any]


def forest(arms: Sequence[Arm], groups: Sequence[Sequence[str]], recommended: str, scale: Scale) -> str:
    """Means with intervals, best first, and a bar at the right for each group that cannot be told apart."""
    shown = [group for group in groups if len(group) > 1]
    row, top = 25.0, 4.0
    names = {arm["arm"]: _short(arm["arm"], 24) for arm in arms}
    left = 22 + CHARACTER * max(len(name) for name in names.values())
    right = WIDTH - 8 - 10 * len(shown)
    bottom = top + row * len(arms)
    axis = Axis.of([arm["low"] for arm in arms], [arm["high"] for arm in arms], left, right)
    parts = [_grid_x(axis, top, bottom, scale)]
    where = {}
    for place, arm in enumerate(arms):
        y = top + row * (place + 0.5)
        where[arm["arm"]] = y
        kind = _kind(arm, recommended)
        parts.append(
            f'<g class="{kind}"><title>{escape(_sentence(arm, scale))}</title>'
            f'<text class="label" x="0" y="{y + 4:.1f}">{escape(names[arm["arm"]])}</text>'
            f'<line class="interval" x1="{axis(arm["low"]):.1f}" x2="{axis(arm["high"]):.1f}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>{_mark(kind, axis(arm["mean"]), y)}</g>'
        )
    for number, group in enumerate(shown):
        x = right + 8 + 10 * number
        first, last = where[group[0]] - 8, where[group[-1]] + 8
        parts.append(
            f'<line class="group" x1="{x:.1f}" x2="{x:.1f}" y1="{first:.1f}" y2="{last:.1f}">'
            f"<title>cannot be told apart: {escape(', '.join(group))}</title></line>"
        )
    parts.append(
        f'<text class="axis-title" x="{right:.1f}" y="{bottom + 32:.1f}">{escape(scale.unit)}</text>'
    )
    what = f"Mean {scale.unit} of {len(arms)} arms with 95 % intervals; the numbers are in the table above."
    return _svg(bottom + 36, what, parts)


def scatter(
    arms: Sequence[Arm],
    cost: str,
    recommended: str,
    scale: Scale,
    axis_title: str,
    text: Callable[[float], str],
) -> str:
    """Quality against a cost on a log axis, with intervals; arms that cost nothing stand left of a gap."""
    known = [arm for arm in arms if arm.get(cost) is not None]
    paid = [arm for arm in known if arm[cost] > 0]
    free = [arm for arm in known if arm[cost] == 0]
    height, top, bottom, left = 330.0, 22.0, 282.0, 44.0
    start = left + 42 if free else left + 14
    y = Axis.of([arm["low"] for arm in known], [arm["high"] for arm in known], bottom, top)
    x = LogAxis.of([arm[cost] for arm in paid] or [1.0], start, WIDTH - 22)
    parts = [_grid_y(y, left, WIDTH - 8, scale)]
    for tick in x.ticks():
        parts.append(
            f'<line class="tick" x1="{x(tick):.1f}" x2="{x(tick):.1f}" '
            f'y1="{bottom:.0f}" y2="{bottom + 4:.0f}"/>' + _under(x(tick), bottom + 17, text(tick))
        )
    parts.append(
        f'<line class="baseline" x1="{start - 6:.1f}" x2="{WIDTH - 8:.0f}" '
        f'y1="{bottom:.0f}" y2="{bottom:.0f}"/>'
    )
    if free:
        parts.append(_under(left + 12, bottom + 17, "0"))
    spots = [(arm, x(arm[cost]) if arm[cost] > 0 else left + 12, y(arm["mean"])) for arm in known]
    for arm, px, py in spots:
        kind = _kind(arm, recommended)
        parts.append(
            f'<g class="{kind}"><title>{escape(_sentence(arm, scale))}; {escape(text(arm[cost]))}</title>'
            f'<line class="interval thin" x1="{px:.1f}" x2="{px:.1f}" y1="{y(arm["low"]):.1f}" '
            f'y2="{y(arm["high"]):.1f}"/>{_mark(kind, px, py)}</g>'
        )
    parts += _labels(spots, y, recommended, left, top - 14, bottom)
    parts.append(
        f'<text class="axis-title" x="{WIDTH - 8:.0f}" y="{height - 8:.0f}">{escape(axis_title)}</text>'
    )
    parts.append(f'<text class="axis-title start" x="8" y="12">{escape(scale.unit)}</text>')
    what = f"{scale.unit} against {axis_title} for {len(known)} arms, with 95 % intervals; see the tables."
    return _svg(height, what, parts)


def trials(
    points: Sequence[Mapping[str, Any]],
    chosen: float | None,
    span: tuple[float, float],
    name: str,
    text: Callable[[float], str],
) -> str:
    """Validation score against the learning rate of one arm; crosses at the foot are runs that diverged."""
    width, height, top, bottom = 220.0, 130.0, 22.0, 96.0
    rates = [point["learning_rate"] for point in points]
    x = LogAxis.of(rates, 22, width - 22)
    y = Axis.of([span[0]], [span[1]], bottom, top)
    foot = bottom + 8
    parts = [f'<line class="baseline" x1="6" x2="{width - 6:.0f}" y1="{foot:.0f}" y2="{foot:.0f}"/>']
    by_rate: dict[float, list[float]] = {}
    for point in points:
        rate = point["learning_rate"]
        if point["status"] == "ok":
            by_rate.setdefault(rate, []).append(point["validation"])
        else:
            parts.append(
                f'<text class="cross middle" x="{x(rate):.1f}" y="{bottom + 4:.1f}">×'
                f"<title>{rate:g}: {escape(point['status'])}</title></text>"
            )
    means = {rate: sum(values) / len(values) for rate, values in sorted(by_rate.items())}
    if len(means) > 1:
        line = " ".join(f"{x(rate):.1f},{y(mean):.1f}" for rate, mean in means.items())
        parts.append(f'<polyline class="trend" points="{line}"/>')
    for rate, mean in means.items():
        kind = "tied" if rate == chosen else "worse"
        parts.append(
            f'<g class="{kind}"><title>{rate:g}: {text(mean)}</title>{_mark(kind, x(rate), y(mean), 4.2)}</g>'
        )
        if rate == chosen:
            at = f'x="{x(rate):.1f}" y="{y(mean) - 9:.1f}"'
            parts.append(f'<text class="value middle" {at}>{text(mean)}</text>')
    parts += [_under(x(rate), height - 10, f"{rate:.2g}") for rate in _few(sorted(set(rates)))]
    return _svg(height, f"Validation score of {name} at {len(set(rates))} learning rates", parts, width)


class Axis:
    """A linear axis with round ticks."""

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


def _labels(
    spots: Sequence[tuple[Arm, float, float]],
    y: Axis,
    recommended: str,
    left: float,
    top: float,
    bottom: float,
) -> list[str]:
    """Names beside their marks where they cover no other mark or name, and if possible no interval.

    The most important are placed first; a name for which there is no room is left to the mark's title.
    """
    order = sorted(
        spots,
        key=lambda spot: (spot[0]["arm"] != recommended, not spot[0]["tied_with_best"], -spot[0]["mean"]),
    )
    names = _brief([arm["arm"] for arm, _, _ in spots])
    taken = [(px - 5, py - 5, px + 5, py + 5) for _, px, py in spots]
    lines = [(px - 1, y(arm["high"]), px + 1, y(arm["low"])) for arm, px, _ in spots]
    parts = []
    for arm, px, py in order:
        name = names[arm["arm"]]
        width = CHARACTER * len(name)
        beside = [(px + 9, py + 4), (px - 9 - width, py + 4)]
        corners = [(px + 7, py - 8), (px + 7, py + 17), (px - 7 - width, py - 8), (px - 7 - width, py + 17)]
        boxes = [(x, base - 10, x + width, base + 3) for x, base in beside + corners]
        fits = [b for b in boxes if b[0] >= left and b[2] <= WIDTH and b[1] >= top and b[3] <= bottom]
        free = [box for box in fits if not any(_overlap(box, other) for other in taken)]
        clear = [box for box in free if not any(_overlap(box, other) for other in lines)]
        if not free:
            continue
        box = (clear or free)[0]
        taken.append(box)
        at = f'x="{box[0]:.1f}" y="{box[1] + 10:.1f}"'
        parts.append(f'<text class="label {_kind(arm, recommended)}" {at}>{escape(name)}</text>')
    return parts


def _brief(arms: Sequence[str]) -> dict[str, str]:
    """The method alone where only one arm has it, else as much of the arm as there is room for."""
    methods = [arm.split(":")[0].split("+")[0] for arm in arms]
    return {
        arm: method if methods.count(method) == 1 else _short(arm, 24) for arm, method in zip(arms, methods)
    }


def _overlap(one: tuple[float, ...], two: tuple[float, ...]) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def _kind(arm: Arm, recommended: str) -> str:
    if arm["arm"] == recommended:
        return "recommended"
    return "tied" if arm["tied_with_best"] else "worse"


def _mark(kind: str, x: float, y: float, size: float = 5.0) -> str:
    if kind == "recommended":
        r = size + 2
        return f'<path class="mark" d="M{x:.1f} {y - r:.1f}l{r} {r}l-{r} {r}l-{r} -{r}z"/>'
    return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'


def _grid_x(axis: Axis, top: float, bottom: float, scale: Scale) -> str:
    parts = []
    for tick in axis.ticks():
        x = axis(tick)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.0f}" y2="{bottom:.0f}"/>'
            f'<text class="tick-label middle" x="{x:.1f}" y="{bottom + 15:.0f}">{_tick(tick, scale)}</text>'
        )
    return "".join(parts)


def _under(x: float, y: float, text: str) -> str:
    return f'<text class="tick-label middle" x="{x:.1f}" y="{y:.0f}">{escape(text)}</text>'


def _grid_y(axis: Axis, left: float, right: float, scale: Scale) -> str:
    parts = []
    for tick in axis.ticks():
        y = axis(tick)
        parts.append(
            f'<line class="grid" x1="{left:.0f}" x2="{right:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick-label end" x="{left - 6:.0f}" y="{y + 4:.1f}">{_tick(tick, scale)}</text>'
        )
    return "".join(parts)


def _tick(value: float, scale: Scale) -> str:
    return f"{100 * value:.4g}" if scale.is_share else f"{value:.4g}"


def _few(rates: Sequence[float]) -> Sequence[float]:
    return rates if len(rates) <= 3 else (rates[0], rates[len(rates) // 2], rates[-1])


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _sentence(arm: Arm, scale: Scale) -> str:
    tied = "tied with the best" if arm["tied_with_best"] else "worse than the best"
    interval = f"{scale.value(arm['low'])} to {scale.value(arm['high'])}"
    return f"{arm['arm']}: {scale.value(arm['mean'])} ({interval}), {tied}"


def _svg(height: float, what: str, parts: Sequence[str], width: float = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(what)}" '
        f'preserveAspectRatio="xMinYMin meet">{"".join(parts)}</svg>'
    )
