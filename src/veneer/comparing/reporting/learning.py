"""Learning curves in the report: loss against steps and seconds, and how long each arm takes to a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veneer.comparing.reporting import curves, tables
from veneer.comparing.reporting.axes import Quantity
from veneer.comparing.reporting.published import Published
from veneer.comparing.running import history


def section(page: Published, costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the report says: curves against steps and seconds, and the time to a target that all tied arms reach.

    The target is on the validation metric where it was measured while training, else on the loss of training.
    """
    losses = {arm: history.mean_curve(runs) for arm, runs in page.histories.items()}
    looked = {arm: history.validation_curve(runs) for arm, runs in page.histories.items()}
    by_metric = all(len(curve) > 1 for curve in looked.values())
    judged, falls = (looked, not page.metric_rises) if by_metric else (losses, True)
    tied = [arm["arm"] for arm in page.arms if arm["tied_with_best"] and arm["arm"] in judged]
    target = history.common_target(judged, tied or list(judged), falls)
    kinds = {arm: tables.kind_of(page, arm) for arm in losses}
    step = {arm: costs[arm]["step_seconds"] for arm in losses if costs[arm].get("step_seconds")}
    name = page.summary["metric"].replace("_", " ") if by_metric else "training loss"
    up = Quantity.of(name, by_metric and page.metric_in_percent)
    upwards = not (by_metric and falls)
    timed = {arm: [(at * step[arm], value) for at, value in judged[arm]] for arm in judged if arm in step}
    found = [
        curves.lines(
            judged, kinds, Quantity("steps", lambda value: f"{value:g}"), up,
            f"{name} against steps, mean over seeds, of {len(judged)} arms; the table below says when each reached "
            "the target.", upwards=upwards, level=target,
        )
    ]  # fmt: skip
    if timed:
        found.append(
            curves.lines(
                timed, kinds, Quantity("seconds of training", lambda value: f"{value:.3g}"), up,
                f"{name} against seconds of training, mean over seeds, of {len(timed)} arms.", upwards=upwards,
                level=target, names_worse=False,
            )
        )  # fmt: skip
    return {
        "charts": found,
        "by_metric": by_metric,
        "name": name,
        "target": None if target is None else up.text(target),
        "table": None if target is None else _target_table(page, judged, target, falls, step, up.text),
    }


def _target_table(
    page: Published,
    judged: Mapping[str, Sequence[tuple[int, float]]],
    target: float,
    falls: bool,
    step: Mapping[str, float],
    text: Callable[[float], str],
) -> tables.Table:
    rows = []
    for arm, curve in judged.items():
        at = history.first_reached(curve, target, falls)
        seconds = None if at is None or arm not in step else at * step[arm]
        never = tables.Cell("never", float("1e99"), True)
        cells = [
            tables.number(curve[-1][1], text),
            never if at is None else tables.Cell(str(at), at),
            tables.number(None if at is None else at / curve[-1][0], lambda value: f"{100 * value:.0f} %"),
            never if at is None else tables.number(seconds, tables.seconds_text),
        ]
        rows.append(tables.Row(arm, cells, arm, tables.kind_of(page, arm)))
    columns = [
        tables.Column("Arm", True),
        tables.Column("At the end", falls=not falls),
        tables.Column("Steps to target"),
        tables.Column("Of its steps", is_minor=True),
        tables.Column("Time to target"),
    ]
    return tables.Table("When each arm reached the target", columns, rows)
