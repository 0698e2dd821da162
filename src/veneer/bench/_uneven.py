"""Fine-tuning on real text of uneven length, an epoch of the same rows: veneer's loop against transformers' Trainer.

The Trainer trains HF PEFT's LoRA of the same size as its documentation shows it: padded batches in random order, and
grouped by length. Both sides have the same base, rows, batch size, rate, schedule and optimiser, not the same draws,
so each row says the validation score that either ended with. Timed are the steps: process CPU time from the first to
the last.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

from veneer.training import Hooks, train

from . import _peer
from ._report import Expectation, Row
from ._size import Size

RATE = 1e-3
SHARED = "Batches of one length have little padding to save."
# case -> base, data, rows, batch size, column of the score, expected over random order and over grouping
CASES: dict[str, tuple[str, str, int, int, str, float | None, float | None]] = {
    "classify": ("builtin:minilm", "builtin:movie-sentences", 512, 16, "accuracy", 0.50, 0.75),
    "instruct": ("builtin:smollm2", "builtin:dialog", 64, 8, "loss", 0.30, None),
}
ORDERS = {"random": "padded, random order", "group_by_length": "padded, grouped by length"}


def uneven(size: Size) -> list[Row]:
    return [row for task in CASES for row in _rows(task, size)]


def _rows(task: str, size: Size) -> list[Row]:
    base, data, count, _, score, *expected = CASES[task]
    spent: dict[str, list[float]] = {}
    scores: dict[str, list[float]] = {}
    for repeat in range(1 if size.toy else min(3, size.repeats)):
        for side in ("veneer", *ORDERS):
            took, value = _ours(task, repeat, size) if side == "veneer" else _theirs(task, side, repeat, size)
            spent.setdefault(side, []).append(took)
            scores.setdefault(side, []).append(value)
    found = []
    for order, least in zip(ORDERS, expected):
        said = f"{score} {statistics.mean(scores['veneer']):.4f} against {statistics.mean(scores[order]):.4f}"
        goal = None if least is None else Expectation.at_most(least, SHARED)
        setting = f"{base}, {data}, LoRA q,v r8, {count} rows, HF {ORDERS[order]}"
        found.append(
            Row.of(
                "uneven", setting, spent["veneer"], spent[order], expected=size.expects(goal), notes=[said]
            )
        )
    return found


class Clock(Hooks):
    """Process CPU time of a run's steps, its look at the first padded batch included."""

    def between_steps(self, run: Any, step: int) -> None:
        if step == 0:
            self.began = time.process_time()
        self.spent = time.process_time() - self.began


def _splits(task: str, size: Size) -> Any:
    from veneer import data

    rows: Any = data.read(CASES[task][1])
    few = 2 * CASES[task][3] if size.toy else CASES[task][2]
    rows.train, rows.validation, rows.test = rows.train[:few], rows.validation[: few if size.toy else 200], []
    return rows


def _ours(task: str, seed: int, size: Size) -> tuple[float, float]:
    base, _, _, batch_size, score, *_ = CASES[task]
    clock = Clock()
    result = train(
        model=base, data=_splits(task, size), method="lora:rank=8", task=task, epochs=1, batch_size=batch_size,
        learning_rate=RATE, seed=seed, hooks=[clock], progress=False, device="cpu",
    )  # fmt: skip
    return clock.spent, result.metrics["validation"][score]


def _theirs(task: str, order: str, seed: int, size: Size) -> tuple[float, float]:
    import transformers

    from veneer.bases import open_base
    from veneer.tasks import find_task
    from veneer.training._evaluate import predictions_of

    name, _, _, batch_size, score, *_ = CASES[task]
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
    spent: list[float] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *given: Any, **more: Any) -> None:
            spent.append(time.process_time())

        def on_train_end(self, *given: Any, **more: Any) -> None:
            spent.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch_size, num_train_epochs=1, learning_rate=RATE,
            warmup_steps=0.06, weight_decay=0.01, max_grad_norm=1.0, seed=seed, report_to="none",
            save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
            train_sampling_strategy=order, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=features, data_collator=collator, callbacks=[Watch()]
        )
        trainer.train()
    judged = made.encode(splits.validation, base.tokenizer, base.model)
    predicted = predictions_of(base.model, made, judged, base.tokenizer)
    return spent[-1] - spent[0], made.metrics(predicted)[score]


def _feature(feature: dict[str, Any]) -> dict[str, Any]:
    """As the Trainer's collators take it."""
    labels = feature.get("labels", feature.get("label"))
    return {
        "input_ids": feature["input_ids"],
        "attention_mask": [1] * len(feature["input_ids"]),
        "labels": labels,
    }
