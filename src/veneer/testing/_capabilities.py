"""The capability table: for each method which laws it claims, of those that could be claimed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.edits import build, registry

from . import laws as _laws  # noqa: F401  (registers them)
from ._law import LAWS, chosen
from ._report import DOES_NOT_APPLY, FAILED, NOT_CLAIMED, PASSED, LawReport

CLAIMED = "claimed"
_MARKS = {
    PASSED: "yes",
    CLAIMED: "claims",
    FAILED: "**fails**",
    NOT_CLAIMED: "no",
    DOES_NOT_APPLY: "-",
    "": "-",
}


@dataclass
class Capabilities:
    """method -> law -> status ("claimed" where laws were not run), and why something is not claimed."""

    cells: dict[str, dict[str, str]] = field(default_factory=dict)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)

    def score(self, key: str) -> tuple[int, int]:
        """(claimed, possible) laws of a method."""
        cells = [c for c in self.cells[key].values() if c not in (DOES_NOT_APPLY, "")]
        return sum(c in (PASSED, CLAIMED) for c in cells), len(cells)

    def to_dict(self) -> dict[str, Any]:
        return {
            key: {"laws": cells, "claimed": self.score(key)[0], "possible": self.score(key)[1],
                  "reasons": self.reasons.get(key, {})}
            for key, cells in self.cells.items()
        }  # fmt: skip

    def markdown(self) -> str:
        """A table for the docs, and below it a line for each law that a method does not claim."""
        names = [each.name for each in chosen(None)]
        lines = ["| method | " + " | ".join(names) + " | claimed |", "|---" * (len(names) + 2) + "|"]
        for key, cells in self.cells.items():
            marks = " | ".join(_MARKS[cells.get(n, "")] for n in names)
            lines.append(f"| {key} | {marks} | {'{} of {}'.format(*self.score(key))} |")
        notes = [
            f"- {key}, {law}: {why}" for key, found in self.reasons.items() for law, why in found.items()
        ]
        return "\n".join([*lines, "", *notes]).rstrip() + "\n"

    __str__ = markdown


def capabilities(
    reports: Iterable[LawReport] | None = None, methods: Sequence[Any] | None = None
) -> Capabilities:
    """The table of these reports; without them, of what methods (default: all) claim, laws not run."""
    table = Capabilities()
    if reports is not None:
        for r in reports:
            table.cells[r.method] = {name: r.of(name) for name in LAWS if r.of(name)}
            table.reasons[r.method] = {
                row.law: row.detail for row in r.rows
                if row.status == NOT_CLAIMED and r.of(row.law) == NOT_CLAIMED
            }  # fmt: skip
        return table
    for what in list(registry()) if methods is None else methods:
        made = build(what)
        declined = _declined(made)
        table.cells[made.key] = {
            name: NOT_CLAIMED if name in declined else CLAIMED for name in LAWS if _possible(name, made)
        }
        table.reasons[made.key] = {n: why for n, why in declined.items() if n in table.cells[made.key]}
    return table


def _declined(made: Any) -> dict[str, str]:
    """law -> why it is not claimed, from what the method declares."""
    facts = made.facts
    by_number = {str(each.number): each.name for each in LAWS.values()}
    found = {by_number.get(str(name), str(name)): why for name, why in facts.not_claimed}
    if not facts.starts_as_identity:
        found["identity"] = facts.reason
    if not _merges(made):
        found.setdefault(
            "merge", facts.reason if facts.mergeable is False and facts.reason else "it depends on the input"
        )
    return found


def _merges(made: Any) -> bool:
    if made.facts.mergeable is not None:
        return made.facts.mergeable
    return bool(made.ports) and all(
        p == "weight" or (p in ("input", "output") and "affine" in made.arguments) for p in made.ports
    )


def _possible(name: str, made: Any) -> bool:
    """Whether a law says anything about a method: one written in one form has nothing to compare."""
    return name != "one_form" or (
        "branch" in made.arguments and bool({"delta", "weight"} & set(made.arguments))
    )
