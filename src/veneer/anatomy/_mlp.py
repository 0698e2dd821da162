"""MLPs, gated or not, and experts: a matrix call that takes what an activation or a product made of one or
two others.

Where half of a fused matrix is multiplied with the other half, the half that goes through the activation
is the gate.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from veneer.anatomy._findings import Findings, Key
from veneer.anatomy._graph import ACTIVATIONS, ADDS, MULTIPLIES, Graph
from veneer.anatomy._rows import Rows, ranges_of
from veneer.anatomy._structure import Weight, inside, join, parent
from veneer.anatomy._trace import CONVOLUTION_CALLS, MATRIX_CALLS, RECURRENT_CALLS, Call, Node

_LOOKUPS = {"embedding", "embedding_bag", "multi_head_attention_forward"}


def free_calls(graph: Graph, region: range, taken: dict[int, str]) -> list[Node]:
    """Matrix calls of a region that have no role yet: products with a matrix, no lookups."""
    skip = _LOOKUPS | RECURRENT_CALLS
    nodes = graph.nodes[region.start : region.stop]
    return [n for n in nodes if n.weights and n.index not in taken and n.name not in skip]


class MLPs:
    """Finds the MLPs of a region; `add` writes a role down."""

    def __init__(
        self,
        graph: Graph,
        model: nn.Module,
        weights: dict[Key, Weight],
        found: Findings,
        taken: dict[int, str],
        add: Callable,
    ) -> None:
        self.graph, self.model, self.weights, self.found = graph, model, weights, found
        self.taken, self.add, self.norms = taken, add, set(found.norms)

    def read(self, block: str, call: Call) -> None:
        """Roles of the matrix calls of one region that are neither attention nor router."""
        graph, region = self.graph, self.graph.region(call)
        routed = any(self.taken.get(i) == "router" for i in region)
        for node in free_calls(graph, region, self.taken):
            if node.index in self.taken or node.name in CONVOLUTION_CALLS:
                continue
            value = graph.data_input(node)
            near = list(graph.each(graph.near_value(value))) if value is not None else []
            if len(near) == 1 and self._ends_branch(node):
                near = [self._through(near[0])]
            good = [
                n
                for n in near
                if n.weights
                and n.index in region
                and n.index not in self.taken
                and n.name not in CONVOLUTION_CALLS
            ]
            if (
                not near
                or len(good) != len(near)
                or len(near) > 2
                or any(n.name == "embedding" for n in near)
            ):
                continue
            assert value is not None
            self._mlp(block, node, near, value, routed)

    def _mlp(self, block: str, down: Node, near: list[Node], value: int, routed: bool) -> None:
        graph = self.graph
        between = [
            n
            for n in graph.each(graph.before_value(value))
            if n.index > near[0].index and n.index not in {m.index for m in near}
        ]
        between = [n for n in between if any(graph.before[n.index] >> m.index & 1 for m in near)]
        prefix = "expert" if self._is_expert(down, block, routed) else "mlp"
        product = self._product(between, near)
        acts = any(self._activates(n) for n in between)
        mixed = any(
            (n.name in MATRIX_CALLS and not n.weights) or n.name.startswith(("cum", "fft")) for n in between
        )
        if mixed or (product is None and not acts):
            return  # tokens are mixed on the way: no MLP
        if len(near) == 2:
            if product is None:
                return
            gate, up = product
            self.add(near[gate], f"{prefix}.gate", block)
            self.add(near[up], f"{prefix}.up", block)
        elif product is not None:
            gate, up = product
            for role, ranges in (("gate", gate), ("up", up)):
                self.add(near[0], f"{prefix}.{role}", block, ranges)  # type: ignore[arg-type]
        else:
            self.add(near[0], f"{prefix}.up", block)
        self.add(down, f"{prefix}.down", block)

    def _ends_branch(self, node: Node) -> bool:
        """Whether the output meets another state in a sum before the next matrix call."""
        todo, seen = list(node.outputs), 0
        while todo and seen < 32:
            value, seen = todo.pop(0), seen + 1
            for user in self.graph.consumers.get(value, []):
                if user.weights:
                    return False
                if (
                    user.name in ADDS
                    and len(user.inputs) > 1
                    and all(self.graph.is_state(i) for i in user.inputs[:2])
                ):
                    continue
                todo += user.outputs
        return not todo

    def _through(self, node: Node) -> Node:
        """The matrix call before a depthwise convolution (SegFormer has one between the halves of its
        MLP)."""
        weight = (
            self.weights.get(self.graph.weight_key(node))
            if node.name in CONVOLUTION_CALLS and node.weights
            else None
        )
        if weight is None or weight.groups == 1 or weight.groups != weight.n_out:
            return node
        value = self.graph.data_input(node)
        before = list(self.graph.each(self.graph.near_value(value))) if value is not None else []
        return before[0] if len(before) == 1 else node

    def _activates(self, node: Node) -> bool:
        opaque = node.name == "opaque" and not node.weights
        return opaque or (node.name in ACTIVATIONS and node.module not in self.norms)

    def _product(self, between: list[Node], near: list[Node]) -> tuple | None:
        """(gate, up): indices into `near`, or ranges of rows where both are halves of one matrix."""
        graph = self.graph
        for node in between:
            if node.name == "glu" and len(near) == 1:
                size = graph.shape(near[0].outputs[0])[-1]
                return ((size // 2, size),), ((0, size // 2),)
            if node.name not in MULTIPLIES or len(node.inputs) < 2:
                continue
            a, b = node.inputs[:2]
            bits = [graph.near_value(a), graph.near_value(b)]
            if len(near) == 2 and bits[0] and bits[1] and not bits[0] & bits[1]:
                first = 0 if bits[0] >> near[0].index & 1 else 1
                gate = first if self._acted(a, near) or not self._acted(b, near) else 1 - first
                if self._acted(a, near) == self._acted(b, near):
                    gate = self._by_name(near, gate)
                return gate, 1 - gate
            if len(near) == 1 and bits[0] == bits[1] == 1 << near[0].index:
                size = graph.shape(near[0].outputs[0])[-1]
                rows_a, rows_b = (ranges_of(Rows(graph).of(v, near[0].index), size) for v in (a, b))
                if rows_a and rows_b and rows_a != rows_b:
                    return (
                        (rows_a, rows_b)
                        if self._acted(a, near) or not self._acted(b, near)
                        else (rows_b, rows_a)
                    )
        return None

    def _acted(self, value: int, near: list[Node]) -> bool:
        """Whether an activation lies between the matrices and this value."""
        graph = self.graph
        bits = graph.before_value(value)
        start = min(n.index for n in near)
        skip = {n.index for n in near}
        for node in graph.each(bits >> start << start):
            if (
                node.index not in skip
                and self._activates(node)
                and any(graph.before[node.index] >> m & 1 for m in skip)
            ):
                return True
        return False

    def _by_name(self, near: list[Node], gate: int) -> int:
        """Both or neither go through an activation: only a name can tell, else the first is the gate."""
        named = [
            i
            for i, n in enumerate(near)
            if "gate" in join(*self.graph.weight_key(n)).rpartition(".")[0].rpartition(".")[2]
        ]
        return named[0] if len(named) == 1 else gate

    def _is_expert(self, down: Node, block: str, routed: bool) -> bool:
        key = self.graph.weight_key(down)
        weight = self.weights.get(key)
        if weight is not None and weight.kind == "experts":
            return True
        return routed and self._expert_list(key[0], block) is not None

    def _expert_list(self, module: str, block: str) -> str | None:
        """The list of like modules, below the block, that `module` lies in."""
        name = module
        while name and name != block:
            above = parent(name)
            holder = self.model.get_submodule(above) if above else self.model
            if (
                isinstance(holder, nn.ModuleList | nn.ModuleDict)
                and above != parent(block)
                and len(holder) > 1
            ):
                kinds = {type(m) for m in holder.children()}
                if len(kinds) == 1 and inside(above, block):
                    return above
            name = above
        return None
