"""Tables about fronts of quality and price: who is on them, what they are worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.comparing.reporting.published import Published
from veneer.comparing.reporting.tables import Cell, Column, Row, Table, kind_of, number

ADDING = 4  # arms that are named beside a hypervolume


def areas_table(page: Published, areas: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> Table:
    """The hypervolume of each front, and the arms without which most of it would be lost."""
    scale = page.scale

    def gain(value: float) -> str:
        return f"{100 * value:.1f}" if scale.is_share else f"{value:.3g}"

    rows = []
    for cost in titles:
        if cost not in areas:
            continue
        of = areas[cost]
        adding = sorted(of["arms"].items(), key=lambda one: (-one[1]["adds"], one[0]))
        said = [
            f"{arm} {gain(one['adds'])} ({one['probability']:.2f})" for arm, one in adding if one["adds"] > 0
        ]
        cells = [
            Cell(gain(of["value"]), of["value"], extra=f"({gain(of['low'])}–{gain(of['high'])})"),
            Cell(", ".join(said[:ADDING]) or "–", len(said)),
        ]
        rows.append(Row(titles[cost], cells))
    unit = "points" if scale.is_share else "of the metric"
    columns = [
        Column("What is paid", True),
        Column(f"Hypervolume, {unit}", falls=True),
        Column("What each arm adds", True),
    ]
    return Table(
        "Hypervolume of the front, with its interval; what the front loses without an arm", columns, rows
    )


def fronts_table(
    page: Published, fronts: Mapping[str, Mapping[str, float]], titles: Mapping[str, str]
) -> Table:
    """The probability of each arm to be on the front, by price."""
    shown = [cost for cost in titles if cost in fronts]
    rows = []
    for arm in page.arms:
        name = arm["arm"]
        cells = [number(fronts[cost].get(name), lambda value: f"{value:.2f}") for cost in shown]
        rows.append(Row(name, cells, name, kind_of(page, name)))
    columns = [
        Column("Arm", True),
        *(Column(titles[cost], is_minor=place >= 4, falls=True) for place, cost in enumerate(shown)),
    ]
    return Table("Probability of being on the front, by what is paid", columns, rows)
