"""Spec: a tensor that a method declares, and the starts it can have.

A method never allocates. It says shape, start and what is true of the tensor; the engine draws, stores, casts,
shares, saves and counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Start = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class Spec:
    """One declared tensor."""

    shape: tuple[int, ...]
    start: Start
    trained: bool = True
    scope: str = (
        "site"  # site: one a site; block: shared by the sites of a block; adapter: one for the whole adapter
    )
    decay: bool = True  # False: weight decay would pull a neutral value (1, a gate, a bias) away
    rate: float = 1.0  # multiplies the learning rate
    group: str = ""  # tensors of another group live in another leaf: lora_plus asks for B apart
    keep: Callable[[Tensor], Tensor] | None = (
        None  # projection onto the constraint, after each step and at saving
    )
    noise: bool = False  # not stored: drawn for each call in training, from the adapter's own generator
    saved: bool | None = None  # None: trained tensors, and frozen ones that no seed makes again
    null_gradient: str = ""  # why this tensor's gradient is zero by mathematics
    compute: str = ""  # "float32": do not cast to the stream's dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def seeded(self) -> bool:
        """True when seed and shape make the tensor again, so that the file need not hold it."""
        return not self.trained and not self.noise and not getattr(self.start, "from_base", False)


Specs = dict[str, Spec]


def zeros(*shape: int, **facts: Any) -> Spec:
    return Spec(tuple(shape), _constant(0.0), **facts)


def ones(*shape: int, **facts: Any) -> Spec:
    return Spec(tuple(shape), _constant(1.0), **facts)


def constant(value: float, *shape: int, **facts: Any) -> Spec:
    return Spec(tuple(shape), _constant(value), **facts)


def normal(std: float, *shape: int, **facts: Any) -> Spec:
    """N(0, std^2)."""
    return Spec(tuple(shape), lambda s, g: torch.randn(s, generator=g) * std, **facts)


def truncated_normal(std: float, *shape: int, cut: float = 2.0, **facts: Any) -> Spec:
    """N(0, std^2) cut at `cut` standard deviations."""

    def start(s: tuple[int, ...], g: torch.Generator) -> Tensor:
        return torch.nn.init.trunc_normal_(torch.empty(s), 0.0, std, -cut * std, cut * std, generator=g)

    return Spec(tuple(shape), start, **facts)


def uniform(bound: float, *shape: int, **facts: Any) -> Spec:
    """U(-bound, bound)."""
    return Spec(tuple(shape), lambda s, g: (torch.rand(s, generator=g) * 2 - 1) * bound, **facts)


def kaiming(*shape: int, gain: str = "linear_layer", **facts: Any) -> Spec:
    """U(-b, b). `linear_layer`: b = 1 / sqrt(fan_in), the start of nn.Linear; `relu`: b = sqrt(6 / fan_in)."""

    def start(s: tuple[int, ...], g: torch.Generator) -> Tensor:
        fan_in = math.prod(s[1:]) if len(s) > 1 else s[0]
        bound = math.sqrt(6.0 / fan_in) if gain == "relu" else 1.0 / math.sqrt(fan_in)
        return (torch.rand(s, generator=g) * 2 - 1) * bound

    return Spec(tuple(shape), start, **facts)


def xavier(*shape: int, **facts: Any) -> Spec:
    """U(-b, b), b = sqrt(6 / (fan_in + fan_out))."""

    def start(s: tuple[int, ...], g: torch.Generator) -> Tensor:
        bound = math.sqrt(6.0 / (s[-1] + s[-2]))
        return (torch.rand(s, generator=g) * 2 - 1) * bound

    return Spec(tuple(shape), start, **facts)


def orthogonal(*shape: int, **facts: Any) -> Spec:
    """Orthonormal rows (or columns, where there are more rows than columns)."""

    def start(s: tuple[int, ...], g: torch.Generator) -> Tensor:
        return torch.nn.init.orthogonal_(torch.empty(s), generator=g)

    return Spec(tuple(shape), start, **facts)


def from_base(*shape: int, **facts: Any) -> Spec:
    """A tensor whose start is made by the method's `start` or `prepare`, from the base's weight or from data."""

    def start(s: tuple[int, ...], g: torch.Generator) -> Tensor:
        return torch.zeros(s)

    start.from_base = True  # type: ignore[attr-defined]
    return Spec(tuple(shape), start, **facts)


def noise(draw: str, *shape: int, **facts: Any) -> Spec:
    """Drawn for each call in training, so that functions stay pure: `uniform` in (0, 1) or `normal`."""
    draws = {"uniform": torch.rand, "normal": torch.randn}
    return Spec(tuple(shape), lambda s, g: draws[draw](s, generator=g), trained=False, noise=True, **facts)


def _constant(value: float) -> Start:
    return lambda shape, generator: torch.full(shape, value)


def orthonormal_rows(R: Tensor) -> Tensor:
    """Nearest matrix with orthonormal rows (polar factor): (..., rank, width) -> the same shape."""
    dtype = R.dtype
    U, _, V = torch.linalg.svd(R.double(), full_matrices=False)
    return (U @ V).to(dtype)
