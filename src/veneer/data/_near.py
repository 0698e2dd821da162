"""Near-duplicates between splits: found, counted, and taken out of what is trained on, never out of the test.

Two texts are near when the sets of their shingles (runs of five characters, case and marks apart) overlap: at least
`threshold` of their union is common (Jaccard; Broder, 1997, "On the resemblance and containment of documents"). The
search is exact: texts that overlap so far share one of their rarest shingles (prefix filtering; Bayardo et al., 2007,
"Scaling up all pairs similarity search"), so that only few pairs are compared. Shingles of more than a tenth of all
rows are boilerplate (a prompt that all rows begin with) and do not count. Texts of one word (sequences, formulas),
pictures and sounds are compared as wholes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from veneer.data._measures import text_of
from veneer.data._splits import Splits, near
from veneer.errors import BadData

SHINGLE, BOILERPLATE, HASHES = 5, 0.1, 2**20
WHOLE = ("qa", "vqa", "image-classify", "speech")  # a context that questions share is no copy
CHUNK = 4096
THRESHOLD = 0.8


@dataclass(frozen=True)
class NearCopies:
    """How many rows were taken out of train and validation, how many of these were equal but for case and marks."""

    train: int = 0
    validation: int = 0
    equal: int = 0
    threshold: float = THRESHOLD
    example: tuple[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "example"}

    def __str__(self) -> str:
        if not self.train + self.validation:
            return f"no row of train or validation is a near-duplicate (overlap {self.threshold:g}) of a held-out one"
        found = (
            f"left out as near-duplicates (overlap {self.threshold:g}) of held-out rows: {self.train} of train, "
            f"{self.validation} of validation, {self.equal} of them equal but for case and marks"
        )
        if self.example is None:
            return found
        return found + f"; for example {self.example[0]!r:.80} of {self.example[1]!r:.80}"


def without_near_copies(splits: Splits, threshold: float = THRESHOLD) -> tuple[Splits, NearCopies]:
    """The splits without training rows that are near a validation or test row, and validation rows near a test row.

    threshold: 1 takes out equal texts alone. Errors: BadData where more than half of the training rows would go.
    """
    texts = {name: [text_of(row, splits.task) for row in rows] for name, rows in splits.parts.items()}
    by_shingle = threshold < 1 and splits.task not in WHOLE
    held = _near_of(texts["validation"], texts["test"], threshold if by_shingle else None)
    kept = [text for text, found in zip(texts["validation"], held) if found is None]
    learned = _near_of(texts["train"], [*texts["test"], *kept], threshold if by_shingle else None)
    gone = [(a, b) for name, found in (("train", learned), ("validation", held))
            for a, b in zip(texts[name], found) if b is not None]  # fmt: skip
    result = NearCopies(
        sum(found is not None for found in learned), sum(found is not None for found in held),
        sum(near(a) == near(b) for a, b in gone), threshold, gone[0] if gone else None,
    )  # fmt: skip
    if 2 * result.train > len(splits.train):
        raise BadData(
            f"{result.train:,} of {len(splits.train):,} training rows are near-duplicates of held-out rows: {result}.",
            next_step="another test set, a group= column that keeps copies together, or near_duplicates=1 for equal "
            "texts alone",
        )
    train = [row for row, found in zip(splits.train, learned) if found is None]
    validation = [row for row, found in zip(splits.validation, held) if found is None]
    return replace(splits, train=train, validation=validation), result


def _near_of(texts: Sequence[str], held: Sequence[str], threshold: float | None) -> list[str | None]:
    """For each text a held-out one that it is near to, or None."""
    keys = {near(text): text for text in held}
    found = [keys.get(near(text)) for text in texts]
    if threshold is None:
        return found
    ours = [at for at, text in enumerate(texts) if found[at] is None and len(text.split()) > 1]
    theirs = [at for at, text in enumerate(held) if len(text.split()) > 1]
    if ours and theirs:
        for a, b in _pairs([near(texts[at]) for at in ours], [near(held[at]) for at in theirs], threshold):
            found[ours[a]] = held[theirs[b]]
    return found


def _pairs(first: list[str], second: list[str], threshold: float) -> list[tuple[int, int]]:
    """Places (in first, in second) of texts whose shingles overlap by `threshold`."""
    from sklearn.feature_extraction.text import HashingVectorizer

    shingles = HashingVectorizer(
        analyzer="char", ngram_range=(SHINGLE, SHINGLE), binary=True, norm=None, alternate_sign=False,
        lowercase=False, n_features=HASHES, dtype=np.float32,
    )  # fmt: skip
    A, B = shingles.transform(first), shingles.transform(second)
    rows_with = np.asarray(A.sum(0) + B.sum(0)).ravel()
    rare = rows_with <= max(10.0, BOILERPLATE * (len(first) + len(second)))
    A, B = _only(A, rare[A.indices]), _only(B, rare[B.indices])
    sizes = [np.diff(matrix.indptr) for matrix in (A, B)]
    heads = [_rarest(matrix, rows_with, threshold) for matrix in (A, B)]
    found = []
    for start in range(0, len(first), CHUNK):
        candidates = (heads[0][start : start + CHUNK] @ heads[1].T).tocoo()
        rows, columns = candidates.row + start, candidates.col
        for at in range(0, len(rows), 16 * CHUNK):
            a, b = rows[at : at + 16 * CHUNK], columns[at : at + 16 * CHUNK]
            common = np.asarray(A[a].multiply(B[b]).sum(1)).ravel()
            overlap = common / (sizes[0][a] + sizes[1][b] - common)
            found += [(int(i), int(j)) for i, j in zip(a[overlap >= threshold], b[overlap >= threshold])]
    return found


def _only(matrix: Any, keep: Any) -> Any:
    """The sparse matrix with the stored entries where `keep` is True."""
    from scipy.sparse import csr_matrix

    before = np.concatenate([[0], np.cumsum(keep)])
    return csr_matrix((matrix.data[keep], matrix.indices[keep], before[matrix.indptr]), shape=matrix.shape)


def _rarest(matrix: Any, rows_with: Any, threshold: float) -> Any:
    """Of each row's n shingles the n - ceil(threshold n) + 1 rarest: rows that overlap share one of these."""
    sizes = np.diff(matrix.indptr)
    rows = np.repeat(np.arange(matrix.shape[0]), sizes)
    order = np.lexsort((matrix.indices, rows_with[matrix.indices], rows))
    matrix.indices, matrix.data = matrix.indices[order], matrix.data[order]
    place = np.arange(len(rows)) - matrix.indptr[rows]
    return _only(matrix, place < (sizes - np.ceil(threshold * sizes - 1e-9) + 1)[rows])
