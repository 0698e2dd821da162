"""Prefix tuning: learned keys and values before the model's own. Li and Liang, 2021, arXiv:2101.00190.

    K' = [P_K ; K]     V' = [P_V ; V]     o = softmax(q K'^T / sqrt(head_dim) + mask) V'

Every query sees the whole prefix; learned keys get no rotation. tensors: K, V (kv_heads, length, head_dim).
inputs: q (rows, heads, queries, head_dim), k and v (rows, kv_heads, keys, head_dim), mask (rows, keys) bool;
with a cache there are more keys than queries and the queries are the last. Query head h reads key head h //
(heads / kv_heads). options: length, causal. output (rows, heads, queries, head_dim), 0 at the queries of
pads: compare at real tokens only.

Reparametrised cases (options projected=True) make K and V of all layers from tensors E (length, d), D (h, d),
D_bias (h,), U (2 layers kv_heads head_dim, h), U_bias: a row of U tanh(D e + D_bias) + U_bias is read as
(layer, key or value, kv_head, head_dim). Their output is (layers, 2, kv_heads, length, head_dim), and they
have no x.
"""

import math

import torch

from ._cases import Case, Draw, changed, mask_of, output_gradients
from ._loops import bottleneck, dot, listed, softmax, tensor, zeros


def cases() -> list[Case]:
    return _attention_cases() + [_projected_case()]


def _attention_cases() -> list[Case]:
    found = []
    for seed, (heads, kv_heads, head_dim, length, queries, keys, padding, causal) in enumerate(
        [
            (2, 2, 3, 2, 4, 4, "right", False),
            (2, 2, 2, 1, 4, 4, "left", True),
            (4, 2, 2, 3, 3, 3, "right", True),
            (3, 1, 2, 2, 3, 3, "left", False),
            (2, 1, 3, 2, 1, 4, "left", True),
        ]
    ):
        draw = Draw(1000 + seed)
        rows = 2
        found.append(
            {
                "name": f"{heads} heads on {kv_heads}, {queries} of {keys} keys, {padding}, causal {causal}",
                "options": {"length": length, "causal": causal},
                "base": {},
                "tensors": {
                    "K": draw(kv_heads, length, head_dim),
                    "V": draw(kv_heads, length, head_dim),
                },
                "trained": ("K", "V"),
                "inputs": {
                    "q": draw(rows, heads, queries, head_dim),
                    "k": draw(rows, kv_heads, keys, head_dim),
                    "v": draw(rows, kv_heads, keys, head_dim),
                    "mask": mask_of([keys, keys - 1], keys, padding),
                },
                "cotangent": draw(rows, heads, queries, head_dim),
            }
        )
    return found


def _projected_case() -> Case:
    draw = Draw(1020)
    layers, kv_heads, head_dim, length, width, hidden = 2, 2, 2, 3, 3, 4
    names = ("E", "D", "D_bias", "U", "U_bias")
    shapes = [(length, width), (hidden, width), (hidden,), (2 * layers * kv_heads * head_dim, hidden)]
    shapes.append((2 * layers * kv_heads * head_dim,))
    return {
        "name": "made by an MLP",
        "options": {
            "projected": True,
            "layers": layers,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "length": length,
        },
        "base": {},
        "tensors": {name: draw(*shape) for name, shape in zip(names, shapes)},
        "trained": names,
        "inputs": {},
        "cotangent": draw(layers, 2, kv_heads, length, head_dim),
    }


def attend(q, keys, values, visible, scale: float):
    """One query over the keys that it sees: (head_dim,) -> (head_dim,)"""
    places = [j for j, sees in enumerate(visible) if sees]
    weights = softmax([scale * dot(q, keys[j]) for j in places])
    return [sum(w * values[j][c] for w, j in zip(weights, places)) for c in range(len(values[0]))]


def visible_keys(mask, query: int, queries: int, causal: bool):
    """Which of the model's own keys query number `query` sees; the queries are the last of the keys."""
    now = len(mask) - queries + query
    return [real and (not causal or j <= now) for j, real in enumerate(mask)]


def _attention(case: Case, prefix_is_causal: bool = False, scale: float = 1.0, group=None) -> dict:
    q, k, v, mask = (listed(case["inputs"][name]) for name in ("q", "k", "v", "mask"))
    K, V = listed(case["tensors"]["K"]), listed(case["tensors"]["V"])
    heads, kv_heads, queries = len(q[0]), len(k[0]), len(q[0][0])
    scale = scale / math.sqrt(len(q[0][0][0]))
    output = zeros(*case["inputs"]["q"].shape)
    for row in range(len(q)):
        for head in range(heads):
            shared = head // (heads // kv_heads) if group is None else group(head, kv_heads)
            for query in range(queries):
                if not mask[row][len(mask[row]) - queries + query]:
                    continue
                own = visible_keys(mask[row], query, queries, case["options"]["causal"])
                prefix = [not prefix_is_causal or j <= query for j in range(len(K[shared]))]
                output[row][head][query] = attend(
                    q[row][head][query],
                    K[shared] + k[row][shared],
                    V[shared] + v[row][shared],
                    prefix + own,
                    scale,
                )
    return {"output": tensor(output)}


def _projected(case: Case, value_first: bool = False) -> dict:
    t = {name: listed(value) for name, value in case["tensors"].items()}
    o = case["options"]
    made = zeros(o["layers"], 2, o["kv_heads"], o["length"], o["head_dim"])
    for position, row in enumerate(t["E"]):
        flat = iter(bottleneck(row, t["D"], t["D_bias"], t["U"], t["U_bias"], "tanh"))
        for layer in range(o["layers"]):
            for kind in (1, 0) if value_first else (0, 1):
                for head in range(o["kv_heads"]):
                    for c in range(o["head_dim"]):
                        made[layer][kind][head][position][c] = next(flat)
    return {"output": tensor(made)}


def reference(case: Case) -> dict:
    return _projected(case) if case["options"].get("projected") else _attention(case)


def gradients(case: Case) -> dict:
    inputs = () if case["options"].get("projected") else ("q", "k", "v")
    return output_gradients(reference, case, inputs)


def _attention_with(**options):
    return lambda case: reference(case) if case["options"].get("projected") else _attention(case, **options)


def _added_beside(case: Case) -> dict:
    """Values without their keys: each prefix key zero."""
    if case["options"].get("projected"):
        return reference(case)
    return reference(changed(case, "tensors", K=torch.zeros_like(case["tensors"]["K"])))


MUTATIONS = [
    ("the causal mask is laid over the prefix", _attention_with(prefix_is_causal=True)),
    ("scores are not divided by sqrt(head_dim)", _attention_with(scale=2.0)),
    ("key heads are taken in turn, not in groups", _attention_with(group=lambda head, kv: head % kv)),
    ("zero keys", _added_beside),
    (
        "values before keys in the projection",
        lambda case: (
            _projected(case, value_first=True) if case["options"].get("projected") else reference(case)
        ),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
