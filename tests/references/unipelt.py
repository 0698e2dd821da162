"""UniPELT: prefix, adapter and LoRA, each behind a gate made from the input. Mao et al., 2021,
arXiv:2110.07577.

    adapter   y <- y + G f(y)                     G = mean over real tokens of sigmoid(gate . x + gate_bias)
    prefix    K' = [G P_K ; K], V' = [G P_V ; V]  G as above, from the attention's input x
    lora      y = W x + base_bias + g B A x       g = sigmoid(gate . x + gate_bias), per token, in place of
                                                  alpha / rank

In decoders (option causal) the mean at token t runs over the real tokens up to t, so that a prefix key has
another size for every query. options: part = "adapter" | "prefix" | "lora", causal, and the part's own.

tensors: adapter D (m, d), D_bias, U (d, m), U_bias, gate_adapter (d,), gate_adapter_bias (); prefix K, V
(kv_heads, length, head_dim), gate_prefix (d,), gate_prefix_bias (); lora A (rank, in), B (out, rank),
gate_lora (in,), gate_lora_bias (). inputs: x (rows, tokens, d): the MLP's input, the attention's input, the
linear's input; for the adapter also y (rows, tokens, d), the MLP's output; for the prefix q, k, v as in
prefix tuning; mask (rows, tokens) bool. Outputs at pads are 0: compare at real tokens only.
"""

import math

import torch

from ._cases import Case, Draw, changed, mask_of, output_gradients
from ._loops import add, bottleneck, dot, linear, listed, sigmoid, tensor, times, zeros
from .prefix_tuning import attend, visible_keys


def cases() -> list[Case]:
    found = []
    for seed, (part, causal, padding) in enumerate(
        [
            ("adapter", False, "right"),
            ("adapter", True, "left"),
            ("prefix", False, "left"),
            ("prefix", True, "right"),
            ("lora", False, "right"),
        ]
    ):
        draw = Draw(2000 + seed)
        rows, tokens, width = 2, 3, 4
        case = {
            "name": f"{part}, causal {causal}, padding {padding}",
            "options": {"part": part, "causal": causal},
            "base": {},
            "tensors": {f"gate_{part}": draw(width), f"gate_{part}_bias": draw()},
            "inputs": {"x": draw(rows, tokens, width), "mask": mask_of([3, 2], tokens, padding)},
        }
        if part == "adapter":
            m = 3
            case["options"]["activation"] = "silu"
            case["tensors"] |= {
                "D": draw(m, width),
                "D_bias": draw(m),
                "U": draw(width, m),
                "U_bias": draw(width),
            }
            case["inputs"]["y"] = draw(rows, tokens, width)
            case["cotangent"] = draw(rows, tokens, width)
        elif part == "prefix":
            heads, kv_heads, head_dim, length = 2, 1, 2, 2
            case["options"]["length"] = length
            case["tensors"] |= {name: draw(kv_heads, length, head_dim) for name in "KV"}
            case["inputs"] |= {name: draw(rows, kv_heads, tokens, head_dim) for name in "kv"}
            case["inputs"]["q"] = draw(rows, heads, tokens, head_dim)
            case["cotangent"] = draw(rows, heads, tokens, head_dim)
        else:
            n_out, rank = 3, 2
            case["options"]["rank"] = rank
            case["base"] = {"W": draw(n_out, width), "bias": draw(n_out)}
            case["tensors"] |= {"A": draw(rank, width), "B": draw(n_out, rank)}
            case["cotangent"] = draw(rows, tokens, n_out)
        case["trained"] = tuple(case["tensors"])
        found.append(case)
    return found


def gates(x, mask, weight, bias, causal: bool):
    """(tokens,): the mean gate that each token of one row sees; 0 at pads."""
    own = [sigmoid(dot(weight, state) + bias) for state in x]
    means = []
    for t, is_real in enumerate(mask):
        seen = [g for j, g in enumerate(own) if mask[j] and (j <= t or not causal)]
        means.append(sum(seen) / len(seen) if is_real else 0.0)
    return means


def reference(case: Case, gate_pads: bool = False, per_token: bool = False) -> dict:
    part = case["options"]["part"]
    t = {name: listed(value) for name, value in case["tensors"].items()}
    inputs = {name: listed(value) for name, value in case["inputs"].items()}
    weight, bias = t[f"gate_{part}"], t[f"gate_{part}_bias"]
    output = zeros(*case["cotangent"].shape)
    for row, mask in enumerate(inputs["mask"]):
        x = inputs["x"][row]
        counted = [True] * len(mask) if gate_pads else mask
        G = gates(x, counted, weight, bias, case["options"]["causal"])
        if part == "lora" or per_token:
            G = [sigmoid(dot(weight, state) + bias) for state in x]
        for token, is_real in enumerate(mask):
            if not is_real:
                continue
            if part == "adapter":
                y = inputs["y"][row][token]
                f = bottleneck(y, t["D"], t["D_bias"], t["U"], t["U_bias"], case["options"]["activation"])
                output[row][token] = add(y, times(G[token], f))
            elif part == "lora":
                W, base_bias = listed(case["base"]["W"]), listed(case["base"]["bias"])
                update = times(G[token], linear(linear(x[token], t["A"]), t["B"]))
                output[row][token] = add(linear(x[token], W, base_bias), update)
            else:
                for head, mixed in enumerate(_heads(case, t, inputs, row, token, G[token])):
                    output[row][head][token] = mixed
    return {"output": tensor(output)}


def _heads(case: Case, t: dict, inputs: dict, row: int, token: int, gate: float):
    """What each head gives at one query, with the prefix scaled by the gate."""
    q, k, v = (inputs[name][row] for name in "qkv")
    own = visible_keys(inputs["mask"][row], token, len(q[0]), case["options"]["causal"])
    found = []
    for head in range(len(q)):
        shared = head // (len(q) // len(k))
        keys = [times(gate, key) for key in t["K"][shared]] + k[shared]
        values = [times(gate, value) for value in t["V"][shared]] + v[shared]
        prefix = [True] * len(t["K"][shared])
        found.append(attend(q[head][token], keys, values, prefix + own, 1 / math.sqrt(len(q[head][token]))))
    return found


def gradients(case: Case) -> dict:
    inputs = {"adapter": ("x", "y"), "prefix": ("x", "q", "k", "v"), "lora": ("x",)}
    return output_gradients(reference, case, inputs[case["options"]["part"]])


def _gate_after(case: Case) -> dict:
    """The gate read from the output and not from the input."""
    if case["options"]["part"] != "adapter":
        return reference(case)
    return reference(changed(case, "inputs", x=case["inputs"]["y"]))


def _without_bias(case: Case) -> dict:
    name = f"gate_{case['options']['part']}_bias"
    return reference(changed(case, "tensors", **{name: torch.zeros_like(case["tensors"][name])}))


MUTATIONS = [
    ("the mean counts pads", lambda case: reference(case, gate_pads=True)),
    (
        "a decoder's mean sees the future",
        lambda case: reference(changed(case, "options", causal=False)),
    ),
    ("each token has its own gate", lambda case: reference(case, per_token=True)),
    ("the gate reads the sub-layer's output", _gate_after),
    ("the gate has no bias", _without_bias),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
