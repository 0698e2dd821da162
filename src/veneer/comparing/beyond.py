"""Sections of the report that go beyond one number: rendered where summary.json has them, named where it has not."""

from __future__ import annotations

from typing import Any

from veneer.comparing.published import Published

ABSENT = {
    "groups": "Score by groups of the data: --groups COLUMN.",
    "shifted": "Score on shifted test sets: --shifted DATA.",
    "corrupted": "Score under corruption of the inputs: --corrupt.",
    "calibration": "Calibration: for tasks whose predictions carry probabilities.",
    "forgetting": "Forgetting, measured from the bare base: for tasks for which it is defined.",
}


def parts(page: Published) -> list[dict[str, Any]]:
    """[{"id", "title", "say", "charts", "tables"}] of the sections that are there."""
    return []


def missing(page: Published) -> list[str]:
    """What was not measured, and how it would be."""
    return [text for key, text in ABSENT.items() if not page.summary.get(key)]
