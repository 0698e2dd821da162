"""LLaMA-Adapter: gated attention to learned prompts, with a softmax of its own. Zhang et al., 2023,
arXiv:2303.16199.

    o = softmax(q K^T / sqrt(head_dim) + mask) V + g softmax(q K_A^T / sqrt(head_dim)) V_A
    K_A = A W_K^T + b_K        V_A = A W_V^T + b_V        A: the prompt, through the frozen projections

K_A gets no rotation (and b_K shifts all its scores alike, so it cancels); every query sees all of it.
tensors: prompt (length, width), gate. options: gate = "head_tanh" (gate (heads,), g = tanh(gate) of its head)
or "layer" (gate (), g = gate), causal. base: key_W (kv_heads head_dim, width), key_bias, value_W, value_bias
(None where there is none), out_W (width, heads head_dim), out_bias. inputs: q (rows, heads, queries,
head_dim), k, v (rows, kv_heads, keys, head_dim), mask (rows, keys) bool, as for prefixes.

output: (rows, heads, queries, head_dim) before attn.out, 0 at the queries of pads. projected: (rows, queries,
width) after it, the same whether the gated part is added before attn.out or behind it, the bias counted once.
"""

import math

import torch

from ._cases import Case, Draw, changed, mask_of, output_gradients
from ._loops import add, dot, linear, listed, softmax, tensor, times, zeros
from .prefix_tuning import attend, visible_keys


def cases() -> list[Case]:
    found = []
    for seed, (heads, kv_heads, length, gate, padding, causal, bias) in enumerate(
        [
            (2, 2, 2, "head_tanh", "right", True, False),
            (4, 2, 3, "head_tanh", "left", True, True),
            (2, 2, 2, "layer", "left", False, True),
            (2, 1, 1, "layer", "right", True, False),
        ]
    ):
        draw = Draw(1700 + seed)
        rows, tokens, width, head_dim = 2, 3, 3, 2
        found.append(
            {
                "name": f"{heads} heads on {kv_heads}, gate by {gate}, {padding}, causal {causal}",
                "options": {"length": length, "gate": gate, "causal": causal},
                "base": {
                    "key_W": draw(kv_heads * head_dim, width),
                    "key_bias": draw(kv_heads * head_dim) if bias else None,
                    "value_W": draw(kv_heads * head_dim, width),
                    "value_bias": draw(kv_heads * head_dim) if bias else None,
                    "out_W": draw(width, heads * head_dim),
                    "out_bias": draw(width),
                },
                "tensors": {
                    "prompt": draw(length, width),
                    "gate": draw(heads) if gate == "head_tanh" else draw(),
                },
                "trained": ("prompt", "gate"),
                "inputs": {
                    "q": draw(rows, heads, tokens, head_dim),
                    "k": draw(rows, kv_heads, tokens, head_dim),
                    "v": draw(rows, kv_heads, tokens, head_dim),
                    "mask": mask_of([tokens, tokens - 1], tokens, padding),
                },
                "cotangent": draw(rows, heads, tokens, head_dim),
            }
        )
    return found


def reference(case: Case, one_softmax: bool = False, squash=math.tanh) -> dict:
    base = {name: listed(value) for name, value in case["base"].items()}
    q, k, v, mask = (listed(case["inputs"][name]) for name in ("q", "k", "v", "mask"))
    prompt, gate = listed(case["tensors"]["prompt"]), listed(case["tensors"]["gate"])
    heads, kv_heads, queries, head_dim = len(q[0]), len(k[0]), len(q[0][0]), len(q[0][0][0])
    scale = 1 / math.sqrt(head_dim)
    keys = [linear(row, base["key_W"], base["key_bias"]) for row in prompt]
    values = [linear(row, base["value_W"], base["value_bias"]) for row in prompt]

    output = zeros(*case["inputs"]["q"].shape)
    projected = zeros(len(q), queries, len(base["out_W"]))
    for row in range(len(q)):
        for query in range(queries):
            if not mask[row][len(mask[row]) - queries + query]:
                continue
            own = visible_keys(mask[row], query, queries, case["options"]["causal"])
            for head in range(heads):
                shared = head // (heads // kv_heads)
                cut = slice(shared * head_dim, (shared + 1) * head_dim)
                g = squash(gate[head]) if case["options"]["gate"] == "head_tanh" else gate
                K_A, V_A = [key[cut] for key in keys], [value[cut] for value in values]
                now = q[row][head][query]
                if one_softmax:
                    everything = [True] * len(K_A) + own
                    V_A = [times(g, value) for value in V_A]
                    mixed = attend(now, K_A + k[row][shared], V_A + v[row][shared], everything, scale)
                else:
                    weights = softmax([scale * dot(now, key) for key in K_A])
                    extra = [sum(w * value[c] for w, value in zip(weights, V_A)) for c in range(head_dim)]
                    mixed = add(attend(now, k[row][shared], v[row][shared], own, scale), times(g, extra))
                output[row][head][query] = mixed
            joined = [entry for head in range(heads) for entry in output[row][head][query]]
            projected[row][query] = linear(joined, base["out_W"], base["out_bias"])
    return {"output": tensor(output), "projected": tensor(projected)}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case, ("q", "k", "v"))


def _layer_gate_squashed(case: Case) -> dict:
    if case["options"]["gate"] != "layer":
        return reference(case)
    return reference(changed(case, "tensors", gate=torch.tanh(case["tensors"]["gate"])))


MUTATIONS = [
    ("one softmax over both", lambda case: reference(case, one_softmax=True)),
    ("the head's gate without tanh", lambda case: reference(case, squash=lambda gate: gate)),
    ("the layer's gate with tanh", _layer_gate_squashed),
    (
        "the prompt misses the bias of the value projection",
        lambda case: reference(changed(case, "base", value_bias=None)),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
