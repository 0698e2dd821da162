"""Train, validation and test: cut by a rule that needs no stored index, copies kept on one side.

Rows are ordered by the SHA-1 of their text; test is taken first, then validation, the rest is train. Rows
with nearly the same text, or of one group (a book, a document), move together, so that nothing is tested that
was trained on.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from veneer.data._report import DataReport
from veneer.errors import BadOption

SPLITS = ("train", "validation", "test")
SHARE, MOST = 0.1, 1000  # of validation and of test, where nobody says otherwise
_MARKS = re.compile(r"[\W_]+")


@dataclass
class Splits:
    """Rows as plain dicts under the names of roles; `labels` are the names of classes or tags, in order.

    columns: {role: column of the source}. report: what the check found.
    """

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    task: str
    columns: dict[str, Any]
    labels: list[str] = field(default_factory=list)
    report: DataReport | None = None
    spec: str = ""

    @property
    def parts(self) -> dict[str, list[dict[str, Any]]]:
        """{split: rows} of the three."""
        return {name: getattr(self, name) for name in SPLITS}

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.parts.values())

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {len(rows):,}" for name, rows in self.parts.items())
        labels = f", {len(self.labels)} labels" if self.labels else ""
        return f"Splits({self.spec}: {self.task}, {counts}{labels})"


def near(text: str) -> str:
    """A key that nearly identical texts share: case, punctuation, blanks and forms of letters do not count.

    A text of one word (a sequence, a formula) is its own key, since case has a meaning there.
    """
    if len(text.split()) < 2:
        return text.strip()
    return _MARKS.sub("", unicodedata.normalize("NFKC", text).casefold()) or text.strip()


def parse_sizes(sizes: str | Mapping[str, float] | tuple[float, float] | None) -> dict[str, float]:
    """{"validation", "test"}: counts, or shares below 1; from "validation=500,test=0.1" or (500, 0.1) too."""
    if sizes is None:
        return {}
    if isinstance(sizes, str):
        pairs = [part.partition("=") for part in sizes.split(",") if part.strip()]
        try:
            sizes = {name.strip(): float(value) for name, _, value in pairs}
        except ValueError:
            raise BadOption(
                f"sizes={sizes!r} is not of the form validation=500,test=0.1.",
                next_step="sizes='validation=500,test=0.1'",
            ) from None
    elif not isinstance(sizes, Mapping):
        sizes = dict(zip(("validation", "test"), sizes))
    for name, value in sizes.items():
        if name not in ("validation", "test") or not (isinstance(value, (int, float)) and value >= 0):
            raise BadOption(
                f"sizes: {name}={value!r}; expected a count, or a share below 1, of validation and test.",
                next_step="sizes='validation=500,test=0.1'",
            )
    return dict(sizes)


def cut(texts: list[str], groups: list[Any] | None, sizes: Mapping[str, float]) -> list[str]:
    """The split of each of some rows, by their texts or, where given, their groups; "" for rows to leave out.

    A bundle that does not fit into what is left of a split goes on to the next one, so counts are met exactly
    where single rows are there. Left out are rows of one group that copy a row on the other side: to move
    both groups together would chain whole books through one common sentence.
    """
    keys = [near(text) for text in texts] if groups is None else [str(group) for group in groups]
    bundles: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        bundles.setdefault(key, []).append(row)
    names = {
        key: min(sha1(texts[r] if groups is None else key) for r in rows) for key, rows in bundles.items()
    }
    left = [bundles[key] for key in sorted(bundles, key=lambda key: names[key])]
    where = ["train"] * len(texts)
    for split in ("test", "validation"):
        taken, left = _take(left, _count(sizes.get(split), len(texts)))
        for row in (row for rows in taken for row in rows):
            where[row] = split
    return where if groups is None else _without_copies(texts, where)


def _take(bundles: list[list[int]], wanted: int) -> tuple[list[list[int]], list[list[int]]]:
    """(taken, left): bundles in order while they fit; the smallest where none fits; never all of them."""
    taken: list[list[int]] = []
    left: list[list[int]] = []
    filled = 0
    for rows in bundles:
        fits = filled + len(rows) <= wanted
        (taken if fits else left).append(rows)
        filled += len(rows) * fits
    if wanted and not taken and len(left) > 1:
        taken = [min(left, key=len)]
        left = [rows for rows in left if rows is not taken[0]]
    return (taken, left) if left else ([], bundles)


def _without_copies(texts: list[str], where: list[str]) -> list[str]:
    """Test keeps its rows; a copy of one of them is left out of validation and train, and so on."""
    seen: dict[str, str] = {}
    for split in ("test", "validation", "train"):
        for row, text in enumerate(texts):
            if where[row] == split and seen.setdefault(near(text), split) != split:
                where[row] = ""
    return where


def sha1(text: str) -> str:
    return hashlib.sha1(text.encode("utf-8", "surrogatepass")).hexdigest()


def _count(size: float | None, rows: int) -> int:
    if size is None:
        return max(1, min(round(SHARE * rows), MOST)) if rows >= 3 else 0
    return max(1, round(size * rows)) if 0 < size < 1 else int(size)
