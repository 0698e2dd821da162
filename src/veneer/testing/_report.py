"""What came of laws: a row for each law and base, and what follows from all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PASSED, FAILED, NOT_CLAIMED, DOES_NOT_APPLY = "passed", "failed", "not claimed", "does not apply"


@dataclass(frozen=True)
class LawRow:
    """One law on one base."""

    number: int
    law: str
    base: str
    status: str  # passed, failed, not claimed, does not apply
    detail: str = ""  # passed: how well; failed: what differs; otherwise: the reason
    value: float | None = None  # failed: the number that failed it
    seconds: float = 0.0


@dataclass
class LawReport:
    """All rows of one method. Prints as a table; `.check()` raises where something failed."""

    method: str
    rows: list[LawRow] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # demands on the whole that are not met

    @property
    def failures(self) -> list[LawRow]:
        return [r for r in self.rows if r.status == FAILED]

    @property
    def ok(self) -> bool:
        return not self.failures and not self.missing

    def of(self, law: str) -> str:
        """The law's status over all bases: failed wins, then passed, then not claimed."""
        found = {r.status for r in self.rows if r.law == law}
        return next((s for s in (FAILED, PASSED, NOT_CLAIMED, DOES_NOT_APPLY) if s in found), "")

    def check(self) -> LawReport:
        """Raise AssertionError that lists what failed; return the report otherwise."""
        if not self.ok:
            lines = [f"{self.method} breaks {len(self.failures) + len(self.missing)} laws:"]
            lines += [f"  {r.number} {r.law} on {r.base}: {r.detail}" for r in self.failures]
            lines += [f"  {m}" for m in self.missing]
            raise AssertionError("\n".join(lines))
        return self

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method, "ok": self.ok, "missing": list(self.missing),
            "rows": [asdict(r) for r in self.rows],
        }  # fmt: skip

    def __str__(self) -> str:
        counts = Counter(r.status for r in self.rows)
        head = f"{self.method}: " + ", ".join(f"{n} {s}" for s, n in counts.items())
        lines = [head, f"  {'law':14} {'base':6} {'status':15} detail"]
        for r in self.rows:
            lines.append(f"  {r.number:>2} {r.law:11} {r.base:6} {r.status:15} {_first_line(r.detail)}")
        return "\n".join([*lines, *(f"  {m}" for m in self.missing)])


def _first_line(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= 110 else line[:107] + "..."


def to_json(reports: Sequence[LawReport]) -> dict[str, Any]:
    """Reports of several methods as one document."""
    return {"ok": all(r.ok for r in reports), "methods": [r.to_dict() for r in reports]}
