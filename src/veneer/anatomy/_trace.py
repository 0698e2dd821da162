"""A tape of one forward: every torch call with its operands, and every module call with its inputs and
outputs.

The tape sees tensors, not names: a value is a version of a tensor, a node is a call that made it. Which
parameter a value is made of is kept as long as it is only moved, cast or scaled, so that a projection is
known by the parameter that it multiplies with, whoever holds it. The model is run as it is; hooks are
taken off again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MATRIX_CALLS = {
    "linear", "addmm", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "baddbmm", "einsum",
    "tensordot", "inner", "mv", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "embedding", "embedding_bag", "_grouped_mm", "grouped_mm", "bilinear",
    "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell",
    "rnn_tanh_cell", "rnn_relu_cell", "grouped_mm_fallback",
}  # fmt: skip
RECURRENT_CALLS = {
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
}  # fmt: skip
CONVOLUTION_CALLS = {n for n in MATRIX_CALLS if n.startswith("conv")}
ATTENTION_CALLS = (
    "scaled_dot_product_attention",
    "flash_attn",
    "flash_attention",
    "flex_attention",
    "_varlen_attn",
)


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in the recorded arguments of a node."""

    value: int


@dataclass
class Value:
    tensor: Tensor
    producer: int = -1  # node that made it; -1 for inputs, parameters, constants
    parameters: frozenset[int] = frozenset()  # ids of the parameters that it is nothing but a form of
    live: bool = False  # depends on the forward's inputs
    input_name: str = ""


@dataclass
class Node:
    index: int
    name: str
    func: Callable | None
    args: tuple
    kwargs: dict
    inputs: list[int]
    outputs: list[int]
    module: str  # innermost module that was running
    weights: list[int] = field(
        default_factory=list
    )  # inputs that are forms of a matrix parameter, in a matrix call


@dataclass
class Call:
    module: str
    start: int
    stop: int = -1
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    depth: int = 0


class Tape(TorchFunctionMode):
    """Records while it is active. Values and nodes are numbered in the order of their making."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.calls: list[Call] = []  # in the order of entering
        self.closed: list[Call] = []  # in the order of leaving: inner before outer
        self.output: Any = None
        self._current: dict[int, int] = {}  # id of a tensor -> its newest value
        self._open: list[Call] = []
        self._parameter_names: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            self._parameter_names.setdefault(id(p), []).append(name)
            if id(p) not in self._current:
                self._add(p, parameters=frozenset([id(p)]))

    # ------------------------------------------------------------ writing

    def _add(self, tensor: Tensor, **facts: Any) -> int:
        self.values.append(Value(tensor, **facts))
        self._current[id(tensor)] = len(self.values) - 1
        return len(self.values) - 1

    def value(self, tensor: Tensor) -> int:
        """Number of a tensor's newest value; a tensor that no call made is a constant."""
        found = self._current.get(id(tensor))
        return self._add(tensor) if found is None else found

    def add_input(self, tensor: Tensor, name: str) -> None:
        self._add(tensor, live=True, input_name=name)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # A tensor that cannot be looked at (inside of vmap, a script) must not stop the forward.
        with contextlib.suppress(Exception):
            self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Callable, args: tuple, kwargs: dict, out: Any) -> None:
        name = getattr(func, "__name__", type(func).__name__)
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        target = args[0] if args and isinstance(args[0], Tensor) else None
        in_place = (
            name in ("__setitem__", "copy_")
            or (name.endswith("_") and not name.startswith("__"))
            or name in _IN_PLACE
        )
        made = [target] if in_place and target is not None else list(tensors_in(out))
        seen = list(tensors_in((args, kwargs)))
        if not in_place:
            made = [t for t in made if not any(t is s for s in seen)]
        if not made:
            return
        if name.startswith("torch.ops") or "." in name:
            name = name.rpartition(".")[2] if not name.endswith(".default") else name.split(".")[-2]
        if name in _CREATES:
            seen = []  # made after the shape of a tensor, not of its numbers
        self.add_node(name, func, args, kwargs, seen, made)
        if in_place and target is not None and target._base is not None and id(target._base) in self._current:
            # A write through a view changes the tensor behind it.
            self.add_node("write_view", None, (), {}, [target._base, target], [target._base])

    def add_node(
        self,
        name: str,
        func: Callable | None,
        args: tuple,
        kwargs: dict,
        seen: list[Tensor],
        made: list[Tensor],
    ) -> Node:
        inputs = [self.value(t) for t in seen]
        facts = [self.values[i] for i in inputs]
        matrix = name in MATRIX_CALLS or name == "opaque"
        weights = (
            [i for i, v in zip(inputs, facts, strict=True) if v.parameters and v.tensor.ndim >= 2]
            if matrix
            else []
        )
        index = len(self.nodes)
        recorded_args, recorded_kwargs = self._refer(args), self._refer(kwargs)
        live = any(v.live for v in facts)
        parameters: frozenset[int] = frozenset()
        data = [v for v in facts if v.parameters or v.tensor.is_floating_point()]
        if not matrix and not live and data and all(v.parameters for v in data):
            parameters = frozenset().union(*(v.parameters for v in data))
        elif (
            name in ("__getitem__", "index_select", "gather", "embedding")
            and facts
            and facts[0].parameters
            and not weights
        ):
            # Rows of a parameter chosen by data (experts) are still that parameter.
            parameters = facts[0].parameters
        node = Node(
            index,
            name,
            func,
            recorded_args,
            recorded_kwargs,
            inputs,
            [],
            self._open[-1].module if self._open else "",
            weights,
        )
        self.nodes.append(node)
        node.outputs = [self._add(t, producer=index, parameters=parameters, live=live) for t in made]
        return node

    def _refer(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return Ref(self.value(item))
        if isinstance(item, tuple | list):
            return (
                type(item)(self._refer(x) for x in item)
                if type(item) in (tuple, list)
                else tuple(self._refer(x) for x in item)
            )
        if isinstance(item, dict):
            return {k: self._refer(v) for k, v in item.items()}
        return item

    # ------------------------------------------------------------ modules

    def enter(self, name: str, args: tuple, kwargs: dict) -> None:
        call = Call(name, len(self.nodes), depth=len(self._open))
        call.inputs = [self.value(t) for t in tensors_in((args, kwargs))]
        self.calls.append(call)
        self._open.append(call)

    def leave(self, name: str, module: nn.Module, out: Any) -> None:
        while self._open and self._open[-1].module != name:
            self._open.pop()
        if not self._open:
            return
        call = self._open[-1]
        made = list(tensors_in(out))
        unknown = [t for t in made if id(t) not in self._current]
        if unknown:
            # Made out of the tape's sight (a script, a kernel): one node stands for the whole module.
            seen = [self.values[i].tensor for i in call.inputs] + list(module.parameters(recurse=False))
            self.add_node("opaque", None, (), {}, seen, unknown)
        call.outputs = [self.value(t) for t in made]
        call.stop = len(self.nodes)
        self.closed.append(call)
        self._open.pop()

    # ------------------------------------------------------------ reading

    def parameter_name(self, value: int, near: str) -> str:
        """Name of the parameter behind a value; among tied names the one that the module `near` holds."""
        names = [n for p in self.values[value].parameters for n in self._parameter_names.get(p, [])]
        exact = [n for n in names if n.rpartition(".")[0] == near]
        below = [n for n in names if not near or n.startswith(near + ".")]
        return (exact or below or names or [""])[0]


_CREATES = {
    "empty_like",
    "new_empty",
    "zeros_like",
    "new_zeros",
    "ones_like",
    "new_ones",
    "full_like",
    "new_full",
    "new_tensor",
}
_IN_PLACE = {"__iadd__", "__imul__", "__isub__", "__itruediv__", "__iand__", "__ior__"}


def tensors_in(item: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and objects that are dicts (transformers' outputs)."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from tensors_in(value)
    elif isinstance(item, tuple | list):
        for value in item:
            yield from tensors_in(value)


def record(model: nn.Module, arguments: dict[str, Any] | tuple) -> Tape:
    """Runs one forward and gives its tape. The caller keeps the model's state (`_probe.untouched`)."""
    tape = Tape(model)
    handles = []
    keyword = isinstance(arguments, dict)
    named = (
        arguments.items()
        if isinstance(arguments, dict)
        else [(f"input_{i}", a) for i, a in enumerate(arguments)]
    )
    for name, item in named:
        for tensor in tensors_in(item):
            tape.add_input(tensor, name)

    def before(name: str) -> Callable:
        return lambda module, args, kwargs: tape.enter(name, args, kwargs)

    def after(name: str) -> Callable:
        return lambda module, args, kwargs, out: tape.leave(name, module, out)

    try:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        with torch.no_grad(), tape:
            tape.output = model(**arguments) if keyword else model(*arguments)  # type: ignore[arg-type]
    finally:
        for handle in handles:
            handle.remove()
    return tape
