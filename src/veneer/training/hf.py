"""transformers' Trainer, and those that stand on it: what a model with adapters needs between its steps."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from veneer import engine
from veneer.training._subject import mark_changed


class Callback(TrainerCallback):
    """`Trainer(model, ..., callbacks=[Callback()])`: constraints and schedules of methods, gradients
    checked once.

    The model is the one that carries the adapters. Losses, penalties and saving need no callback.
    """

    def __init__(self) -> None:
        self._checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._checked = False
        engine.prepare_training(_bare(model), state.max_steps)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not self._checked:
            engine.check_gradients(_bare(model))
            self._checked = True

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Behind the update, before gradients are zeroed."""
        mark_changed(p for group in engine.parameters(_bare(model)) for p in group["params"])
        engine.between_steps(_bare(model), state.global_step + 1, state.max_steps, optimizer)


def _bare(model: Any) -> Any:
    """The model itself, out of what accelerate wraps around it."""
    while not engine.adapters(model) and hasattr(model, "module"):
        model = model.module
    return model
