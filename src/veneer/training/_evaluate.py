"""Evaluation: predictions of every row of a split, in the order of its rows, and their metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from veneer.tasks import Encoded, Task
from veneer.training._batches import in_order
from veneer.training._seeds import seed_all


def predictions_of(
    model: nn.Module,
    task: Task,
    encoded: Encoded,
    feeder: Any,
    *,
    batch_size: int = 64,
    device: Any = "cpu",
    autocast: Any = None,
    seed: int = 0,
    around: Any = None,
) -> list[dict[str, Any]]:
    """One prediction a row, in the order of the rows, in evaluation mode and without gradients.

    around: (features, batch) -> a context for the predictions of a batch.
    """
    if not encoded.features:
        return []
    found: list[dict[str, Any]] = []
    with evaluating(model), torch.no_grad():
        seed_all(seed, "evaluate")  # methods that draw at evaluation draw the same at every one
        for rows in in_order([f["length"] for f in encoded.features], batch_size):
            features = [encoded.features[i] for i in rows]
            batch = task.collate(features, feeder, model).to(device)
            inside = _nothing() if around is None else around(features, batch)
            with autocast() if autocast is not None else _nothing(), inside:
                found += task.predict(model, batch)
    return task.joined(sorted(found, key=lambda p: p["item"]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the mode of every module as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _nothing() -> Iterator[None]:
    yield
