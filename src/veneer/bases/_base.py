"""What `open_base` returns: a model, what feeds it, and what is known of both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Base:
    """A frozen model and its surroundings.

    kind: "transformers" | "network" | "timm" | "function". fresh: the parameters that no file filled, as they
    stand in `model.named_parameters()`; a task's head is among them. notes: what a user should know.
    """

    model: nn.Module
    name: str
    spec: str
    kind: str
    tokenizer: Any = None
    processor: Any = None
    task: str | None = None
    fresh: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """Of the weights that a file filled: their names, shapes and a sample of their values."""
        return fingerprint(self.model, without=self.fresh)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        head = f", fresh: {', '.join(self.fresh)}" if self.fresh else ""
        return f"Base({self.name}: {type(self.model).__name__}, {count:,} parameters{head})"


def fingerprint(model: nn.Module, without: list[str] | tuple[str, ...] = ()) -> str:
    """SHA-256, 16 hexadecimal digits, of the state's names, shapes and up to 64 values of each tensor.

    A sample tells two trainings of one architecture apart and reads a few hundred bytes a tensor, so it costs
    milliseconds on a large model. The device does not enter; the dtype does.
    """
    digest, left_out = hashlib.sha256(), set(without)
    for name, tensor in sorted(model.state_dict().items()):
        if name in left_out or not isinstance(tensor, Tensor):
            continue
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 64)][:64].cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(repr(picked.double().tolist() if not picked.is_complex() else picked.tolist()).encode())
    return digest.hexdigest()[:16]
