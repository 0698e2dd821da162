"""From what a person types to what the loop needs: rows, a task, a base that fits it, a device."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from veneer.errors import BadData, BadOption, Unsupported, missing_package
from veneer.tasks import Encoded, Task, find_task
from veneer.training._seeds import derived

MODALITIES = ("image-classify", "speech")  # fed by a processor, not by a tokenizer


@dataclass
class Rows:
    """Rows by split, the task that they are for, and a digest of them."""

    splits: dict[str, list[dict[str, Any]]]
    task: str
    labels: list[str]
    spec: str

    @functools.cached_property
    def digest(self) -> str:
        """Of all rows in order, so that a run is not resumed on other data."""
        found = hashlib.sha256()
        for split, rows in sorted(self.splits.items()):
            found.update(split.encode())
            for row in rows:
                found.update(json.dumps(row, sort_keys=True, default=_digest_of).encode())
        return found.hexdigest()[:16]


def _digest_of(value: Any) -> str:
    # The text of an array leaves most of it out.
    data = value if isinstance(value, bytes) else getattr(value, "tobytes", repr(value).encode)()
    return hashlib.sha256(data).hexdigest()


def open_rows(data: Any, task: str | None, **options: Any) -> Rows:
    """Splits that are open already, or what `veneer.data.read` reads."""
    from veneer import data as data_room

    if isinstance(data, Rows):
        return data
    if not isinstance(data, data_room.Splits):
        data = data_room.read(data, task=task, **options)
    elif task is not None and task != data.task:
        raise BadOption(
            f"the data was read for the task {data.task!r}, but task={task!r} is asked for.",
            next_step=f"veneer.data.read(..., task={task!r})",
        )
    if not data.train:
        raise BadData(
            f"{data.spec} has no rows to train on.",
            next_step="veneer check DATA    says what became of its rows",
        )
    return Rows(data.parts, data.task, list(data.labels), data.spec)


def task_for(rows: Rows, max_length: int | None, **options: Any) -> Task:
    """The task with the labels of the rows."""
    if max_length is not None:
        options["max_length"] = max_length
    return find_task(rows.task).from_rows(rows.splits["train"], rows.labels or None, **options)


def open_model(
    model: Any, task: Task, *, tokenizer: Any, seed: int, dtype: Any, quantise: str | None, matmul: str | None = None
) -> Any:  # fmt: skip
    """A Base: as given, or opened for the task with a head whose start comes from the seed. matmul: None leaves one
    that is given as it is.
    """
    from veneer.bases import Base, open_base
    from veneer.bases.matmul import set_matmul

    if isinstance(model, (str, Path)):
        return open_base(
            str(model), task=task.name, num_labels=task.num_labels, dtype=dtype, quantise=quantise,
            matmul=matmul, seed=derived(seed, "head"),
        )  # fmt: skip
    if isinstance(model, tuple) and len(model) == 2:
        model, tokenizer = model
    if isinstance(model, nn.Module):
        kind = "transformers" if hasattr(model, "config") else "function"
        model = Base(model, type(model).__name__, "", kind, tokenizer=tokenizer, processor=tokenizer)
    if not hasattr(model, "model"):
        raise BadOption(
            f"model={model!r:.80} is no spec, no Base and no torch.nn.Module.",
            next_step='model="builtin:minilm", a folder, a hub id, or a torch.nn.Module',
        )
    if matmul is not None:
        said = set_matmul(model.model, matmul)
        notes = getattr(model, "notes", None)
        if notes is not None:
            notes[:] = [n for n in notes if not n.startswith("matmul=")] + (
                [str(said)] if matmul != "plain" else []
            )
    return model


def feeder_of(base: Any, task: Task) -> Any:
    """What turns rows into tensors: the processor for pictures and sound, else the tokenizer."""
    if task.name in MODALITIES:
        return base.processor
    if base.tokenizer is None:
        raise Unsupported(
            f"{base.name} has no tokenizer, which the task {task.name!r} needs.",
            next_step="train(..., tokenizer=...)",
        )
    return base.tokenizer


def fresh_modules(model: nn.Module, fresh: Sequence[str]) -> list[str]:
    """Names of the modules that hold the parameters which no file filled."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in fresh if name.rpartition(".")[0]))


def encode_splits(
    task: Task,
    splits: Mapping[str, list[dict[str, Any]]],
    wanted: Sequence[str],
    feeder: Any,
    model: nn.Module,
) -> tuple[dict[str, Encoded], list[str]]:
    """{split: Encoded} and what to know of it. Rows without anything to train are refused."""
    encoded: dict[str, Encoded] = {}
    notes: list[str] = []
    for split in dict.fromkeys(["train", *wanted]):
        if split not in splits:
            raise BadOption(
                f"the data has no split {split!r} to evaluate on.",
                nearest=list(splits),
                next_step="evaluate_on=('validation',)",
            )
        if not splits[split]:
            notes.append(f"there are no {split} rows, so that nothing is measured on them")
            continue
        found = task.encode(splits[split], feeder, model)
        encoded[split] = found
        notes += [f"{split}: {note}" for note in found.notes]
        if found.cut:
            notes.append(
                f"{split}: {found.cut:,} of {len(splits[split]):,} rows are cut to {task.max_length} tokens"
            )
        empty = [i for i, n in enumerate(found.supervised) if n == 0]
        if empty:
            shown = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
            raise BadData(
                f"{len(empty):,} {split} rows have no trained token within max_length={task.max_length} "
                f"(rows {shown}).",
                next_step="a larger max_length, or leave these rows out",
            )
    return encoded, notes


def accelerator_for(device: Any, mixed_precision: str | None, exchanges: bool) -> Any:
    """accelerate's Accelerator for one device."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise missing_package("accelerate", "train", "training") from error
    if AcceleratorState._shared_state:  # settings of an earlier run in this process would win
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=mixed_precision or "no", cpu=str(device) == "cpu")
    if accelerator.num_processes > 1 and not exchanges:
        raise Unsupported(
            f"this process is one of {accelerator.num_processes}, but nothing exchanges their gradients.",
            next_step="start one process, or give hooks with `exchange`",
        )
    return accelerator
