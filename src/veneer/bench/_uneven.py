"""Fine-tuning on real text of uneven length, an epoch of the same rows: veneer's loop against transformers' Trainer.

The Trainer trains HF PEFT's LoRA of the same size as its documentation shows it (padded batches in random order), and
at its best: grouped by length, and under bfloat16 autocast. veneer trains with plain products, packed ones (equal to
the sixth digit) and bfloat16 ones. All sides have the same base, rows, batch size, rate, schedule and optimiser, not
the same draws, so each row says the validation score that either ended with. Timed are the steps, from the first to
the last, in process CPU time, without what a form does once before them (its copies, its error on eight rows); the
peak is of the memory above what was resident before them; a child process a side.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

import torch

from veneer.training import Hooks, train

from . import _peer
from ._report import Expectation, Row
from ._size import Size
from ._training import in_child, resident, trim

RATE = 1e-3
SHARED = "Where nothing is padded, the products with the real tokens are left, forth and back, which both sides pay."
MEMORY = Expectation.at_most(0.70, SHARED)
# case -> base, data, rows, validation rows, batch size, column of the score, expected of each form over random order
CASES: dict[str, tuple[str, str, int, int, int, str, float]] = {
    "classify": ("builtin:minilm", "builtin:movie-sentences", 256, 200, 16, "accuracy", 0.45),
    "instruct": ("builtin:smollm2", "builtin:dialog", 32, 16, 8, "loss", 0.30),
}
FORMS = ("plain", "packed", "bf16")
# side of HF -> how its rows are ordered, whether autocast, and its words
SIDES = {
    "random": ("random", False, "padded, random order"),
    "grouped": ("group_by_length", False, "padded, grouped by length"),
    "best": ("group_by_length", True, "grouped by length, bf16 autocast"),
}


def uneven(size: Size) -> list[Row]:
    """A child process a side and repeat: what one side leaves in memory, and in caches, is not the next one's."""
    return [row for task in CASES for row in _rows(task, size)]


def _rows(task: str, size: Size) -> list[Row]:
    sides = [*FORMS, *SIDES]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for repeat in range(1 if size.toy else min(3, size.repeats)):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            job = {"task": task, "side": side, "repeat": repeat, "size": asdict(size)}
            found[side].append(in_child(child, job, f"trains {task}, {side},"))
    base, data, count, _, _, score, least = CASES[task]

    def of(side: str, what: str) -> list[float]:
        return [one[what] for one in found[side]]

    made = []
    for form in FORMS:
        for side, (_, _, words) in SIDES.items():
            ours, theirs = statistics.mean(of(form, "score")), statistics.mean(of(side, "score"))
            made.append(
                Row.of(
                    "uneven",
                    f"{base}, {data}, LoRA q,v r8, {count} rows, {form}",
                    of(form, "seconds"),
                    of(side, "seconds"),
                    reference=f"Trainer, {words}",
                    expected=size.expects(Expectation.at_most(least, SHARED) if side == "random" else None),
                    notes=[f"against the Trainer, {words}: {score} {ours:.4f} against {theirs:.4f}"],
                )
            )
    for form in FORMS:
        made.append(
            Row.of(
                "uneven",
                f"{base}, {data}, peak memory, {form}",
                of(form, "peak"),
                of("random", "peak"),
                unit="bytes",
                reference=f"Trainer, {SIDES['random'][2]}",
                expected=size.expects(MEMORY if form == "plain" else None),
            )
        )
    return made


def child() -> None:
    """Read one job from standard input; print what its steps took, the peak above their start, and the score."""
    job = json.loads(sys.stdin.read())
    torch.set_num_threads(1)
    size = Size(**{**job["size"], "adapters": tuple(job["size"]["adapters"])})
    with _peer.undisturbed():
        if job["side"] in FORMS:
            clock, score = _ours(job["task"], job["side"], job["repeat"], size)
        else:
            clock, score = _theirs(job["task"], job["side"], job["repeat"], size)
    print(json.dumps({"seconds": clock.seconds, "peak": clock.peak, "score": score}))


class Clock:
    """Process CPU time and the peak of memory from `begin` to `end`."""

    def begin(self) -> None:
        gc.collect()
        trim()
        self._before = resident(anew=True)
        self._began = time.process_time()

    def end(self) -> None:
        self.seconds = time.process_time() - self._began
        self.peak = resident(peak=True) - self._before


class Steps(Hooks):
    """A clock over a run's steps, its look at the first padded batch included."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def between_steps(self, run: Any, step: int) -> None:
        if step == 0:
            self.clock.begin()
        else:
            self.clock.end()


def _splits(task: str, size: Size) -> Any:
    from veneer import data

    _, source, count, judged, batch_size, *_ = CASES[task]
    rows: Any = data.read(source)
    few = 2 * batch_size
    rows.train = rows.train[: few if size.toy else count]
    rows.validation, rows.test = rows.validation[: few if size.toy else judged], []
    return rows


def _ours(task: str, form: str, seed: int, size: Size) -> tuple[Clock, float]:
    base, _, _, _, batch_size, score, *_ = CASES[task]
    clock = Clock()
    result = train(
        model=base, data=_splits(task, size), method="lora:rank=8", task=task, epochs=1, batch_size=batch_size,
        learning_rate=RATE, seed=seed, hooks=[Steps(clock)], progress=False, device="cpu", matmul=form,
    )  # fmt: skip
    return clock, result.metrics["validation"][score]


def _theirs(task: str, side: str, seed: int, size: Size) -> tuple[Clock, float]:
    import transformers

    from veneer.bases import open_base
    from veneer.tasks import find_task
    from veneer.training._evaluate import predictions_of

    name, _, _, _, batch_size, score, *_ = CASES[task]
    order, half, _ = SIDES[side]
    splits = _splits(task, size)
    made = find_task(task).from_rows(splits.train)
    options: dict[str, Any] = {"num_labels": made.num_labels} if task == "classify" else {}
    base = open_base(name, task=task, **options)
    encoded = made.encode(splits.train, base.tokenizer, base.model)
    kind = {"task_type": "SEQ_CLS"} if task == "classify" else {"task_type": "CAUSAL_LM"}
    targets = ["query", "value"] if task == "classify" else ["q_proj", "v_proj"]
    model = _peer.adapted(base.model, _peer.lora(targets, 8, **kind))
    features = [_feature(f) for f in encoded.features]
    collator: Any = (
        transformers.DataCollatorWithPadding(base.tokenizer)
        if task == "classify"
        else transformers.DataCollatorForSeq2Seq(base.tokenizer, model=None)
    )
    clock = Clock()

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *given: Any, **more: Any) -> None:
            clock.begin()

        def on_train_end(self, *given: Any, **more: Any) -> None:
            clock.end()

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch_size, num_train_epochs=1, learning_rate=RATE,
            warmup_steps=0.06, weight_decay=0.01, max_grad_norm=1.0, seed=seed, report_to="none",
            save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
            train_sampling_strategy=order, bf16=half, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=features, data_collator=collator, callbacks=[Watch()]
        )
        trainer.train()
    judged = made.encode(splits.validation, base.tokenizer, base.model)
    predicted = predictions_of(base.model, made, judged, base.tokenizer)
    return clock, made.metrics(predicted)[score]


def _feature(feature: dict[str, Any]) -> dict[str, Any]:
    """As the Trainer's collators take it."""
    labels = feature.get("labels", feature.get("label"))
    return {
        "input_ids": feature["input_ids"],
        "attention_mask": [1] * len(feature["input_ids"]),
        "labels": labels,
    }
