"""Real data, to the end: LoRA on builtin:minilm and film reviews over each form, several seeds, on the same items.

The cost is the share of wrong answers on validation rows, and the reference that of plain float32. The difference of
the accuracies has an interval over seeds and items: each item's mean over seeds is one paired observation.
"""

from __future__ import annotations

import statistics
from typing import Any

from veneer.errors import VeneerError
from veneer.training import train

from ._report import Row
from ._size import Size

SEEDS = 3
TRAINED, JUDGED = 600, 600
RATE = 5e-3  # of LoRA's range: in so few steps a smaller one learns little, and forms could not differ
FORMS = ("bf16", "int8")
PLAIN = "plain float32"


def scores(size: Size) -> list[Row]:
    found = {form: [_run(form, seed, size) for seed in range(SEEDS if not size.toy else 1)]
             for form in ("plain", *FORMS)}  # fmt: skip
    rows = []
    for form in FORMS:
        wrong, plain = ([1 - _mean(run) for run in found[f]] for f in (form, "plain"))
        if not all(plain):
            raise VeneerError(
                "plain float32 makes no mistake here: there is nothing to compare.", next_step="more rows"
            )
        low, middle, high = interval(found[form], found["plain"])
        rows.append(Row.of(
            "scores", f"builtin:minilm, LoRA, movie-sentences, {TRAINED} rows, {len(wrong)} seeds, {form}",
            wrong, plain, unit="wrong", reference=PLAIN,
            notes=[f"accuracy {1 - statistics.mean(wrong):.4f} against {1 - statistics.mean(plain):.4f}: "
                   f"{middle:+.4f} [{low:+.4f}, {high:+.4f}], 95 % over items and seeds"],
        ))  # fmt: skip
    return rows


def interval(ours: list[list[float]], theirs: list[list[float]]) -> tuple[float, float, float]:
    """(low, mean, high) of the difference of mean scores: items are drawn again, and seeds with them."""
    items = [statistics.mean(a) - statistics.mean(b) for a, b in zip(zip(*ours), zip(*theirs))]
    seeds = [_mean(a) - _mean(b) for a, b in zip(ours, theirs)]
    of_items = statistics.variance(items) / len(items)
    of_seeds = statistics.variance(seeds) / len(seeds) if len(seeds) > 1 else 0.0
    half = 1.96 * max(of_items, of_seeds) ** 0.5
    middle = statistics.mean(items)
    return middle - half, middle, middle + half


def _mean(run: list[float]) -> float:
    return statistics.mean(run)


def _run(form: str, seed: int, size: Size) -> list[float]:
    """The score of each validation item."""
    from veneer import data

    rows: Any = data.read("builtin:movie-sentences")
    few = 32 if size.toy else TRAINED
    rows.train, rows.validation, rows.test = rows.train[:few], rows.validation[:JUDGED], []
    result = train(model="builtin:minilm", data=rows, method="lora:rank=8", epochs=1 if size.toy else 2, seed=seed,
                   learning_rate=RATE, matmul=form, evaluate_on=("validation",), progress=False,
                   device="cpu")  # fmt: skip
    return [p["score"] for p in result.predictions["validation"]]
