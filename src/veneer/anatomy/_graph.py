"""Questions about a tape: what a value was made from, and which rows of a projection it carries.

Sets of nodes are bits of Python integers, so that "everything before this value" is one `&`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from veneer.anatomy._structure import inside, join
from veneer.anatomy._trace import ATTENTION_CALLS, Call, Node, Tape

MOVES = {
    "view", "reshape", "transpose", "permute", "t", "T", "mT", "H", "swapaxes", "movedim", "moveaxis",
    "unsqueeze", "squeeze", "flatten", "unflatten", "expand", "expand_as", "repeat", "repeat_interleave",
    "split", "chunk", "tensor_split", "unbind", "narrow", "select", "__getitem__", "index_select", "cat",
    "concat", "stack", "flip", "roll", "view_as", "split_with_sizes", "tile", "broadcast_to", "gather",
}  # fmt: skip
SAME = {
    "to", "float", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "dropout",
    "dropout1d", "dropout2d", "feature_dropout", "alpha_dropout", "identity", "data", "requires_grad_",
    "cpu", "cuda",
}  # fmt: skip
RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
ACTIVATIONS = {
    "relu", "relu_", "relu6", "gelu", "silu", "silu_", "swish", "mish", "elu", "celu", "selu",
    "leaky_relu", "tanh", "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "softplus", "erf", "prelu",
    "logsigmoid", "softsign", "glu", "relu_squared", "threshold", "sin", "cos", "clamp_min", "rrelu",
    "exp", "expm1", "log1p", "maximum", "minimum",
}  # fmt: skip
NORM_CALLS = {
    "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "rsqrt", "local_response_norm",
    "native_layer_norm", "var", "std", "linalg_norm", "vector_norm", "norm", "normalize",
}  # fmt: skip
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
        """Blocks that are lists of sub-layers, added up by the forward of their owner: a call from list to
        list."""
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
        """Fills `near`; `ends` are the nodes that finish an attention, which stop the walk as matrix calls
        do."""
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
        """A float of two axes or more that depends on the inputs: a hidden state, or an input that stands
        for one."""
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
        """Whether the parameter of this call is stored as (in, out), from the call and the operand's
        strides."""
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

    def is_attention_call(self, node: Node) -> bool:
        return any(part in node.name for part in ATTENTION_CALLS)
