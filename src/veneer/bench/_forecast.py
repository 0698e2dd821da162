"""The forecast of `veneer plan` beside the measured peak of a training step, of ten methods on each builtin base.

A child process a base trains two steps of each method by `train`, on rows of one length. Measured is the high-water
mark of its memory above what it held before that method's base was opened, libraries loaded and used before.
"""

from __future__ import annotations

import gc
import json
import random
import sys
from dataclasses import asdict
from typing import Any

import torch

from ._report import Expectation, Row
from ._size import Size
from ._training import in_child, resident, trim

NEAR = Expectation.at_most(1.15, "Buffers of the libraries, and what the heap keeps, are no tensors.")
LENGTH = 64
# base -> task, rows of a step, methods
CASES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "builtin:minilm": (
        "classify", 16,
        ("lora", "dora", "ia3", "bitfit", "pfeiffer_adapter", "loreft", "vera", "ssf", "norm_tuning", "full"),
    ),
    "builtin:smollm2": (
        "instruct", 8,
        ("lora", "dora", "ia3", "prefix_tuning", "serial_adapter", "loreft", "vera", "ssf", "norm_tuning", "oft"),
    ),
}  # fmt: skip
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
]


def forecast(size: Size) -> list[Row]:
    return [row for base in CASES for row in _rows(base, size)]


def _rows(base: str, size: Size) -> list[Row]:
    made = []
    for found in in_child(child, {"base": base, "size": asdict(size)}, f"measures steps on {base}"):
        said, seen = float(found["forecast"]), float(found["measured"])
        words = f"forecast {said / 2**20:.0f} MiB, measured {seen / 2**20:.0f} MiB: {said / seen - 1:+.0%}"
        made.append(
            Row.of(
                "forecast", f"{found['method']}, {base}, {found['rows']} x {found['tokens']}, larger over smaller",
                [max(said, seen)], [min(said, seen)], unit="bytes", reference="forecast and peak",
                expected=size.expects(NEAR), notes=[f"{found['method']}, {base}: {words}"],
            )
        )  # fmt: skip
    return made


def child() -> None:
    """Read one job from standard input; print what each method's step was said to take, and took."""
    job = json.loads(sys.stdin.read())
    torch.set_num_threads(1)
    task, rows, methods = CASES[job["base"]]
    if job["size"]["toy"]:
        rows, methods = 2, methods[:2]
    _measured(job["base"], task, methods[0], 2)  # the libraries load what they load at a first run
    found = [_measured(job["base"], task, method, rows) for method in methods]
    print(json.dumps(found))


def _measured(base: str, task: str, method: str, rows: int) -> dict[str, Any]:
    import veneer
    from veneer.training import Hooks, train
    from veneer.training.forecast import step_memory

    seen: dict[str, int] = {}

    class Look(Hooks):
        def between_steps(self, run: Any, step: int) -> None:
            if (
                step == 0
            ):  # a mapped file: what no token asked for of a table would be missing from the measure
                for p in run.model.parameters():
                    p.detach().sum()
            seen["tokens"] = max(f["length"] for f in run.rows)
            seen["peak"] = resident(peak=True)

    gc.collect()
    trim()
    before = resident(anew=True)
    train(
        model=base, data=_data(task, rows), method=method, task=task, batch_size=rows, max_steps=2, evaluate_on=(),
        hooks=[Look()], progress=False, device="cpu", learning_rate=1e-4,
    )  # fmt: skip
    options = {"num_labels": 2} if task == "classify" else {}
    opened = veneer.open_base(base, task=task, **options)
    parts = step_memory(opened.model, method, rows=rows, length=seen["tokens"])
    return {
        "method": method, "rows": rows, "tokens": seen["tokens"], "forecast": parts["total"], "parts": parts,
        "measured": seen["peak"] - before,
    }  # fmt: skip


def _data(task: str, rows: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of one length, of words that are one token each."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    def row(i: int) -> dict[str, Any]:
        if task == "classify":
            return {"text": text(LENGTH - 2), "label": i % 2}
        half = LENGTH // 2 - 12
        return {
            "messages": [
                {"role": "user", "content": text(half)},
                {"role": "assistant", "content": text(half)},
            ]
        }

    made = [row(i) for i in range(2 * rows + 4)]
    return {"train": made[:-4], "validation": made[-4:-2], "test": made[-2:]}
