"""What one run has of kept states: when they may be used, when they pay, and for which batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from veneer.tasks import Batch
from veneer.training._kept import Kept, Played, played

if TYPE_CHECKING:
    from veneer.training._loop import Run

ROWS = "features"  # of a batch's extra: the rows that it was made of


class FrozenPart:
    """The part of the base that a run cannot change. tables: None until someone gives some."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.tables: Kept | None = None
        self.shares = False  # whether others read the same rows of the same base
        self._views: dict[str, Any] = {}

    def of(self, batch: Batch) -> Played | None:
        """What is kept of a training batch; None where nothing is, where it would not pay, or the base draws."""
        run = self.run
        # States are computed a chunk of rows at a time: a small part of a large set would compute most for nothing.
        often = run.total_steps > run.steps_an_epoch / (2 if self.shares else 1)
        if self.tables is None or not often or not self._still():
            return None
        return self._kept("train", batch.extra[ROWS], batch)

    def behind(self, batch: Batch) -> Any:
        """A context in which the model begins behind what is kept of a training batch."""
        return played(self.run.model, self.of(batch))

    def around(self, split: str) -> Any:
        """(rows, batch) -> the same for rows that are looked at more than once; None where they are not."""
        run = self.run
        looks = run.settings.evaluate_every is not None or run.settings.early_stopping is not None
        if self.tables is None or not (self.shares or looks) or run.task.generates:
            return None
        return lambda rows, batch: played(run.model, self._kept(split, rows, batch))

    def _still(self) -> bool:
        from veneer import engine

        return not self.run.settings.base_dropout or engine.is_still(self.run.model)

    def _kept(self, split: str, rows: Sequence[dict[str, Any]], batch: Batch) -> Played | None:
        name = getattr(self.run.subject, "name", None)
        if self.tables is None or name is None:
            return None
        if split not in self._views:
            run = self.run
            self._views[split] = self.tables.view(name, run.encoded[split], run.task, run.feeder)
        view = self._views[split]
        return None if view is None else view.of(rows, batch)
