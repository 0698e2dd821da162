"""Which modules are given tokens before rows, (tokens, rows, width): a forward of twice the rows says which.

Most modules see the rows of a batch on their first axis. Some attentions and whole models (Longformer's, XLNet, a
torch.nn.LSTM as it comes) move them to the second, where an edit of some rows would take tokens for rows.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from veneer.anatomy._probe import untouched
from veneer.anatomy._trace import Tape, tensors_in


def tokens_first(model: nn.Module, tape: Tape, arguments: dict[str, Any] | tuple) -> frozenset[str]:
    """Names of the modules whose first input has its rows on axis 1."""
    count = next((t.shape[0] for t in tensors_in(arguments) if t.dim()), 0)
    before: dict[str, tuple[int, ...]] = {}
    for call in tape.calls:
        shape = tuple(tape.values[call.inputs[0]].tensor.shape) if call.inputs else ()
        if len(shape) > 1 and shape[1] == count:
            before.setdefault(call.module, shape)
    if not count or not before:
        return frozenset()
    after = _shapes(model, set(before), _twice(arguments, count))
    return frozenset(
        name for name, (n, _, *rest) in before.items() if after.get(name) == (n, 2 * count, *rest)
    )


def _twice(arguments: Any, count: int) -> Any:
    """The same arguments with every row twice."""
    if isinstance(arguments, Tensor):
        return torch.cat([arguments, arguments]) if arguments.dim() and len(arguments) == count else arguments
    if isinstance(arguments, dict):
        return {k: _twice(v, count) for k, v in arguments.items()}
    return (
        type(arguments)(_twice(v, count) for v in arguments)
        if isinstance(arguments, list | tuple)
        else arguments
    )


def _shapes(model: nn.Module, names: set[str], arguments: Any) -> dict[str, tuple[int, ...]]:
    """Module -> shape of its first input; empty where the forward does not take these arguments."""
    found: dict[str, tuple[int, ...]] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            first = next(tensors_in((args, kwargs)), None)
            if first is not None:
                found.setdefault(name, tuple(first.shape))

        return hook

    handles = [
        m.register_forward_pre_hook(look(n), with_kwargs=True) for n, m in model.named_modules() if n in names
    ]
    try:
        with untouched(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**arguments) if isinstance(arguments, dict) else model(*arguments)
    except Exception:  # a forward of one row alone
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return found
