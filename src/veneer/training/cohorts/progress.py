"""What a person sees of several runs at once: a bar for each in a terminal, named lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from veneer.training._progress import Lines, Live, Progress


def listeners(progress: bool | Progress | Callable[[str], Progress]) -> Callable[[str], Progress]:
    """Who listens to each member, by its name: given, bars in a terminal, lines elsewhere, or none."""
    if isinstance(progress, Progress):
        return lambda name: Named(name, progress)
    if callable(progress):
        return progress
    if not progress:
        return lambda name: Progress()
    if sys.stderr.isatty():
        try:
            bars = Live()
            return lambda name: Bar(name, bars)
        except ImportError:
            pass
    return lambda name: Lines(name=name)


class Named(Progress):
    """One member's words to a listener that hears all of them."""

    def __init__(self, name: str, other: Progress) -> None:
        self.name, self.other = name, other

    def begin(self, total: int, done: int = 0) -> None:
        self.other.begin(total, done)

    def step(self, step: int, loss: float, rate: float, tokens_per_second: float) -> None:
        self.other.step(step, loss, rate, tokens_per_second)

    def note(self, text: str) -> None:
        self.other.note(f"{self.name}: {text}")

    def end(self) -> None:
        self.other.end()


class Bar(Progress):
    """One member's row under the bars of all."""

    running = 0

    def __init__(self, name: str, bars: Live) -> None:
        self.name, self.bars = name, bars
        self.row: Any = None

    def begin(self, total: int, done: int = 0) -> None:
        if not Bar.running:
            self.bars.bar.start()
        Bar.running += 1
        self.row = self.bars.bar.add_task(self.name, total=total, completed=done, shown="")

    def step(self, step: int, loss: float, rate: float, tokens_per_second: float) -> None:
        shown = f"{self.name}  loss {loss:.4f}  rate {rate:.1e}  {tokens_per_second:,.0f} tokens/s"
        self.bars.bar.update(self.row, completed=step, shown=shown)

    def note(self, text: str) -> None:
        self.bars.bar.console.print(f"{self.name}: {text}", markup=False, highlight=False)

    def end(self) -> None:
        if self.row is not None:
            Bar.running -= 1
            self.row = None
            if not Bar.running:
                self.bars.bar.stop()
