"""Mix-and-match: a prefix in the attention, a parallel adapter at the MLP. He et al., 2022, arXiv:2110.04366.

    attention   K' = [P_K ; K], V' = [P_V ; V]      (the prefix that the network makes: the reference of prefix tuning)
    MLP         y <- y + s (U relu(D r + D_bias) + U_bias)

options: part = "attention" | "mlp", and the part's own. attention: tensors K, V (kv_heads, length, head_dim); inputs
q, k, v and mask as in prefix tuning. mlp: tensors D (m, d), D_bias, U (d, m), U_bias; inputs y and r (rows, tokens,
d), r the stream that the MLP starts from.
"""

import torch

from ._cases import Case, Draw, changed, mask_of, output_gradients
from ._loops import add, bottleneck, listed, tensor, times
from .prefix_tuning import reference as with_prefix


def cases() -> list[Case]:
    return [
        _attention(2800, "right", False),
        _attention(2801, "left", True),
        _mlp(2802, 4.0),
        _mlp(2803, 1.5),
    ]


def _attention(seed: int, padding: str, causal: bool) -> Case:
    draw = Draw(seed)
    heads, kv_heads, head_dim, length, tokens = 4, 2, 2, 2, 3
    return {
        "name": f"attention, padding {padding}, causal {causal}",
        "options": {"part": "attention", "length": length, "causal": causal},
        "base": {},
        "tensors": {name: draw(kv_heads, length, head_dim) for name in "KV"},
        "trained": ("K", "V"),
        "inputs": {
            "q": draw(2, heads, tokens, head_dim),
            "k": draw(2, kv_heads, tokens, head_dim),
            "v": draw(2, kv_heads, tokens, head_dim),
            "mask": mask_of([3, 2], tokens, padding),
        },
        "cotangent": draw(2, heads, tokens, head_dim),
    }


def _mlp(seed: int, scale: float) -> Case:
    draw = Draw(seed)
    width, m = 4, 3
    tensors = {
        "D": draw(m, width, scale=1.5), "D_bias": draw(m), "U": draw(width, m, scale=1.5), "U_bias": draw(width),
    }  # fmt: skip
    return {
        "name": f"mlp, scale {scale:g}",
        "options": {"part": "mlp", "scale": scale},
        "base": {},
        "tensors": tensors,
        "trained": tuple(tensors),
        "inputs": {"y": draw(2, 3, width), "r": draw(2, 3, width)},
        "cotangent": draw(2, 3, width),
    }


def reference(case: Case, read: str = "r", activation: str = "relu") -> dict:
    if case["options"]["part"] == "attention":
        return with_prefix(case)
    t = {name: listed(value) for name, value in case["tensors"].items()}
    output = listed(case["inputs"]["y"])
    for y_row, r_row in zip(output, listed(case["inputs"][read])):
        for place, r in enumerate(r_row):
            f = bottleneck(r, t["D"], t["D_bias"], t["U"], t["U_bias"], activation)
            y_row[place] = add(y_row[place], times(case["options"]["scale"], f))
    return {"output": tensor(output)}


def gradients(case: Case) -> dict:
    attention = case["options"]["part"] == "attention"
    return output_gradients(reference, case, ("q", "k", "v") if attention else ("y", "r"))


def _no_keys(case: Case) -> dict:
    if case["options"]["part"] == "mlp":
        return reference(case)
    return reference(changed(case, "tensors", K=torch.zeros_like(case["tensors"]["K"])))


MUTATIONS = [
    ("the adapter is serial", lambda case: reference(case, read="y")),
    ("the adapter is not scaled", lambda case: reference(changed(case, "options", scale=1.0))),
    ("another activation", lambda case: reference(case, activation="gelu")),
    ("the prefix has no keys", _no_keys),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
