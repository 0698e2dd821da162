"""Finding attention in a tape: the calls that make it, their queries, keys and values, and who projects them.

Attention is either one call (`scaled_dot_product_attention` and its kin, `multi_head_attention_forward`)
or a softmax over a product of two hidden states, followed by a product with a third.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.anatomy._graph import Graph
from veneer.anatomy._rows import Rows, ranges_of
from veneer.anatomy._trace import MATRIX_CALLS, Node

_SOFTMAX = {"softmax", "_softmax", "sparsemax", "entmax"}


@dataclass
class Attention:
    """One attention of the forward. q, k, v are values of the tape."""

    start: int  # node of the first product
    end: Node  # the node that gives its output
    core: str
    query: int
    key: int
    value: int
    causal: bool
    biased: bool  # scores get a learned or position-dependent bias
    multihead: bool = False  # torch's own: projections are inside of the call


def find_attentions(graph: Graph) -> list[Attention]:
    """All attentions, in the order of the forward."""
    found = []
    for node in graph.nodes:
        if node.name == "multi_head_attention_forward":
            found.append(_from_multihead(graph, node))
        elif graph.is_attention_call(node):
            found += _from_call(graph, node)
        elif node.name in _SOFTMAX:
            found += _from_softmax(graph, node)
    return found


def _from_multihead(graph: Graph, node: Node) -> Attention:
    q, k, v = node.inputs[:3]
    mask = next((graph.values[i].tensor for i in node.inputs[3:] if graph.values[i].tensor.ndim >= 2
                 and not graph.values[i].parameters), None)  # fmt: skip
    causal = bool(node.kwargs.get("is_causal")) or _is_causal_mask(mask)
    return Attention(node.index, node, node.module, q, k, v, causal, False, multihead=True)


def _from_call(graph: Graph, node: Node) -> list[Attention]:
    floats = [i for i in node.inputs if graph.values[i].tensor.is_floating_point()]
    if len(floats) < 3:
        return []
    q, k, v = floats[:3]
    masks = [i for i in node.inputs if i not in (q, k, v) and graph.values[i].tensor.ndim >= 2]
    causal = bool(node.kwargs.get("is_causal") or node.kwargs.get("causal"))
    causal = causal or (len(node.args) > 5 and node.args[5] is True)
    biased = False
    for mask in masks:
        tensor = graph.values[mask].tensor
        causal = causal or _is_causal_mask(tensor)
        biased = biased or _is_bias(tensor) or (tensor.is_floating_point() and graph.parameter_made(mask))
    return [Attention(node.index, node, node.module, q, k, v, causal, biased)]


def _is_causal_mask(mask: Tensor | None) -> bool:
    """Nothing above the diagonal is open, and the diagonal is."""
    if mask is None or mask.ndim < 2 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False
    closed = ~mask if mask.dtype == torch.bool else mask <= -1e4
    n = mask.shape[-1]
    upper = torch.ones(n, n, dtype=torch.bool, device=mask.device).triu(1)
    return bool(closed[..., upper].all()) and not bool(closed.diagonal(dim1=-2, dim2=-1).all())


def _is_bias(mask: Tensor) -> bool:
    """A float added to the scores that is more than open (0) and closed (very negative)."""
    if not mask.is_floating_point():
        return False
    return bool(((mask != 0) & (mask > -1e4)).any())


def _from_softmax(graph: Graph, node: Node) -> list[Attention]:
    scores = _product_before(graph, node)
    if scores is None:
        return []
    after = _product_after(graph, node)
    if after is None:
        return []
    end, value, used = after
    q, k = _operands(scores)
    probabilities = graph.values[used].tensor  # without the columns of attention sinks
    causal = False
    if probabilities.ndim >= 2 and probabilities.shape[-1] == probabilities.shape[-2] > 1:
        n = probabilities.shape[-1]
        upper = torch.ones(n, n, dtype=torch.bool, device=probabilities.device).triu(1)
        causal = bool((probabilities[..., upper] == 0).all())
    between = graph.before[node.index] & ~graph.before[scores.index]
    biased = scores.name == "baddbmm" and _is_bias(graph.values[scores.inputs[0]].tensor)
    for step in graph.each(between):
        if (
            step.name in ("add", "__add__", "__iadd__", "add_", "__radd__")
            and graph.before[step.index] >> scores.index & 1
        ):
            others = [i for i in step.inputs if not graph.before_value(i) >> scores.index & 1]
            biased = biased or any(
                _is_bias(graph.values[i].tensor) or graph.parameter_made(i) for i in others
            )
    return [
        Attention(
            scores.index,
            end,
            node.module if end.module == node.module else end.module,
            q,
            k,
            value,
            causal,
            biased,
        )
    ]


def _operands(node: Node) -> tuple[int, int]:
    inputs = node.inputs[1:] if node.name in ("baddbmm", "addmm") else node.inputs
    return inputs[0], inputs[1]


def _product_before(graph: Graph, softmax: Node) -> Node | None:
    """The product of two hidden states whose scores this softmax takes; the first, where several are
    added."""
    found, todo, seen = [], [softmax], set()
    while todo:
        node = todo.pop()
        for i in node.inputs:
            made = graph.producer(i)
            if made is None or made.index in seen or not graph.values[i].tensor.is_floating_point():
                continue
            seen.add(made.index)
            if made.name in MATRIX_CALLS and not made.weights:
                q, k = _operands(made)
                if graph.values[q].live and graph.values[k].live:
                    found.append(made)
            elif not made.weights:
                todo.append(made)
    return min(found, key=lambda n: n.index) if found else None


def _product_after(graph: Graph, softmax: Node) -> tuple[Node, int, int] | None:
    """(the product of the probabilities with the values, the values, the probabilities)"""
    todo = list(softmax.outputs)
    seen: set[int] = set()
    while todo:
        value = todo.pop(0)
        for node in graph.consumers.get(value, []):
            if node.index in seen or len(seen) > 40:
                continue
            seen.add(node.index)
            if node.name in MATRIX_CALLS:
                if node.weights:
                    continue
                left, right = _operands(node)
                return node, right if left == value else left, value
            todo += node.outputs
    return None


def projections(
    graph: Graph, value: int, region: range
) -> list[tuple[Node, tuple[tuple[int, int], ...] | None, int]]:
    """(matrix call, its rows, how many) that make queries, keys or values; the largest share first."""
    found = []
    for node in graph.each(graph.near_value(value)):
        if node.index not in region or not node.weights or node.name == "embedding":
            continue
        size = graph.shape(node.outputs[0])[graph.feature_axis(node)]
        ranges = ranges_of(Rows(graph).of(value, node.index), size)
        count = size if not ranges else sum(b - a for a, b in ranges)
        found.append((node, ranges, count))
    return sorted(found, key=lambda item: (-item[2], item[0].index))


def heads_of(graph: Graph, attention: Attention, counts: dict[str, int]) -> tuple[int, int, int]:
    """(query heads, key and value heads, size of a head) from the shapes at the call and the rows
    projected."""
    shape_q, shape_k, shape_v = (graph.shape(i) for i in (attention.query, attention.key, attention.value))
    size = shape_q[-1]
    counted = counts.get("query", 0)
    heads = shape_q[-3] if len(shape_q) >= 3 else 1
    if counted and counted % size == 0:
        heads = counted // size
    kv_heads = shape_v[-3] if len(shape_v) >= 3 else heads
    counted = counts.get("key", 0)
    if counted and counted % size == 0:
        kv_heads = counted // size
    del shape_k
    return heads, min(kv_heads, heads), size
