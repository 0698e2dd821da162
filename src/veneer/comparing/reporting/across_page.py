"""The page of several tasks and bases: what they say together, and every one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from veneer.comparing.reporting import charts
from veneer.comparing.reporting.filling import fill
from veneer.comparing.reporting.limits import listed
from veneer.comparing.reporting.tables import Cell, Column, Row, Table
from veneer.comparing.running.ledger import write_atomic


def write_across(found: Mapping[str, Any], folder: str | Path) -> Path:
    """across.html in `folder`, from the content of across.json (`Across.to_dict`). Returns its path."""
    path = Path(folder) / "across.html"
    links = {
        name: f"{quote(name)}/report.html"
        for name in found["cells"]
        if (path.parent / name / "report.html").is_file()
    }
    write_atomic(path, render_across(found, links))
    return path


def render_across(found: Mapping[str, Any], links: Mapping[str, str] | None = None) -> str:
    """The page as text. links: {comparison: where its own report is, from the page}."""
    known = [arm for arm in found["arms"] if arm["low"] is not None]
    rows = [(arm["arm"], _kind(arm), arm["mean"], arm["low"], arm["high"], _said(arm)) for arm in known]
    cells, tasks = len(found["cells"]), found["tasks"]
    return fill(
        "across.html.j2",
        title=f"{cells} comparison{'s' if cells != 1 else ''} of {tasks} task{'s' if tasks != 1 else ''} together",
        anchor=found["anchor"],
        lead=_lead(found),
        notes=[*found["notes"], *_how(found["arms"])],
        drawn=charts.differences(rows, "standard deviations of single scores", _signed) if rows else "",
        together=_together(found["arms"]),
        links=links or {},
        cells=[_of_cell(found["arms"], place, name) for place, name in enumerate(found["cells"])],
    )


def _lead(found: Mapping[str, Any]) -> str:
    """How sure it is, in a sentence: which arms are better or worse than the anchor on tasks like these."""
    by_kind: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for arm in found["arms"]:
        low, high = arm["low"], arm["high"]
        is_known = low is not None and high is not None
        by_kind["better" if is_known and low > 0 else "worse" if is_known and high < 0 else "open"].append(
            arm["arm"]
        )
    anchor, said = found["anchor"], []
    tasks = "one task" if found["tasks"] == 1 else f"{found['tasks']} tasks"
    if by_kind["better"]:
        said.append(
            f"Better than {anchor} over {tasks}, with 95 % confidence each: {listed(by_kind['better'])}."
        )
    if by_kind["worse"]:
        than = "Worse" if said else f"Worse than {anchor} over {tasks}, with 95 % confidence each"
        said.append(f"{than}: {listed(by_kind['worse'])}.")
    if by_kind["open"]:
        said.append(f"Not to be told from {anchor}: {listed(by_kind['open'])}.")
    return " ".join(said)


def _how(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the intervals were made."""
    return [f"Intervals: {how}." for how in dict.fromkeys(arm["how"] for arm in arms)]


def _kind(arm: Mapping[str, Any]) -> str:
    return "worse" if arm["high"] < 0 else "tied"


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _said(arm: Mapping[str, Any]) -> str:
    bounds = "" if arm["low"] is None else f" ({_signed(arm['low'])} to {_signed(arm['high'])})"
    mean = "not known" if arm["mean"] is None else _signed(arm["mean"])
    return f"{arm['arm']}: {mean}{bounds}, {arm['how']}"


def _together(arms: Sequence[Mapping[str, Any]]) -> Table:
    columns = [
        Column("Arm", True),
        Column("Deviations", falls=True),
        Column("Wins", falls=True),
        Column("Ties", falls=True),
        Column("Losses", falls=True),
        Column("Sure wins, ties, losses", is_minor=True),
        Column("Interval", True, is_minor=True),
    ]
    rows = []
    for arm in arms:
        bounds = "" if arm["low"] is None else f"({_signed(arm['low'])} to {_signed(arm['high'])})"
        mean = Cell("–") if arm["mean"] is None else Cell(_signed(arm["mean"]), arm["mean"], extra=bounds)
        sure = f"{arm['sure_wins']}, {arm['sure_ties']}, {arm['sure_losses']}"
        counts = [Cell(str(arm[name]), arm[name]) for name in ("wins", "ties", "losses")]
        rows.append(Row(arm["arm"], [mean, *counts, Cell(sure, arm["sure_wins"])], arm["arm"]))
    return Table(
        "Standardised differences, and wins, ties and losses at the smallest effect of interest",
        columns,
        rows,
    )


def _of_cell(arms: Sequence[Mapping[str, Any]], place: int, name: str) -> Table:
    columns = [Column("Arm", True), Column("Difference", falls=True), Column("Verdict", True)]
    rows = []
    for arm in arms:
        one = arm["cells"][place]
        bounds = f"({_signed(one['low'])} to {_signed(one['high'])})"
        verdict = one["verdict"] + ("" if one["sure"] else ", not sure")
        cells = [
            Cell(_signed(one["difference"]), one["difference"], extra=bounds),
            Cell(verdict, verdict),
        ]
        rows.append(Row(arm["arm"], cells, arm["arm"]))
    first = arms[0]["cells"][place] if arms else {"data": name, "model": "", "metric": ""}
    base = f", base {first['model']}" if first["model"] else ""
    return Table(f"{first['data']}{base}: {first['metric']}", columns, rows)
