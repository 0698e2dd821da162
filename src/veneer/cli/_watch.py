"""What a person sees while a comparison runs: one bar in a terminal, lines elsewhere, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from veneer.cli._common import say
from veneer.comparing.planning.forecast import duration


class Watch:
    """The `progress` of compare. A context: leaving it takes the bar away.

    finished: how many runs have ended, where that is more than have been reported.
    """

    def __init__(self, finished: Callable[[], int] | None = None) -> None:
        self.began, self.finished = time.monotonic(), finished
        self.first: int | None = None
        self.bar: Any = None
        self.row: Any = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, event: Any) -> None:
        if not event.of:
            (self.bar.console.print if self.bar is not None else say)(event.message)
            return
        if self.first is None or event.done <= self.first:  # the next of several comparisons begins to count
            self.first, self.began = event.done - 1, time.monotonic()  # these were there before
        left = self.left(event)
        if not sys.stderr.isatty():
            say(f"[{event.done}/{event.of}] {event.message}{left and f'  (about {left} left)'}")
            return
        if self.bar is None:
            self._open(event.of)
        self.bar.update(self.row, total=event.of, completed=event.done, shown=event.message, left=left)

    def left(self, event: Any) -> str:
        """The time that is left, from all that has ended since this began."""
        done = (self.finished() if self.finished is not None else 0) or event.done - (self.first or 0)
        if done < 4:
            return ""
        rest = max(0, event.of - (self.first or 0) - done)
        return duration((time.monotonic() - self.began) / done * rest)

    def _open(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.bar = Progress(
            MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[shown]}", markup=False), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.row = self.bar.add_task("", total=total, shown="", left="")
        self.bar.start()
