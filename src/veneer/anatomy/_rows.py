"""Which rows of a projection a value carries: the forward is run again on the numbers of the features.

Between a fused projection and the place where queries, keys or halves of an MLP are used lie only moves
(views, splits, transpositions, a cache, writes into a view) and arithmetic that keeps the shape (rotation,
norms). Moves move the numbers, arithmetic keeps them; what is left over at the end says which rows of the
weight were used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.anatomy._graph import MOVES, Graph
from veneer.anatomy._trace import Node, Ref


class Rows:
    """Feature numbers along a tape."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def of(self, value: int, origin: int) -> Tensor | None:
        """Which output features of matrix call `origin` stand where in `value` (-1: from elsewhere); None:
        unknown.

        The calls between the two are run again on the numbers of the features: moves move them, all that
        keeps the shape keeps them.
        """
        return self._rows(value, origin, {})

    def _rows(self, value: int, origin: int, seen: dict[int, Tensor | None]) -> Tensor | None:
        if value in seen:
            return seen[value]
        seen[value] = None
        node = self.graph.producer(value)
        if node is None or not self.graph.before[node.index] >> origin & 1:
            return None
        shape = self.graph.shape(value)
        if node.index == origin:
            axis = self.graph.feature_axis(node)
            features = torch.arange(shape[axis])
            view = [1] * len(shape)
            view[axis] = -1
            result: Tensor | None = features.view(view).expand(shape).contiguous()
        elif node.weights or self.graph.near[node.index] == 1 << node.index:
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
        write = node if node.name == "__setitem__" else self.graph.producer(node.inputs[1])
        if write is None or not write.args:
            return None
        view = out
        if node.name == "write_view":
            made = self.graph.producer(write.inputs[0])
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
                tensor = self.graph.values[item.value].tensor
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
            out = node.func(*args, **kwargs)  # type: ignore
        except Exception:  # an argument that numbers of features cannot stand for
            return None
        if isinstance(out, Tensor):
            return out
        return (
            out[node.outputs.index(value)]
            if value in node.outputs and len(out) == len(node.outputs)
            else None
        )


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
