"""Sections of the report beyond one number: who is served worst, other data, calibration, forgetting, stability.

Each is shown where summary.json has it (`sections` writes it there), and named as not measured where it has not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.comparing.reporting import curves, served
from veneer.comparing.reporting.axes import Quantity
from veneer.comparing.reporting.oriented import Oriented, Part, arms_of, of_arms, part
from veneer.comparing.reporting.published import Published
from veneer.comparing.reporting.tables import Cell, Column, Table, kind_of, number
from veneer.comparing.reporting.words import Scale

ABSENT = {
    "by_group": "Scores by groups of the data, the worst group and the gap: --groups COLUMN.",
    "shifted": "Scores on test sets from elsewhere: --shifted DATA.",
    "corrupted": "Scores on corrupted inputs: --corrupt.",
    "calibration": "Calibration: it needs predictions with probabilities of classes.",
    "forgetting": "What was forgotten of other tasks, measured from the bare base: --forgetting DATA.",
}
MOST_RELIABILITIES = 12


def parts(page: Published) -> list[Part]:
    """[{"id", "short", "title", "say", "layout", "charts", "tables", "folded"}] of the sections that are there."""
    made = (served.groups, served.shifted, served.corrupted, calibration, forgetting, stability)
    return [found for make in made if (found := make(page)) is not None]


def missing(page: Published) -> list[str]:
    """What was not measured, and the flag that would; no flags where somebody else did the training."""
    absent = [text for key, text in ABSENT.items() if not page.summary.get(key)]
    return absent if page.made_here else [text.partition(": --")[0].rstrip(".") + "." for text in absent]


def calibration(page: Published) -> Part | None:
    found = page.summary.get("calibration")
    names = arms_of(page, found or {})
    if not found or not names:
        return None
    cells = {
        arm: [
            _with_bounds(found[arm]["error"], _share),
            number(found[arm]["by_chance"], _share),
            _with_bounds(found[arm]["overconfidence"], lambda value: f"{value:+.3f}"),
            _with_bounds(found[arm]["brier"], _share),
        ]
        for arm in names
    }
    columns = [
        Column("Calibration error"),
        Column("By chance"),
        Column("Overconfidence"),
        Column("Brier score", is_minor=True),
    ]
    say = (
        f"Expected calibration error over {found[names[0]]['bins']} bins of equal numbers of items. By chance: what a "
        "perfectly calibrated arm with these confidences would show. Overconfidence: mean confidence less accuracy. In "
        "the charts, points below the diagonal are too sure."
    )
    drawn = []
    for arm in names[:MOST_RELIABILITIES]:
        bins = found[arm]["reliability"]
        total = sum(one["n"] for one in bins) or 1.0
        points = [{**one, "share": one["n"] / total} for one in bins]
        drawn.append((arm, curves.reliability(points, arm, kind_of(page, arm))))
    table = of_arms(page, "Calibration on the test split, with 95 % intervals", columns, cells)
    return part(
        "calibration",
        "Calibration",
        "As sure as they are right?",
        say,
        layout="small",
        charts=drawn,
        tables=[table],
    )


def _share(value: float) -> str:
    return f"{value:.3f}"


def _with_bounds(found: Mapping[str, Any] | None, text: Any, key: str = "mean") -> Cell:
    """A value with its interval, where it has one."""
    if not found or found.get(key) is None:
        return Cell("–")
    low, high = found.get("low"), found.get("high")
    bounds = "" if low is None or high is None else f"({text(low)} to {text(high)})"
    return Cell(text(found[key]).replace("-", "−"), found[key], extra=bounds.replace("-", "−"))


def forgetting(page: Published) -> Part | None:
    sets = page.summary.get("forgetting")
    if not sets:
        return None
    say = [
        "What a trained model still knows of other tasks, against the bare base on the same items: for models of "
        "language the likelihood of plain text, for others how well a probe tells the classes of another set."
    ]
    tables = []
    for about in sets.values():
        if about.get("not_applicable"):
            say.append(f"{about['name']}: {about['not_applicable']}.")
        if about.get("arms"):
            tables.append(_forgotten(page, about))
    return part("forgetting", "Forgetting", "What they forget", " ".join(say), tables=tables)


def _forgotten(page: Published, about: Mapping[str, Any]) -> Table:
    is_text = about["measure"] == "perplexity"
    shown = Oriented(Scale("", 1.0, not is_text))
    cells = {}
    for arm in arms_of(page, about["arms"]):
        of = about["arms"][arm]
        score = _with_bounds(of["perplexity"], lambda value: f"{value:.4g}") if is_text else shown.scored(of)
        cells[arm] = [score, shown.lost(of["lost"])]
    titles = ("Perplexity", "Lost, nats a token") if is_text else ("Probe, % right", "Lost, points")
    columns = [Column(titles[0], falls=not is_text), Column(titles[1], falls=True)]
    return of_arms(page, f"{about['name']}, {about['rows']} items, by {about['measure']}", columns, cells)


def stability(page: Published) -> Part | None:
    found = page.summary.get("stability")
    if not found or not any(one.get("deviation") is not None for one in found.values()):
        return None
    size = Quantity.of("", page.scale.is_share).text
    cells = {
        arm: [
            _with_bounds(found[arm], size, "deviation"),
            _with_bounds(found[arm].get("train_validation_gap"), size),
        ]
        for arm in arms_of(page, found)
    }
    columns = [Column("Deviation over seeds", falls=True), Column("Training − validation", falls=True)]
    unit = "points" if page.scale.is_share else page.scale.unit
    say = (
        "The standard deviation of the mean test score over seeds, with a chi-square interval; and by how much an arm "
        "is better on rows that it learned from, where that was measured."
    )
    table = of_arms(page, f"Stability, {unit}", columns, cells)
    return part("stability", "Stability", "How much a repeated run differs", say, tables=[table])
