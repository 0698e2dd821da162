"""Charts of arms and of trials: intervals, quality against a price, the learning rates. See `axes` for the form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veneer.comparing.reporting import axes
from veneer.comparing.reporting.axes import CHARACTER, WIDTH, Arm, Axis, ByteAxis, LogAxis, words
from veneer.comparing.reporting.words import Scale


def forest(arms: Sequence[Arm], groups: Sequence[Sequence[str]], recommended: str, scale: Scale) -> str:
    """Means with intervals, best first, and a bar at the right for each group that cannot be told apart."""
    shown = [group for group in groups if len(group) > 1]
    row, top = 25.0, 4.0
    names = {arm["arm"]: axes.short(arm["arm"], 24) for arm in arms}
    left = 22 + CHARACTER * max(len(name) for name in names.values())
    right = WIDTH - 8 - 10 * len(shown)
    bottom = top + row * len(arms)
    axis = Axis.of([arm["low"] for arm in arms], [arm["high"] for arm in arms], left, right)
    parts = [axes.grid_x(axis, top, bottom, axes.tick_text(scale))]
    where = {}
    for place, arm in enumerate(arms):
        y = where[arm["arm"]] = top + row * (place + 0.5)
        kind = axes.kind_of(arm, recommended)
        inside = words("label", 0, y + 4, names[arm["arm"]])
        inside += axes.line("interval", axis(arm["low"]), y, axis(arm["high"]), y)
        inside += axes.mark(kind, axis(arm["mean"]), y)
        parts.append(axes.marked(kind, arm["arm"], axes.sentence(arm, scale), inside))
    for number, group in enumerate(shown):
        x = right + 8 + 10 * number
        bar = axes.line("group", x, where[group[0]] - 8, x, where[group[-1]] + 8)
        parts.append(axes.marked("bar", "", f"cannot be told apart: {', '.join(group)}", bar))
    parts.append(words("axis-title", right, bottom + 32, scale.unit))
    what = f"Mean {scale.unit} of {len(arms)} arms with 95 % intervals; the numbers are in the table of arms."
    return axes.svg(bottom + 36, what, parts)


def scatter(
    arms: Sequence[Arm],
    cost: str,
    recommended: str,
    scale: Scale,
    axis_title: str,
    text: Callable[[float], str],
    front: Mapping[str, float] | None = None,
) -> str:
    """Quality against a price on a log axis, with intervals; arms that cost nothing stand left of a gap.

    front: {arm: probability of being on the front}, said with each mark. A dotted line joins the front of means.
    """
    known = [arm for arm in arms if arm.get(cost) is not None]
    paid = [arm for arm in known if arm[cost] > 0]
    free = [arm for arm in known if arm[cost] == 0]
    height, top, bottom, left = 330.0, 22.0, 282.0, 44.0
    start = left + 42 if free else left + 14
    y = axes.quality_axis([arm["low"] for arm in known], [arm["high"] for arm in known], bottom, top, scale)
    axis_of = ByteAxis.of if "bytes" in cost else LogAxis.of
    x = axis_of([arm[cost] for arm in paid] or [1.0], start, WIDTH - 22)
    parts = [axes.grid_y(y, left, WIDTH - 8, axes.tick_text(scale))]
    parts.append(axes.foot(x, start - 6, WIDTH - 8, bottom, text))
    if free:
        parts.append(words("tick-label middle", left + 12, bottom + 17, "0"))
    spots = [(arm, x(arm[cost]) if arm[cost] > 0 else left + 12, y(arm["mean"])) for arm in known]
    parts.append(_staircase(spots))
    for arm, px, py in spots:
        kind = axes.kind_of(arm, recommended)
        title = f"{axes.sentence(arm, scale)}; {text(arm[cost])}"
        if front is not None and arm["arm"] in front:
            title += f"; on the front with probability {front[arm['arm']]:.2f}"
        inside = axes.line("interval thin", px, y(arm["low"]), px, y(arm["high"])) + axes.mark(kind, px, py)
        parts.append(axes.marked(kind, arm["arm"], title, inside))
    parts += _labels(spots, y, recommended, left, top - 14, bottom)
    parts.append(words("axis-title", WIDTH - 8, height - 8, axis_title))
    parts.append(words("axis-title start", 8, 12, scale.unit))
    what = f"{scale.unit} against {axis_title} for {len(known)} arms, with 95 % intervals; see the tables."
    return axes.svg(height, what, parts)


def _staircase(spots: Sequence[tuple[Arm, float, float]]) -> str:
    """The front of the means: from the cheapest arm on, each that is better than all that cost less."""
    points: list[tuple[float, float]] = []
    for _, px, py in sorted(spots, key=lambda spot: (spot[1], spot[2])):
        if not points or py < points[-1][1] - 1e-9:  # smaller is higher on the page, and better
            points += [(px, points[-1][1])] if points else []
            points.append((px, py))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="front" points="{path}"/>' if len(points) > 1 else ""


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
    parts = [axes.line("baseline", 6, bottom + 8, width - 6, bottom + 8)]
    by_rate: dict[float, list[float]] = {}
    for point in points:
        rate = point["learning_rate"]
        if point["status"] == "ok":
            by_rate.setdefault(rate, []).append(point["validation"])
        else:
            cross = words("cross middle", x(rate), bottom + 4, "×")
            parts.append(axes.marked("lost", name, f"{rate:g}: {point['status']}", cross))
    means = {rate: sum(values) / len(values) for rate, values in sorted(by_rate.items())}
    if len(means) > 1:
        path = " ".join(f"{x(rate):.1f},{y(mean):.1f}" for rate, mean in means.items())
        parts.append(f'<polyline class="trend" points="{path}"/>')
    for rate, mean in means.items():
        kind = "tied" if rate == chosen else "worse"
        said = f"{name} at {rate:g}: {text(mean)}{', chosen' if rate == chosen else ''}"
        parts.append(axes.marked(kind, name, said, axes.mark(kind, x(rate), y(mean), 4.2)))
        if rate == chosen:
            parts.append(words("value middle", x(rate), y(mean) - 9, text(mean)))
    for rate in _few(sorted(set(rates))):
        parts.append(words("tick-label middle", x(rate), height - 10, f"{rate:.2g}"))
    what = (
        f"Validation score of {name} at {len(set(rates))} learning rates; the numbers are in the table below."
    )
    return axes.svg(height, what, parts, width)


def dots(rows: Sequence[tuple[str, str, Sequence[tuple[float, str]]]], scale: Scale, what: str) -> str:
    """A row an arm with several marks: (arm, kind, [(value, title), ...]); the first mark is full, others empty."""
    row, top = 25.0, 4.0
    names = {arm: axes.short(arm, 24) for arm, _, _ in rows}
    left = 22 + CHARACTER * max(len(name) for name in names.values())
    bottom = top + row * len(rows)
    values = [value for _, _, points in rows for value, _ in points]
    axis = Axis.of(values, values, left, WIDTH - 12)
    parts = [axes.grid_x(axis, top, bottom, axes.tick_text(scale))]
    for place, (arm, kind, points) in enumerate(rows):
        y = top + row * (place + 0.5)
        spread = [axis(value) for value, _ in points]
        name = words("label", 0, y + 4, names[arm]) + axes.line(
            "interval thin", min(spread), y, max(spread), y
        )
        parts.append(f'<g class="{kind}" data-arm="{axes.escape(arm)}">{name}</g>')
        for number, (value, title) in reversed(list(enumerate(points))):
            form = kind if number == 0 else f"{kind} other"
            parts.append(
                axes.marked(form, arm, title, axes.mark(form, axis(value), y, 5.0 if number == 0 else 4.0))
            )
    parts.append(words("axis-title", WIDTH - 12, bottom + 32, scale.unit))
    return axes.svg(bottom + 36, f"{scale.unit} of {len(rows)} arms: {what}.", parts)


def differences(
    rows: Sequence[tuple[str, str, float, float, float, str]], unit: str, tick: Callable[[float], str]
) -> str:
    """Differences with intervals and a line at zero: (name, kind, difference, low, high, title)."""
    row, top = 25.0, 4.0
    names = [axes.short(one[0], 28) for one in rows]
    left = min(240.0, 22 + CHARACTER * max(len(name) for name in names))
    bottom = top + row * len(rows)
    axis = Axis.of([0.0, *(one[3] for one in rows)], [0.0, *(one[4] for one in rows)], left, WIDTH - 12)
    parts = [axes.grid_x(axis, top, bottom, tick), axes.line("zero", axis(0), top, axis(0), bottom)]
    for place, (name, (whole, kind, estimate, low, high, title)) in enumerate(zip(names, rows)):
        y = top + row * (place + 0.5)
        inside = words("label", 0, y + 4, name) + axes.line("interval", axis(low), y, axis(high), y)
        parts.append(axes.marked(kind, whole, title, inside + axes.mark(kind, axis(estimate), y)))
    parts.append(words("axis-title", WIDTH - 12, bottom + 32, unit))
    return axes.svg(
        bottom + 36, f"{len(rows)} differences with 95 % intervals, {unit}; see the table.", parts
    )


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
        spots, key=lambda spot: (spot[0]["arm"] != recommended, not spot[0]["tied_with_best"], spot[2])
    )
    names = axes.brief([arm["arm"] for arm, _, _ in spots])
    taken = [(px - 5, py - 5, px + 5, py + 5) for _, px, py in spots]
    lines = [(px - 1, *sorted((y(arm["high"]), y(arm["low"])))) for arm, px, _ in spots]
    lines_boxes = [(px, high, px + 2, low) for px, high, low in lines]
    parts = []
    for arm, px, py in order:
        name = names[arm["arm"]]
        width = CHARACTER * len(name)
        beside = [(px + 9, py + 4), (px - 9 - width, py + 4)]
        corners = [(px + 7, py - 8), (px + 7, py + 17), (px - 7 - width, py - 8), (px - 7 - width, py + 17)]
        boxes = [(x, base - 10, x + width, base + 3) for x, base in beside + corners]
        fits = [b for b in boxes if b[0] >= left and b[2] <= WIDTH and b[1] >= top and b[3] <= bottom]
        free = [box for box in fits if not any(axes.overlap(box, other) for other in taken)]
        clear = [box for box in free if not any(axes.overlap(box, other) for other in lines_boxes)]
        if not free:
            continue
        box = (clear or free)[0]
        taken.append(box)
        parts.append(
            f'<g data-arm="{axes.escape(arm["arm"])}">'
            + words(f"label {axes.kind_of(arm, recommended)}", box[0], box[1] + 10, name)
            + "</g>"
        )
    return parts


def _few(rates: Sequence[float]) -> Sequence[float]:
    return rates if len(rates) <= 3 else (rates[0], rates[len(rates) // 2], rates[-1])
