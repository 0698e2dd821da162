"""What a person sees while a run goes: one live line in a terminal, plain lines elsewhere, on standard
error.
"""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Says nothing. The loop calls these; `progress_for` chooses who listens."""

    def begin(self, total: int, done: int = 0) -> None: ...

    def step(self, step: int, loss: float, rate: float, tokens_per_second: float) -> None: ...

    def note(self, text: str) -> None: ...

    def evaluated(self, step: int, split: str, metrics: dict[str, float]) -> None:
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        self.note(f"step {step}: {split} {shown}")

    def end(self) -> None: ...


class Lines(Progress):
    """A line now and then, for logs and pipes."""

    def __init__(self, every_seconds: float = 5.0, name: str = "") -> None:
        """name: stands before each line, where several runs speak."""
        self.every, self.last, self.total = every_seconds, 0.0, 0
        self.before = f"{name}: " if name else ""

    def begin(self, total: int, done: int = 0) -> None:
        self.total, self.last = total, time.monotonic()

    def step(self, step: int, loss: float, rate: float, tokens_per_second: float) -> None:
        now = time.monotonic()
        if now - self.last >= self.every or step == self.total:
            self.last = now
            self.note(
                f"step {step}/{self.total}  loss {loss:.4f}  rate {rate:.2e}  "
                f"{tokens_per_second:,.0f} tokens/s"
            )

    def note(self, text: str) -> None:
        print(f"{self.before}{text}", file=sys.stderr, flush=True)


class Live(Progress):
    """A bar with loss, rate, speed and the time that is left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.row: Any = None

    def begin(self, total: int, done: int = 0) -> None:
        self.bar.start()
        self.row = self.bar.add_task("train", total=total, completed=done, shown="")

    def step(self, step: int, loss: float, rate: float, tokens_per_second: float) -> None:
        shown = f"loss {loss:.4f}  rate {rate:.1e}  {tokens_per_second:,.0f} tokens/s"
        self.bar.update(self.row, completed=step, shown=shown)

    def note(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False)

    def end(self) -> None:
        self.bar.stop()


def progress_for(wanted: bool | Progress) -> Progress:
    """The listener: given, live in a terminal, lines elsewhere, or none."""
    if isinstance(wanted, Progress):
        return wanted
    if not wanted:
        return Progress()
    if sys.stderr.isatty():
        try:
            return Live()
        except ImportError:
            pass
    return Lines()
