"""What the loop trains, as the loop sees it: an adapter on a model, without a word about methods.

`Adapted` stands on the engine. Anything with the same functions can be trained: the loop asks for nothing
else.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Subject(Protocol):
    """A model and the part of it that is trained."""

    model: nn.Module

    def groups(
        self, learning_rate: float, weight_decay: float, recipe: Any = None
    ) -> list[dict[str, Any]]: ...
    def parameters(self) -> list[nn.Parameter]: ...
    def prepare(self, total_steps: int) -> None: ...
    def penalty(self) -> Tensor | None: ...
    def between_steps(self, step: int, total_steps: int, optimizer: Any) -> str | None: ...
    def check_gradients(self) -> None: ...
    def state(self) -> Any: ...
    def restore(self, state: Any) -> None: ...
    def save(self, folder: Path, extra: dict[str, Any]) -> int: ...


class Adapted:
    """One adapter of a model, through the engine."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self._grouped = False

    def groups(self, learning_rate: float, weight_decay: float, recipe: Any = None) -> list[dict[str, Any]]:
        from veneer import engine

        # A recipe sorts the leaves once: sorted again they would be new ones, which no optimiser knows.
        recipe, self._grouped = (None if self._grouped else recipe), self._grouped or recipe is not None

        return engine.parameters(self.model, lr=learning_rate, weight_decay=weight_decay, recipe=recipe)

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.groups(1.0, 0.0) for p in group["params"]]

    def prepare(self, total_steps: int) -> None:
        from veneer import engine

        engine.prepare_training(self.model, total_steps)

    def penalty(self) -> Tensor | None:
        from veneer import engine

        return engine.penalty(self.model)

    def between_steps(self, step: int, total_steps: int, optimizer: Any) -> str | None:
        from veneer import engine

        mark_changed(self.parameters())
        return engine.between_steps(self.model, step, total_steps, optimizer)

    def check_gradients(self) -> None:
        from veneer import engine

        engine.check_gradients(self.model)

    def state(self) -> Any:
        from veneer import engine

        return engine.state(self.model, self.name)

    def restore(self, state: Any) -> None:
        from veneer import engine

        engine.restore(self.model, self.name, state)

    def save(self, folder: Path, extra: dict[str, Any]) -> int:
        """Write the adapter's folder; returns the bytes of its files."""
        from veneer import engine

        engine.save(self.model, self.name, folder, extra=extra)
        return sum((folder / n).stat().st_size for n in ("veneer.json", "adapter.safetensors"))


def mark_changed(parameters: Iterable[Tensor]) -> None:
    """Count a change of these tensors: torch's fused optimisers write into them and leave the count as it
    was.

    What is derived from leaves is kept as long as their counts stay, so that a missed one would be a stale
    value.
    """
    for parameter in parameters:
        torch.autograd.graph.increment_version(parameter)
