"""What the sections beyond one number share: oriented values as the page shows them, their tables and dots.

summary.json keeps these values oriented: higher is better, whatever the metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.comparing.reporting import charts
from veneer.comparing.reporting.published import Published
from veneer.comparing.reporting.tables import Cell, Column, Row, Table, kind_of
from veneer.comparing.reporting.words import Scale

Part = dict[str, Any]
Points = Sequence[tuple[str, Mapping[str, Any]]]


def part(name: str, short: str, title: str, say: str, **more: Any) -> Part:
    """A section: its anchor, its name in the contents, its heading, what it says, charts and tables."""
    blank = {"layout": "two", "charts": [], "tables": [], "folded": []}
    return {"id": name, "short": short, "title": title, "say": say, **blank, **more}


class Oriented:
    """Scores and drops as text, on the metric's own scale."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    def value(self, value: float) -> str:
        return self.scale.value(self.scale.sign * value)

    def interval(self, low: float | None, high: float | None) -> str:
        if low is None or high is None:
            return ""
        first, last = self.scale.bounds(low, high)
        return f"({self.scale.value(first)} to {self.scale.value(last)})"

    def scored(self, found: Mapping[str, Any] | None) -> Cell:
        """A mean with its interval."""
        if found is None:
            return Cell("–")
        bounds = self.interval(found.get("low"), found.get("high"))
        return Cell(self.value(found["mean"]), found["mean"], extra=bounds)

    def lost(self, found: Mapping[str, Any] | None) -> Cell:
        """A drop with its interval: positive where the arm is worse than at home."""
        if found is None:
            return Cell("–")
        bounds = f"({self.size(found['low'])} to {self.size(found['high'])})"
        return Cell(self.size(found["difference"]), found["difference"], extra=bounds)

    def size(self, value: float) -> str:
        text = f"{100 * value:.1f}" if self.scale.is_share else f"{value:.3g}"
        return text.replace("-", "−")


def arms_of(page: Published, arms: Mapping[str, Any]) -> list[str]:
    """The arms of a section in the order of the table of arms."""
    return [arm["arm"] for arm in page.arms if arms.get(arm["arm"])]


def of_arms(
    page: Published, caption: str, columns: Sequence[Column], cells: Mapping[str, Sequence[Cell]]
) -> Table:
    """A row an arm."""
    rows = [Row(arm, found, arm, kind_of(page, arm)) for arm, found in cells.items()]
    return Table(caption, [Column("Arm", True), *columns], rows)


def own_score(page: Published, name: str) -> dict[str, float]:
    """An arm's score on the test split, oriented as those of a section."""
    arm, scale = next(arm for arm in page.arms if arm["arm"] == name), page.scale
    low, high = scale.bounds(arm["low"], arm["high"])
    return {"mean": scale.sign * arm["mean"], "low": low, "high": high}


def dots(page: Published, points: Mapping[str, Points], what: str) -> list[tuple[str, str]]:
    """A chart with a row an arm: its score on the test split, full, and other scores, empty."""
    shown = Oriented(page.scale)
    rows = []
    for arm, others in points.items():
        marks = []
        for name, one in [("the test split", own_score(page, arm)), *others]:
            said = (
                f"{arm}, {name}: {shown.value(one['mean'])} {shown.interval(one.get('low'), one.get('high'))}"
            )
            marks.append((page.scale.sign * one["mean"], said.strip()))
        rows.append((arm, kind_of(page, arm), marks))
    return [("", charts.dots(rows, page.scale, what))] if rows else []
