"""Charts of lines: what n trials bring, how a loss falls. One line an arm, its name at the line's end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from veneer.comparing.reporting import axes
from veneer.comparing.reporting.axes import CHARACTER, WIDTH, Axis, Quantity, words

Curve = Sequence[tuple[float, float]]
ORDER = ("recommended", "tied", "worse")
NAMED_AT_MOST = 16  # line ends that can be named without a magnifying glass


def lines(
    curves: Mapping[str, Curve],
    kinds: Mapping[str, str],
    across: Quantity,
    up: Quantity,
    what: str,
    *,
    upwards: bool = True,
    level: float | None = None,
    whole: bool = False,
    names_worse: bool = True,
) -> str:
    """One line an arm. kinds: {arm: recommended, tied or worse}; level: a target, drawn across.

    upwards: higher values are higher on the page; False for a metric of which lower is better. whole: ticks
    across are whole numbers. names_worse: name the lines of worse arms too, which takes room where lines end
    far from the edge.
    """
    named = sorted(
        (arm for arm in curves if names_worse or kinds[arm] != "worse"),
        key=lambda arm: ORDER.index(kinds[arm]),
    )[:NAMED_AT_MOST]
    names = axes.brief(list(curves))
    room = 14 + CHARACTER * max((len(names[arm]) for arm in named), default=0)
    height, top, bottom, left, right = 300.0, 22.0, 252.0, 50.0, WIDTH - room
    ys = [value for curve in curves.values() for _, value in curve] + ([] if level is None else [level])
    xs = [place for curve in curves.values() for place, _ in curve]
    y = Axis.of(ys, ys, bottom, top) if upwards else Axis.of(ys, ys, top, bottom)
    x = Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, left + 6, right)
    ticks = [tick for tick in x.ticks() if not whole or abs(tick - round(tick)) < 1e-9]
    parts = [axes.grid_y(y, left, right, up.ticks), axes.foot(x, left, right, bottom, across.ticks, ticks)]
    if level is not None:
        parts.append(axes.line("level", left, y(level), right, y(level)))
        parts.append(words("tick-label", left + 4, y(level) - 5, f"target {up.text(level)}"))
    for arm in sorted(curves, key=lambda arm: -ORDER.index(kinds[arm])):
        path = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in curves[arm])
        inside = f'<polyline class="curve" points="{path}"/><polyline class="reach" points="{path}"/>'
        parts.append(axes.marked(kinds[arm], arm, _said(arm, curves[arm], across, up), inside))
    ends = axes.spread_out([y(curves[arm][-1][1]) for arm in named], 14, top, bottom)
    for arm, at in zip(named, ends):
        last_x, last_y = curves[arm][-1]
        name = axes.line("leader", x(last_x) + 3, y(last_y), right + 8, at)
        name += words("label", right + 11, at + 4, names[arm])
        parts.append(f'<g class="{kinds[arm]}" data-arm="{escape(arm)}">{name}</g>')
    parts.append(words("axis-title", right, height - 8, across.title))
    parts.append(words("axis-title start", 8, 12, up.title))
    return axes.svg(height, what, parts)


def _said(arm: str, curve: Curve, across: Quantity, up: Quantity) -> str:
    (first, start), (last, end) = curve[0], curve[-1]
    at = f"{up.text(start)} at {across.text(first)}, {up.text(end)} at {across.text(last)}"
    return f"{arm}: {at} {across.title}"


def reliability(bins: Sequence[Mapping[str, Any]], name: str, kind: str) -> str:
    """Accuracy against confidence of one arm; on the diagonal a confidence of 0.8 is right 8 times in 10.

    bins: {"confidence", "accuracy", "share"}, and where they are known "low" and "high".
    """
    width, height, top, bottom, left = 220.0, 200.0, 10.0, 164.0, 34.0
    x, y = Axis(0, 1, left, width - 10), Axis(0, 1, bottom, top)
    parts = [axes.line("level", x(0), y(0), x(1), y(1))]
    for tick in (0.0, 0.5, 1.0):
        parts.append(words("tick-label middle", x(tick), bottom + 16, f"{tick:g}"))
        parts.append(words("tick-label end", left - 5, y(tick) + 4, f"{tick:g}"))
    parts.append(axes.line("baseline", left, bottom, width - 10, bottom))
    path = " ".join(f"{x(one['confidence']):.1f},{y(one['accuracy']):.1f}" for one in bins)
    parts.append(f'<g class="{kind}"><polyline class="curve" points="{path}"/></g>')
    for one in bins:
        px, py = x(one["confidence"]), y(one["accuracy"])
        inside = ""
        if one.get("low") is not None:
            inside = axes.line("interval thin", px, y(one["low"]), px, y(one["high"]))
        said = f"{name}: confidence {one['confidence']:.2f}, right {one['accuracy']:.2f}"
        if one.get("share") is not None:
            said += f", {100 * one['share']:.0f} % of items"
        parts.append(axes.marked(kind, name, said, inside + axes.mark(kind, px, py, 3.2)))
    parts.append(words("axis-title", width - 10, height - 4, "confidence"))
    return axes.svg(
        height, f"Reliability of {name}: accuracy against confidence in {len(bins)} bins.", parts, width
    )
