"""Learning rates over the steps: a function of the step alone, so that nothing restarts it."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from veneer.errors import UnknownName, nearest

SCHEDULES = ("linear", "cosine", "constant")


def check_schedule(schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise UnknownName(
            f"no schedule is called {schedule!r}.",
            nearest=nearest(schedule, SCHEDULES) or SCHEDULES,
            next_step=f"schedule= one of {', '.join(SCHEDULES)}",
        )


def warmup_steps(warmup: float, total_steps: int) -> int:
    """A part of all steps where below 1, else their number."""
    return math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)


def rate_factor(schedule: str, step: int, total_steps: int, warmup: int) -> float:
    """What the learning rate is multiplied with at `step` (from 0).

    Rises as (step + 1) / warmup, then falls to 0 at the end: linearly, as half a cosine, or not at all.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def set_rates(optimizer: Optimizer | Any, factor: float) -> None:
    """lr = factor * the group's own rate, which it keeps as `initial_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
