"""Rows on their way through a forward: what was asked, how it is encoded, and what each row is answered.

The base runs once for all rows, with the adapter of each; then each task reads its own rows' logits, and its own labels
of them, as if its adapter had run alone.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from veneer import engine
from veneer.engine._store import Read
from veneer.errors import BadOption, Unsupported
from veneer.tasks import Task
from veneer.tasks._collate import takes, text_inputs
from veneer.tasks._text import logits_of
from veneer.training._evaluate import evaluating

from ._reading_shells import Shell

Pooling = Literal["auto", "mean", "cls", "last"]
Row = Mapping[str, Any]


@dataclass
class Version:
    name: str
    folder: Path
    task: Task | None
    reading: Future[Read] | None = None
    shell: Shell | None = None
    bytes: int = 0
    waiting: int = 0  # jobs that have not ended
    leaving: bool = False


@dataclass
class Job:
    """What one caller asked: some rows of one version."""

    version: Version | None
    kind: str  # "read" or "embed"
    rows: Sequence[Row]
    answer: Future[list[Any]]
    pooling: Pooling = "auto"
    features: list[dict[str, Any]] | None = None
    left: deque[int] = field(default_factory=deque)  # rows that have not been in a batch
    found: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A row's answer: a task's prediction, as `veneer.predict` gives it, or a vector; and the tokens that were read."""

    tokens: int
    prediction: Mapping[str, Any] | None = None
    vector: tuple[float, ...] = ()


def forward(shell: Shell, picked: Sequence[tuple[Job, int]]) -> list[Found]:
    """Answers of rows that have their `key_of` in common, in their order."""
    first = picked[0][0]
    features = [feature_of(j, i) for j, i in picked]
    names = [None if j.version is None else j.version.name for j, _ in picked]
    with evaluating(shell.model), acting(shell, names):
        if first.kind == "embed":
            vectors = embedded(shell, features, first.pooling)
            return [Found(f["length"], vector=tuple(v.tolist())) for f, v in zip(features, vectors)]
        if generates(first):
            texts = first.version.task.generate(shell.model, collated(first, features, shell))  # type: ignore[union-attr]
            return [Found(f["length"], {"prediction": text}) for f, text in zip(features, texts)]
        return [Found(f["length"], one) for f, one in zip(features, predicted(shell, picked, features))]


def predicted(shell: Shell, picked: Sequence[tuple[Job, int]], features: list[dict[str, Any]]) -> list[Any]:
    """The base once for all rows; then each task reads its own rows of the logits, and its own labels of them."""
    device = next(shell.model.parameters()).device
    inputs = {k: v.to(device) for k, v in text_inputs(features, shell.feeder, shell.model).items()}

    given: Any = SimpleNamespace(inputs=inputs)
    logits = logits_of(shell.model, given)
    found: list[Any] = [None] * len(picked)
    jobs = {id(j): j for j, _ in picked}
    for key, job in jobs.items():
        task = job.version.task  # type: ignore[union-attr]
        assert task is not None
        mine = [at for at, (j, _) in enumerate(picked) if id(j) == key]
        batch = collated(job, [features[at] for at in mine], shell)
        own = logits[mine][..., : task.num_labels or 1]
        if own.dim() == 3:
            own = own[:, : batch.inputs["input_ids"].shape[1]]
        for at, one in zip(mine, task.predict(_Said(own), batch)):
            found[at] = one
    return found


class _Said(torch.nn.Module):
    """Stands for a model whose logits are known."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: Any) -> Tensor:
        return self.logits


def embedded(shell: Shell, features: list[dict[str, Any]], pooling: Pooling) -> list[Tensor]:
    """Unit vectors, (width,) each, of the states before the head."""
    facts = engine.read(shell.model).facts
    if facts.encoder_decoder:
        raise Unsupported(
            "embeddings of an encoder-decoder are not made.", next_step="an encoder or a decoder"
        )
    device = next(shell.model.parameters()).device
    inputs = {k: v.to(device) for k, v in text_inputs(features, shell.feeder, shell.model).items()}
    states = shell.body(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"]
    how = pooling if pooling != "auto" else "last" if facts.causal else "mean"
    if how == "mean":
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    elif how == "cls":
        pooled = states[:, 0]
    else:
        pooled = states[torch.arange(len(features)), mask.sum(1) - 1]
    return list(torch.nn.functional.normalize(pooled, dim=-1).cpu())


@contextlib.contextmanager
def acting(shell: Shell, names: list[str | None]) -> Iterator[None]:
    if all(n is None for n in names) and not engine.adapters(shell.model):
        yield
        return
    with engine.rows(shell.model, names):
        yield


def feature_of(job: Job, i: int) -> dict[str, Any]:
    assert job.features is not None
    return job.features[i]


def collated(job: Job, features: list[dict[str, Any]], shell: Shell) -> Any:
    task = job.version.task  # type: ignore[union-attr]
    assert task is not None
    return task.collate(features, shell.feeder, shell.model).to(next(shell.model.parameters()).device)


def encoded(job: Job, shell: Shell) -> list[dict[str, Any]]:
    if job.kind == "read":
        return job.version.task.encode(job.rows, shell.feeder, shell.model).features  # type: ignore[union-attr]
    longest = Task(max_length=1 << 30).longest(shell.feeder, shell.model)
    typed, features = takes(shell.model, "token_type_ids"), []
    for row in job.rows:
        encoded: Any = {"input_ids": row.get("ids", [])[:longest]}
        if "ids" not in row:
            encoded = shell.feeder(row["text"], truncation=True, max_length=longest)
        _check_ids(encoded["input_ids"], len(shell.feeder))
        feature = {"input_ids": encoded["input_ids"], "length": len(encoded["input_ids"])}
        if typed:
            feature["token_type_ids"] = encoded.get("token_type_ids", [0] * feature["length"])
        features.append(feature)
    return features


def _check_ids(ids: Sequence[int], known: int) -> None:
    if not ids or not all(0 <= i < known for i in ids):
        raise BadOption(f"an input has no token, or one outside of the {known:,} that this base knows.",
                        next_step="a text with words, or ids from /tokenize")  # fmt: skip


def generates(job: Job) -> bool:
    return (
        job.kind == "read"
        and job.version is not None
        and bool(job.version.task and job.version.task.generates)
    )


def key_of(job: Job, shell: Shell) -> tuple[Any, ...]:
    """What rows of one forward have in common."""
    if generates(job):
        task: Any = job.version.task  # type: ignore[union-attr]
        return id(shell), "generate", task.max_target_length, task.beams
    return id(shell), job.kind, job.pooling


def is_ready(job: Job) -> bool:
    """Its file has been read, and rows are left."""
    found = job.version
    waits = (
        found is not None and found.shell is None and found.reading is not None and not found.reading.done()
    )
    return bool(job.left) and not waits and not job.answer.done()


def columns_of(task: Task) -> tuple[str, ...]:
    if task.name == "rank":
        return ("query", "document")
    return {"tag": ("tokens",), "seq2seq": ("source",)}.get(task.name, ("text",))


def fail(job: Job, error: Exception) -> None:
    with contextlib.suppress(Exception):
        job.answer.set_exception(error)
    job.left.clear()


def succeed(job: Job) -> None:
    with contextlib.suppress(Exception):
        job.answer.set_result([job.found[i] for i in range(len(job.rows))])
