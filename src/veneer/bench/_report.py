"""What a run found: a row a measurement, and whether the project's expectation of it is met."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ._clock import Quartiles


@dataclass(frozen=True)
class Expectation:
    """The reference's cost over veneer's should be at least `least`; `limit` says what stands in the way of more."""

    least: float
    limit: str = ""

    @classmethod
    def at_most(cls, ratio: float, limit: str = "") -> Expectation:
        """The same, said the other way round: veneer's cost is at most this part of the reference's."""
        return cls(1 / ratio, limit)


PEFT = "HF PEFT"


@dataclass
class Row:
    """One measurement. Costs are seconds of process CPU time a call, or bytes; ratio is veneer's over the
    reference's, which is HF PEFT's on the same work unless `reference` names another.
    """

    case: str
    setting: str
    veneer: Quartiles
    peer: Quartiles
    ratio: Quartiles
    unit: str = "s"
    error: float = 0.0  # of the outputs that were compared first
    expected: Expectation | None = None
    notes: list[str] = field(default_factory=list)
    reference: str = PEFT

    @classmethod
    def of(cls, case: str, setting: str, veneer: list[float], peer: list[float], **more: Any) -> Row:
        pairs = [a / b if b else math.inf for a, b in zip(veneer, peer, strict=True)]
        return cls(case, setting, Quartiles.of(veneer), Quartiles.of(peer), Quartiles.of(pairs), **more)

    @property
    def advantage(self) -> float:
        """How many times cheaper veneer is, by the median of the paired ratios."""
        return 1 / self.ratio.median if self.ratio.median else math.inf

    @property
    def over(self) -> str:
        """What the cost is divided by, where that is not HF PEFT's."""
        return "" if self.reference == PEFT else f" / {self.reference}"

    @property
    def met(self) -> bool | None:
        return None if self.expected is None else self.advantage >= self.expected.least

    @property
    def certain(self) -> bool:
        """Whether both quartiles of the ratio are on the same side of the expectation."""
        if self.expected is None or not self.ratio.low:
            return True
        return (1 / self.ratio.high >= self.expected.least) == (1 / self.ratio.low >= self.expected.least)

    @property
    def verdict(self) -> str:
        if self.expected is None:
            return ""
        word = "met" if self.met else "MISSED"
        return f"{word}, at most {1 / self.expected.least:.3g}" + (
            "" if self.certain else " (within the spread)"
        )

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "case": self.case,
            "setting": self.setting,
            "unit": self.unit,
            "veneer": self.veneer.to_dict(),
            "reference": self.reference,
            "reference_cost": self.peer.to_dict(),
            "ratio": self.ratio.to_dict(),
            "times_cheaper": self.advantage,
            "output_error": self.error,
            "expected_ratio": 1 / self.expected.least if self.expected else None,
            "met": self.met,
            "certain": self.certain,
            "notes": self.notes,
        }
        if self.expected and not self.met:
            found["limit"] = self.expected.limit
        return found


@dataclass
class Report:
    """All rows of a run, with what is needed to make it again. Prints as a table; `.to_dict()` for programs."""

    facts: dict[str, Any]
    rows: list[Row]

    @property
    def missed(self) -> list[Row]:
        return [row for row in self.rows if row.met is False]

    def to_dict(self) -> dict[str, Any]:
        return {"facts": self.facts, "rows": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.facts.items()]
        lines += [
            "",
            "Quartiles are of one process; another can differ by more: run it twice before you conclude.",
            "Medians; ratio is veneer's cost over the reference's with its quartiles: below 1 veneer is cheaper.",
            f"{'case':14} {'setting':58} {'veneer':>10} {'reference':>10} {'ratio':>8} {'quartiles':>17}  expectation",
        ]
        for row in self.rows:
            spread = f"{row.ratio.low:.4f} {row.ratio.high:.4f}"
            lines.append(
                f"{row.case:14} {row.setting + row.over:58} {cost(row.veneer.median, row.unit):>10} "
                f"{cost(row.peer.median, row.unit):>10} {row.ratio.median:>8.4f} {spread:>17}  {row.verdict}".rstrip()
            )
            lines += [f"{'':14} {note}" for note in row.notes]
        for row in self.missed:
            assert row.expected is not None
            lines.append(
                f"missed: {row.case}, {row.setting}{row.over}: {row.ratio.median:.3g}, at most "
                f"{1 / row.expected.least:.3g} expected. {row.expected.limit}".rstrip()
            )
        return "\n".join(lines)


def cost(value: float, unit: str) -> str:
    """0.0123 s -> '12.3 ms'; bytes -> MiB."""
    if unit == "bytes":
        return f"{value / 2**20:.1f} MiB"
    if unit == "wrong":
        return f"{100 * value:.2f} %"
    for step, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= step:
            return f"{value / step:.3g} {name}"
    return f"{value / 1e-6:.3g} us"
