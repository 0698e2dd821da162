"""Spec: a tensor that a method declares, and the starts it can have.

A method never allocates. It says shape, start and what is true of the tensor; the engine draws, stores, casts,
shares, saves and counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
        return not self.trained and not self.noise and self.start is not _from_base


Specs = dict[str, Spec]


def zeros(*shape: int, **facts: Any) -> Spec:
    return Spec(tuple(shape), partial(_constant, 0.0), **facts)


def ones(*shape: int, **facts: Any) -> Spec:
    return Spec(tuple(shape), partial(_constant, 1.0), **facts)


def constant(value: float, *shape: int, **facts: Any) -> Spec:
    return Spec(tuple(shape), partial(_constant, value), **facts)


def normal(std: float, *shape: int, **facts: Any) -> Spec:
    """N(0, std^2)."""
    return Spec(tuple(shape), partial(_normal, std), **facts)


def normal_around(mean: float, std: float, *shape: int, **facts: Any) -> Spec:
    """N(mean, std^2)."""
    return Spec(tuple(shape), partial(_normal, std, mean=mean), **facts)


def truncated_normal(std: float, *shape: int, cut: float = 2.0, **facts: Any) -> Spec:
    """N(0, std^2) cut at `cut` standard deviations."""
    return Spec(tuple(shape), partial(_truncated, std, cut), **facts)


def uniform(bound: float, *shape: int, **facts: Any) -> Spec:
    """U(-bound, bound)."""
    return Spec(tuple(shape), partial(_uniform, bound), **facts)


def kaiming(*shape: int, gain: str = "linear_layer", **facts: Any) -> Spec:
    """U(-b, b). `linear_layer`: b = 1 / sqrt(fan_in), the start of nn.Linear; `relu`: b = sqrt(6 / fan_in)."""
    return Spec(tuple(shape), partial(_kaiming, gain), **facts)


def xavier(*shape: int, **facts: Any) -> Spec:
    """U(-b, b), b = sqrt(6 / (fan_in + fan_out))."""
    return Spec(tuple(shape), _xavier, **facts)


def orthogonal(*shape: int, **facts: Any) -> Spec:
    """Orthonormal rows (or columns, where there are more rows than columns)."""
    return Spec(tuple(shape), _orthogonal, **facts)


def from_base(*shape: int, **facts: Any) -> Spec:
    """A tensor whose start is made by the method's `start` or `prepare`, from the base's weight or from data."""
    return Spec(tuple(shape), _from_base, **facts)


def noise(draw: str, *shape: int, **facts: Any) -> Spec:
    """Drawn for each call in training, so that functions stay pure: `uniform` in (0, 1) or `normal`."""
    return Spec(tuple(shape), partial(_noise, draw), trained=False, noise=True, **facts)


# Starts are module functions, so that a Spec can be pickled with the model that carries it.


def _constant(value: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.full(shape, value)


def _normal(std: float, shape: tuple[int, ...], generator: torch.Generator, mean: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=generator) * std + mean


def _truncated(std: float, cut: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.nn.init.trunc_normal_(
        torch.empty(shape), 0.0, std, -cut * std, cut * std, generator=generator
    )


def _uniform(bound: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def _kaiming(gain: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    return _uniform(math.sqrt(6.0 / fan_in) if gain == "relu" else 1.0 / math.sqrt(fan_in), shape, generator)


def _xavier(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _uniform(math.sqrt(6.0 / (shape[-1] + shape[-2])), shape, generator)


def _orthogonal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.nn.init.orthogonal_(torch.empty(shape), generator=generator)


def _from_base(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def _noise(draw: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return (torch.rand if draw == "uniform" else torch.randn)(shape, generator=generator)


def orthonormal_rows(R: Tensor) -> Tensor:
    """Nearest matrix with orthonormal rows (polar factor): (..., rank, width) -> the same shape."""
    dtype = R.dtype
    U, _, V = torch.linalg.svd(R.double(), full_matrices=False)
    return (U @ V).to(dtype)
