"""How a base knows where a token stands: rotary, relative or absolute positions, and a class token in
front."""

from __future__ import annotations

from veneer.anatomy._attention import Attention
from veneer.anatomy._findings import Findings, Stack
from veneer.anatomy._graph import ADDS, MULTIPLIES, RESHAPES, SAME, Graph


def read_positions(
    graph: Graph, found: Findings, attentions: list[Attention], entries: list[tuple[Stack, int | None]]
) -> None:
    """Fills `positions` and `class_token`; `entries` are the states that enter the first block of each
    stack."""
    reader = _Positions(graph)
    states = [entry for _, entry in entries if entry is not None]
    for entry in states:
        for node in graph.each(graph.before_value(entry)):
            if node.name in ("cat", "concat") and node.inputs and graph.values[node.inputs[0]].parameters:
                found.class_token = True
    if any(reader.rotates(a) for a in attentions):
        found.positions = "rotary"
    elif any(a.biased for a in attentions):
        found.positions = "relative"
    elif any(reader.adds_positions(entry) for entry in states):
        found.positions = "absolute"


class _Positions:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def rotates(self, attention: Attention) -> bool:
        """Queries are multiplied by something with a row for each position that no token made."""
        graph = self.graph
        near = sum(
            1 << n.index for n in graph.each(graph.near_value(attention.query)) if n.name != "embedding"
        )
        start = (near & -near).bit_length()
        tokens = graph.shape(attention.query)[-2:-1]
        for node in graph.each(graph.before_value(attention.query) >> start << start):
            if node.name not in MULTIPLIES or not graph.before[node.index] & near:
                continue
            for i in node.inputs:
                shape = graph.shape(i)
                table = len(shape) >= 2 and shape[-1] > 1 and tokens[0] in shape[:-1]
                free = not graph.before_value(i) & near and not graph.values[i].parameters
                if table and free and not self._from_input(i):
                    return True
        return False

    def adds_positions(self, entry: int) -> bool:
        """Something that is no form of the tokens (a parameter, a table, a second lookup) is added on the
        way in."""
        graph = self.graph
        for node in graph.each(graph.before_value(entry)):
            if node.name not in ADDS or len(node.inputs) < 2:
                continue
            shapes = [graph.shape(i) for i in node.inputs[:2]]
            if (
                len(shapes[0]) < 2
                or len(shapes[1]) < 2
                or shapes[0][-1] != shapes[1][-1]
                or shapes[1][-2] != shapes[0][-2]
            ):
                continue
            data = [bool(graph.near_value(i)) and self._from_input(i) for i in node.inputs[:2]]
            if any(data) and not all(data):
                return True
        return False

    def _from_input(self, value: int) -> bool:
        """Whether the nearest matrix calls read an input itself, not positions counted from it."""
        for node in self.graph.each(self.graph.near_value(value)):
            if node.name != "embedding":
                return True
            index = next((i for i in node.inputs if i not in node.weights), None)
            if (
                index is not None
                and self.graph.values[self.graph.same(index, SAME | RESHAPES | {"long"})].input_name
            ):
                return True
        return False
