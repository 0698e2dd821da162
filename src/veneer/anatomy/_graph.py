"""Questions about a tape: what a value was made from, and which rows of a projection it carries.

Sets of nodes are bits of Python integers, so that "everything before this value" is one `&`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from veneer.anatomy._structure import inside, join
from veneer.anatomy._trace import ATTENTION_CALLS, Call, Node, Ref, Tape

MOVES = {
    "view", "reshape", "transpose", "permute", "t", "T", "mT", "H", "swapaxes", "movedim", "moveaxis", "unsqueeze", "squeeze",
    "flatten", "unflatten", "expand", "expand_as", "repeat", "repeat_interleave", "split", "chunk", "tensor_split", "unbind",
    "narrow", "select", "__getitem__", "index_select", "cat", "concat", "stack", "flip", "roll", "view_as", "split_with_sizes",
    "tile", "broadcast_to", "gather",
}  # fmt: skip
SAME = {
    "to", "float", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "dropout", "dropout1d", "dropout2d",
    "feature_dropout", "alpha_dropout", "identity", "data", "requires_grad_", "cpu", "cuda",
}  # fmt: skip
RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
ACTIVATIONS = {
    "relu", "relu_", "relu6", "gelu", "silu", "silu_", "swish", "mish", "elu", "celu", "selu", "leaky_relu", "tanh", "sigmoid",
    "hardswish", "hardsigmoid", "hardtanh", "softplus", "erf", "prelu", "logsigmoid", "softsign", "glu", "relu_squared", "threshold",
    "sin", "cos", "clamp_min", "rrelu", "exp", "expm1", "log1p", "maximum", "minimum",
}  # fmt: skip
NORM_CALLS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "rsqrt", "local_response_norm",
              "native_layer_norm", "var", "std", "linalg_norm", "vector_norm", "norm", "normalize"}  # fmt: skip
ADDS = {"add", "__add__", "__iadd__", "__radd__", "add_"}
MULTIPLIES = {"mul", "__mul__", "__imul__", "__rmul__", "mul_", "multiply"}


class Graph:
    """A tape with its ancestors."""

    def __init__(self, tape: Tape, model: nn.Module) -> None:
        self.tape, self.model = tape, model
        self.values, self.nodes = tape.values, tape.nodes
        self.before: list[int] = []  # node -> bits of itself and of all nodes it depends on
        self.near: list[
            int
        ] = []  # node -> bits of the nearest matrix calls or attentions behind its first output
        self.listed: set[str] = set()  # blocks that are mere lists: they have a number, but cannot be called
        for node in self.nodes:
            bits = 1 << node.index
            for i in node.inputs:
                if self.values[i].producer >= 0:
                    bits |= self.before[self.values[i].producer]
            self.before.append(bits)
        self.calls: dict[str, list[Call]] = {}
        self._given_out: dict[int, list[Call]] = {}
        for call in tape.calls:
            if call.stop >= 0:
                self.calls.setdefault(call.module, []).append(call)
        self._direct_calls()
        for call in tape.closed:
            for value in call.outputs[:1]:
                self._given_out.setdefault(value, []).append(call)
        self.consumers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for i in node.inputs:
                self.consumers.setdefault(i, []).append(node)

    def _direct_calls(self) -> None:
        """Modules whose `forward` was called past `__call__`: their call spans those of their children."""
        for name, module in self.model.named_modules():
            if name in self.calls or isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                continue
            inner = [c for child, _ in module.named_children() for c in self.calls.get(join(name, child), [])]
            inner = [c for c in inner if c.stop >= 0]
            if len(inner) < 2:
                continue
            first, last = min(inner, key=lambda c: c.start), max(inner, key=lambda c: c.stop)
            call = Call(name, first.start, last.stop, first.inputs, last.outputs, first.depth)
            self.calls[name] = [call]
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList | nn.ModuleDict) and name not in self.calls:
                self._lists_in(name, module)

    def _lists_in(self, name: str, module: nn.Module) -> None:
        """Blocks that are lists of sub-layers, added up by the forward of their owner: a call from list to list."""
        spans = []
        for key, child in module.named_children():
            inner = [
                c
                for part, _ in child.named_children()
                for c in self.calls.get(join(join(name, key), part), [])
            ]
            if not isinstance(child, nn.ModuleList | nn.ModuleDict) or not inner:
                return
            spans.append(
                (join(name, key), min(inner, key=lambda c: c.start), max(inner, key=lambda c: c.stop))
            )
        owner = name.rpartition(".")[0]
        for i, (block, first, last) in enumerate(spans):
            stop = spans[i + 1][1].start if i + 1 < len(spans) else last.stop
            while (
                i + 1 == len(spans)
                and stop < len(self.nodes)
                and self.nodes[stop].module == owner
                and self.nodes[stop].name in ADDS
            ):
                stop += 1
            adds = any(n.module == owner and n.name in ADDS for n in self.nodes[first.start : stop])
            if stop < last.stop or not adds:
                return
            self.calls[block] = [
                Call(block, first.start, stop, first.inputs, self.nodes[stop - 1].outputs[:1], first.depth)
            ]
            self.listed.add(block)

    def find_near(self, ends: set[int]) -> None:
        """Fills `near`; `ends` are the nodes that finish an attention, which stop the walk as matrix calls do."""
        self.near = []
        for node in self.nodes:
            if node.weights or node.index in ends:
                self.near.append(1 << node.index)
                continue
            bits = 0
            for i in node.inputs:
                bits |= self.near_value(i)
            self.near.append(bits)

    def near_value(self, value: int) -> int:
        """Bits of the nearest matrix calls behind a value; masks and indices do not count."""
        facts = self.values[value]
        if (
            facts.producer < 0
            or facts.parameters
            or not (facts.tensor.is_floating_point() or facts.tensor.is_complex())
        ):
            return 0
        return self.near[facts.producer]

    def before_value(self, value: int) -> int:
        producer = self.values[value].producer
        return self.before[producer] if producer >= 0 else 0

    def producer(self, value: int) -> Node | None:
        index = self.values[value].producer
        return self.nodes[index] if index >= 0 else None

    def is_data(self, value: int) -> bool:
        """A float that depends on the inputs and on some matrix: a hidden state, no mask and no position."""
        facts = self.values[value]
        return facts.live and facts.tensor.is_floating_point() and bool(self.near_value(value))

    def is_state(self, value: int) -> bool:
        """A float of two axes or more that depends on the inputs: a hidden state, or an input that stands for one."""
        facts = self.values[value]
        return facts.live and facts.tensor.is_floating_point() and facts.tensor.ndim >= 2

    def made_from(self, value: int, source: int) -> bool:
        """Whether `value` was computed from `source`."""
        if value == source:
            return False
        bits = self.before_value(value)
        made = self.producer(source)
        if made is not None:
            return bool(bits >> made.index & 1)
        return any(bits >> node.index & 1 for node in self.consumers.get(source, []))

    def parameter_made(self, value: int) -> bool:
        """Whether a parameter, and no hidden state, went into a value (a table of position biases)."""
        if self.values[value].parameters:
            return True
        return any(self.values[i].parameters for n in self.each(self.before_value(value)) for i in n.inputs)

    def shape(self, value: int) -> tuple[int, ...]:
        return tuple(self.values[value].tensor.shape)

    def same(self, value: int, also: set[str] = SAME) -> int:
        """The value before casts and dropout (`also` names the calls that are passed)."""
        while True:
            node = self.producer(value)
            if node is None or node.name not in also or not node.inputs:
                return value
            value = node.inputs[0]

    def made_by(self, value: int) -> list[Call]:
        """Module calls whose first output is this value, outermost last."""
        return self._given_out.get(value, [])

    def region(self, call: Call) -> range:
        return range(call.start, call.stop)

    def mask(self, call: Call) -> int:
        return ((1 << call.stop) - 1) & ~((1 << call.start) - 1)

    def each(self, bits: int) -> Iterator[Node]:
        """The nodes of a set, first to last."""
        while bits:
            low = bits & -bits
            yield self.nodes[low.bit_length() - 1]
            bits ^= low

    def within(self, node: Node, module: str) -> bool:
        return inside(node.module, module)

    # ------------------------------------------------------------ weights

    def data_input(self, node: Node) -> int | None:
        """What a matrix call multiplies its weight with."""
        floats = [i for i in node.inputs if i not in node.weights and not self.values[i].parameters]
        live = [i for i in floats if self.values[i].live] or floats
        return live[0] if live else None

    def weight_key(self, node: Node) -> tuple[str, str]:
        """(module, parameter) of the weight of a matrix call."""
        name = self.tape.parameter_name(
            node.weights[-1] if node.name != "embedding" else node.weights[0], node.module
        )
        module, _, parameter = name.rpartition(".")
        return module, parameter

    def is_transposed(self, node: Node) -> bool:
        """Whether the parameter of this call is stored as (in, out), from the call and the operand's strides."""
        operand = self.values[node.weights[-1]].tensor
        parameter = next(iter(self.values[node.weights[-1]].parameters))
        if operand.ndim < 2:
            return False
        stride = operand.stride()
        swapped = stride[-1] != 1 and stride[-2] == 1 and operand.shape[-1] != 1
        del parameter
        tensors = [i for i in node.inputs if self.values[i].tensor.ndim >= 2]
        weight_is_left = (
            bool(tensors) and tensors[0] in node.weights and node.name not in ("addmm", "baddbmm")
        )
        in_axis_last = node.name in ("linear",) or (node.name != "linear" and weight_is_left)
        return in_axis_last == swapped

    def feature_axis(self, node: Node) -> int:
        """Axis of a matrix call's output that counts the rows of its weight: W x has them before the last."""
        if node.name.startswith("conv"):
            return 1
        matrices = [i for i in node.inputs if self.values[i].tensor.ndim >= 2]
        left = (
            node.name in ("bmm", "matmul", "__matmul__", "mm")
            and bool(matrices)
            and matrices[0] in node.weights
        )
        return -2 if left else -1

    # ------------------------------------------------------------ rows of a projection

    def rows(self, value: int, origin: int) -> Tensor | None:
        """Which output features of matrix call `origin` stand where in `value` (-1: from elsewhere); None: unknown.

        The calls between the two are run again on the numbers of the features: moves move them, all that keeps
        the shape keeps them.
        """
        return self._rows(value, origin, {})

    def _rows(self, value: int, origin: int, seen: dict[int, Tensor | None]) -> Tensor | None:
        if value in seen:
            return seen[value]
        seen[value] = None
        node = self.producer(value)
        if node is None or not self.before[node.index] >> origin & 1:
            return None
        shape = self.shape(value)
        if node.index == origin:
            axis = self.feature_axis(node)
            features = torch.arange(shape[axis])
            view = [1] * len(shape)
            view[axis] = -1
            result: Tensor | None = features.view(view).expand(shape).contiguous()
        elif node.weights or self.near[node.index] == 1 << node.index:
            result = None
        elif node.name in ("write_view", "__setitem__"):
            result = self._written(node, shape, origin, seen)
        elif node.name in MOVES and node.func is not None:
            result = self._moved(node, value, origin, seen)
        else:
            result = self._kept(node, shape, origin, seen)
        seen[value] = result
        return result

    def _kept(self, node: Node, shape: tuple[int, ...], origin: int, seen: dict) -> Tensor | None:
        for i in node.inputs:
            found = self._rows(i, origin, seen)
            if found is not None:
                if tuple(found.shape) == shape:
                    return found
                if found.numel() == torch.Size(shape).numel():  # view_as_complex and its kin
                    return found.reshape(shape)
        return None

    def _written(self, node: Node, shape: tuple[int, ...], origin: int, seen: dict) -> Tensor | None:
        """A tensor after a part of it was written: x[i] = y, or a write into a view of it."""
        before = self._rows(node.inputs[0], origin, seen)
        out = torch.full(shape, -1) if before is None else before.clone()
        write = node if node.name == "__setitem__" else self.producer(node.inputs[1])
        if write is None or not write.args:
            return None
        view = out
        if node.name == "write_view":
            made = self.producer(write.inputs[0])
            if made is None or made.name not in MOVES or made.func is None or len(write.inputs) < 2:
                return None
            view = made.func(out, *made.args[1:], **made.kwargs)
        source = (
            write.inputs[1]
            if node.name == "write_view"
            else next((a.value for a in write.args[2:] if isinstance(a, Ref)), None)
        )
        rows = self._rows(source, origin, seen) if source is not None else None
        if before is None and rows is None:
            return None
        if node.name == "__setitem__":
            index = write.args[1]
            if isinstance(index, Ref) or any(isinstance(i, Ref) for i in index if isinstance(index, tuple)):
                return None
            out[index] = -1 if rows is None else rows
        elif isinstance(view, Tensor):
            view.copy_(torch.tensor(-1) if rows is None else rows)
        return out

    def _moved(self, node: Node, value: int, origin: int, seen: dict) -> Tensor | None:
        any_found = False

        def put(item: object) -> object:
            nonlocal any_found
            if isinstance(item, Ref):
                tensor = self.values[item.value].tensor
                found = self._rows(item.value, origin, seen)
                if found is not None:
                    any_found = True
                    return found
                return torch.full(tensor.shape, -1) if tensor.is_floating_point() else tensor
            if isinstance(item, tuple | list):
                return type(item)(put(x) for x in item)
            if isinstance(item, dict):
                return {k: put(v) for k, v in item.items()}
            return item

        try:
            args, kwargs = put(node.args), put(node.kwargs)
            if not any_found:
                return None
            if node.name in ("view", "view_as"):
                args = (args[0].contiguous(), *args[1:])  # type: ignore[index]
            out = node.func(*args, **kwargs)  # type: ignore[misc, operator]
        except Exception:  # an argument that numbers of features cannot stand for
            return None
        if isinstance(out, Tensor):
            return out
        return (
            out[node.outputs.index(value)]
            if value in node.outputs and len(out) == len(node.outputs)
            else None
        )

    def is_attention_call(self, node: Node) -> bool:
        return any(part in node.name for part in ATTENTION_CALLS)


def ranges_of(rows: Tensor | None, size: int) -> tuple[tuple[int, int], ...] | None:
    """Half-open ranges of the features in `rows`; () where they are all of `size`, None where unknown."""
    if rows is None:
        return None
    found = torch.unique(rows[rows >= 0]).tolist()
    if not found:
        return None
    if len(found) == size:
        return ()
    ranges, start = [], found[0]
    for a, b in zip(found, [*found[1:], None], strict=True):
        if b is None or b != a + 1:
            ranges.append((start, a + 1))
            start = b
    return tuple(ranges)
