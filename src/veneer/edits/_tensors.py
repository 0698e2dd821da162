"""Tensors: what a method's functions receive as `t`, by the names of its equation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree


class Tensors:
    """Named tensors with attribute access: `t.A`, `t.B`.

    For one adapter a tensor has the shape that its Spec declares. For a mixed batch it has a leading row axis:
    a matrix comes as (rows, out, in), a vector as (rows, 1, width), a scalar as (rows, 1, 1), so that functions
    written with `.mT` and negative axes serve both.
    """

    def __init__(self, _named: dict[str, Any] | None = None, **named: Any) -> None:
        # Plain instance attributes: dynamo traces them, and access costs nothing.
        self.__dict__.update(_named or {})
        self.__dict__.update(named)

    def __getattr__(self, name: str) -> Any:  # reached for names that are not there only
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"no tensor is called '{name}'; there are: {', '.join(self.__dict__) or 'none'}")

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def items(self) -> Any:
        return self.__dict__.items()

    def with_(self, **more: Any) -> Tensors:
        """The same tensors and some more."""
        return Tensors({**self.__dict__, **more})

    def __reduce__(self) -> Any:
        return (Tensors, (dict(self.__dict__),))

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}{tuple(getattr(v, 'shape', ()))}" for k, v in self.__dict__.items())
        return f"Tensors({inside})"


def _flatten(t: Tensors) -> tuple[list[Any], Any]:
    return list(t.__dict__.values()), tuple(t.__dict__)


def _unflatten(values: Any, names: Any) -> Tensors:
    return Tensors(dict(zip(names, values, strict=True)))


pytree.register_pytree_node(Tensors, _flatten, _unflatten, serialized_type_name="veneer.edits.Tensors")


def add_row_axis(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """(rows, *declared) -> what functions see: a vector (dim 1) becomes (rows, 1, width), a scalar (rows, 1, 1)."""
    if dim == 0:
        return tensor[:, None, None]
    if dim == 1:
        return tensor[:, None, :]
    return tensor
