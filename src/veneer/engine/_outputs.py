"""Inputs and outputs of modules of any kind: which tensor is edited, and how it is put back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._weights import features


def first_input(args: tuple, kwargs: dict) -> tuple[tuple, dict, Any]:
    if args:
        return args, kwargs, args[0]
    name = next(iter(kwargs))
    for likely in ("hidden_states", "input", "x", "input_ids"):
        if likely in kwargs:
            name = likely
    rest = {k: v for k, v in kwargs.items() if k != name}
    return (kwargs[name],), rest, kwargs[name]


def first(y: Any) -> Tensor:
    """The tensor that is edited: the first of a tuple, the last hidden state of a model output."""
    if isinstance(y, Tensor):
        return y
    if isinstance(y, (tuple, list)):
        return y[0]
    return y["last_hidden_state"] if "last_hidden_state" in y else y[0]


def with_first(y: Any, new: Tensor) -> Any:
    if isinstance(y, Tensor):
        return new
    if isinstance(y, tuple) and not hasattr(y, "keys"):
        if hasattr(y, "_replace"):
            named: Any = y
            return named._replace(**{named._fields[0]: new})
        return (new, *y[1:])
    if isinstance(y, list):
        return [new, *y[1:]]
    y["last_hidden_state" if "last_hidden_state" in y else next(iter(y.keys()))] = new
    return y


def cut_features(y: Tensor, site: Any) -> Tensor:
    return y if not site.ranges else y.index_select(-1, features(site, y.device))


def paste_features(y: Tensor, part: Tensor, site: Any) -> Tensor:
    return y.index_copy(-1, features(site, y.device), part.to(y.dtype))
