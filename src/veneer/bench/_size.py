"""How large a run is: the published one, or a toy one that only shows that every case runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """repeats: samples an arm; residents: "the 200th"; children: child processes an arm and memory case."""

    seed: int = 0
    repeats: int = 9
    residents: int = 200
    rows: int = 16
    adapters: tuple[int, ...] = (1, 4, 16)
    children: int = 3
    toy: bool = False

    def expects(self, expected: Any) -> Any:
        """What the project expects holds at the published size."""
        return None if self.toy else expected

    @classmethod
    def small(cls, seed: int = 0) -> Size:
        return cls(seed, repeats=2, residents=3, rows=4, adapters=(1, 2), children=1, toy=True)
