"""Training for a given time: the number of steps follows from the clock, and the schedule with it.

Behind every step the number of all steps is set to what the time will hold at the pace so far. A schedule is a
function of the part that is done, so it reaches its end when the time does, whatever a step costs.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from veneer.training._schedule import warmup_steps
from veneer.training.hooks import Change, Hooks, Phase

if TYPE_CHECKING:
    from veneer.training._loop import Run


class TimeLimit(Hooks):
    """Ends training behind the first step that fills `seconds`; looks at validation rows do not count."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def phases(self, run: Run) -> tuple[Phase, ...]:
        """Where a run begins, or goes on: how many steps there will be, as far as is known."""
        if run.step_now:
            self._set(run, run.step_now, run.seconds)
        return ()

    def between_steps(self, run: Run, step: int) -> Change:
        if step:
            self._set(run, step, run.seconds + time.perf_counter() - run.began)
        return "unchanged"

    def _set(self, run: Run, step: int, spent: float) -> None:
        done = spent / self.seconds
        run.total_steps = step if done >= 1 else max(step + 1, math.ceil(step / done))
        run.warmup = warmup_steps(run.settings.warmup, run.total_steps)
