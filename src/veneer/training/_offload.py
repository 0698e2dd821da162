"""Optimiser state that lies elsewhere between steps: in the processor's memory, or in a file that is mapped.

One idea: an optimiser keeps tensors of a parameter's size and reads them at its step alone. Behind each step they lie
in a buffer of ours, before each they are where the parameter is. On the processor itself the step works in the buffer:
one in a mapped file is written back and dropped by the system as it needs the memory.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from veneer._disk import mapped
from veneer.errors import BadOption

OFFLOADS = ("off", "cpu", "disk")
SMALL = 1024  # numbers: what is smaller stays, as step counts do


def offload(optimizer: Any, where: str) -> Offloaded | None:
    """Keep the state of a torch optimiser in "cpu" memory or on "disk" between its steps; "off": None.

    Raises BadOption for an optimiser that has no hooks around its step.
    """
    if where == "off":
        return None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise BadOption(
            f"offload_optimizer={where!r}: {type(optimizer).__name__} is no torch.optim.Optimizer.",
            next_step="offload_optimizer='off', or a recipe with an optimiser of torch's",
        )
    return Offloaded(optimizer, where)


class Offloaded:
    """The buffers of one optimiser's state, by parameter and name."""

    def __init__(self, optimizer: torch.optim.Optimizer, where: str) -> None:
        self.where = where
        self.buffers: dict[tuple[int, str], Tensor] = {}
        self._optimizer = weakref.ref(optimizer)
        optimizer.register_step_pre_hook(lambda *_: self.bring())
        optimizer.register_step_post_hook(lambda *_: self.take())

    def bring(self) -> None:
        """Put state where its parameter is, for a step."""
        for parameter, state, name, value in self._large():
            if value.device != parameter.device:
                state[name] = value.to(parameter.device)

    def take(self) -> None:
        """Put state away: behind a step, and where a checkpoint was put back."""
        for parameter, state, name, value in self._large():
            key = id(parameter), name
            buffer = self.buffers.get(key)
            if buffer is value:
                continue
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = self.buffers[key] = self._buffer(value)
            buffer.copy_(value)
            state[name] = buffer

    def _large(self) -> list[tuple[Tensor, dict[str, Any], str, Tensor]]:
        optimizer = self._optimizer()
        states = optimizer.state.items() if optimizer is not None else ()
        return [
            (parameter, state, name, value)
            for parameter, state in states
            for name, value in list(state.items())
            if isinstance(value, Tensor) and value.numel() >= SMALL
        ]

    def _buffer(self, value: Tensor) -> Tensor:
        if self.where == "cpu":
            pinned = value.device.type == "cuda"
            return torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=pinned)
        return mapped(value.numel(), value.dtype).view(value.shape)
