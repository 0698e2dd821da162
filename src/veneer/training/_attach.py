"""Putting what is trained on the model, and taking it off again where training fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from veneer.errors import TrainingFailed
from veneer.tasks import Task
from veneer.training._job import Job
from veneer.training._seeds import derived
from veneer.training._subject import Adapted, Subject

NAME = "trained"  # of the adapter on the model; a second one is "trained-2"
STATISTICS_ROWS = 256


@contextmanager
def attached(
    model: torch.nn.Module,
    job: Job,
    whole: Sequence[str],
    seed: int,
    members: Mapping[str, str | Path],
    data: list[dict[str, Any]] | None,
) -> Iterator[Subject]:
    """The adapter on the model, active. It stays, unless the block fails: then the model is as before."""
    from veneer import engine

    before = engine.adapters(model)
    active = engine.host_of(model).active if before else ()
    try:
        for member, place in members.items():
            if member not in before:
                engine.load(model, place, member, activate=False)
        given = {"whole": list(whole), "of": list(members), "data": data}
        options: dict[str, Any] = {k: v for k, v in given.items() if v}
        name = NAME
        while name in before:
            name = f"{NAME}-{int(name.rpartition('-')[2]) + 1 if '-' in name else 2}"
        engine.attach(model, job.method, name=name, seed=derived(seed, "attach") % 2**31, **options)
        yield Adapted(model, name)
    except BaseException:
        for added in [n for n in reversed(engine.adapters(model)) if n not in before]:
            engine.detach(model, added)
        if before:
            engine.activate(model, active)
        raise


def statistics_data(
    job: Job, task: Task, encoded: Any, feeder: Any, model: torch.nn.Module, device: Any, notes: list[str]
) -> list[dict[str, Any]] | None:
    """Batches with labels for methods whose start is made from data: the first training rows, at most 256."""
    if job.method.facts.data != "squared_gradients":
        return None
    rows = encoded.features[:STATISTICS_ROWS]
    notes.append(f"the start of {job.method.key} is made from {len(rows)} training rows")
    batches = [task.collate(rows[at : at + 16], feeder, model) for at in range(0, len(rows), 16)]
    return [task.with_labels(batch.to(device)) for batch in batches]


@contextmanager
def checkpointed(model: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing of the model's blocks, for as long as it is trained."""
    if not wanted or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise TrainingFailed(
            f"{type(model).__name__} does not offer gradient checkpointing.",
            next_step="gradient_checkpointing=False, and accumulate=N to save memory",
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
