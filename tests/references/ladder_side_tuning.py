"""Ladder side tuning: a narrow network beside the frozen one, fed by its states. Sung et al., 2022,
arXiv:2206.06522.

    s = D_0 h_0 + D_0_bias
    for each kept block i, with mu = sigmoid(gate_i / 0.1):
        s <- mu s + (1 - mu) (D_i h_i + D_i_bias);    s <- block_i(s)
    h' = U LN(s) + U_bias                what the frozen head reads in place of the last state
    block(s):  s <- s + O_i attention(LN1_i(s));   s <- s + mlp_down_i act(mlp_up_i LN2_i(s))

h_0 is the embedding, h_i block i's output (i from 1), detached: no gradient reaches them. Attention is that
of the base at the side's width w: causal or not, its number of heads, scale 1 / sqrt(w / heads), pads masked
as keys. All linears have biases; norms are layer norms with eps 1e-5. inputs: h_0, h_1, ... (rows, tokens,
d), mask (rows, tokens) bool. options: kept (block numbers), heads, causal, activation. Output (rows, tokens,
d), 0 at pads.

tensors: D_0 (w, d), D_0_bias; per kept block i D_i, D_i_bias, gate_i () and "i.norm1" (w,), norm1_bias, query
(w, w), query_bias, key, value, out alike, norm2, norm2_bias, mlp_up (f, w), mlp_up_bias, mlp_down (w, f),
mlp_down_bias; norm (w,), norm_bias, U (d, w), U_bias. Key biases have no gradient.
"""

import math

from ._cases import Case, Draw, changed, mask_of, output_gradients
from ._loops import ACTIVATIONS, add, layer_norm, linear, listed, sigmoid, tensor, times
from .prefix_tuning import attend, visible_keys


def cases() -> list[Case]:
    found = []
    for seed, (kept, heads, causal, padding, activation) in enumerate(
        [((1, 2), 2, True, "right", "gelu_new"), ((2,), 1, False, "left", "gelu")]
    ):
        draw = Draw(2300 + seed)
        width, w, f, rows, tokens = 5, 4 if heads == 2 else 3, 3, 2, 3
        tensors = {"D_0": draw(w, width), "D_0_bias": draw(w)}
        for i in kept:
            tensors |= {f"D_{i}": draw(w, width), f"D_{i}_bias": draw(w), f"gate_{i}": draw(scale=0.1)}
            for norm in ("norm1", "norm2"):
                tensors |= {f"{i}.{norm}": draw(w), f"{i}.{norm}_bias": draw(w)}
            for name in ("query", "key", "value", "out"):
                tensors |= {f"{i}.{name}": draw(w, w), f"{i}.{name}_bias": draw(w)}
            tensors |= {f"{i}.mlp_up": draw(f, w), f"{i}.mlp_up_bias": draw(f)}
            tensors |= {f"{i}.mlp_down": draw(w, f), f"{i}.mlp_down_bias": draw(w)}
        tensors |= {"norm": draw(w), "norm_bias": draw(w), "U": draw(width, w), "U_bias": draw(width)}
        found.append(
            {
                "name": f"blocks {kept}, {heads} heads, causal {causal}, padding {padding}",
                "options": {"kept": kept, "heads": heads, "causal": causal, "activation": activation},
                "base": {},
                "tensors": tensors,
                "trained": tuple(tensors),
                "null_gradient": tuple(f"{i}.key_bias" for i in kept),
                "inputs": {
                    **{f"h_{i}": draw(rows, tokens, width) for i in range(3)},
                    "mask": mask_of([3, 2], tokens, padding),
                },
                "cotangent": draw(rows, tokens, width),
            }
        )
    return found


def side_block(t: dict, i: int, s, mask, options: dict):
    """One row's (tokens, w) through block i of the side network."""

    def named(name):
        return t[f"{i}.{name}"], t[f"{i}.{name}_bias"]

    heads, tokens = options["heads"], len(s)
    size = len(s[0]) // heads
    normed = [layer_norm(state, *named("norm1")) for state in s]
    q, k, v = ([linear(state, *named(name)) for state in normed] for name in ("query", "key", "value"))
    mixed = []
    for token in range(tokens):
        joined = []
        visible = visible_keys(mask, token, tokens, options["causal"])
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            keys, values = [key[cut] for key in k], [value[cut] for value in v]
            if mask[token]:
                joined += attend(q[token][cut], keys, values, visible, 1 / math.sqrt(size))
            else:
                joined += [0.0] * size
        mixed.append(add(s[token], linear(joined, *named("out"))))
    act = ACTIVATIONS[options["activation"]]
    out = []
    for state in mixed:
        inner = [act(a) for a in linear(layer_norm(state, *named("norm2")), *named("mlp_up"))]
        out.append(add(state, linear(inner, *named("mlp_down"))))
    return out


def reference(case: Case, swap: bool = False, temperature: float = 0.1, shift: int = 0) -> dict:
    """swap: mu and 1 - mu; shift: which tap a block reads, relative to its own output."""
    t = {name: listed(value) for name, value in case["tensors"].items()}
    options = case["options"]
    output = []
    for row, mask in enumerate(listed(case["inputs"]["mask"])):
        taps = [listed(case["inputs"][f"h_{i}"])[row] for i in range(3)]
        s = [linear(state, t["D_0"], t["D_0_bias"]) for state in taps[0]]
        for i in options["kept"]:
            mu = sigmoid(t[f"gate_{i}"] / temperature)
            mu = 1 - mu if swap else mu
            fed = [linear(state, t[f"D_{i}"], t[f"D_{i}_bias"]) for state in taps[i + shift]]
            s = [add(times(mu, old), times(1 - mu, new)) for old, new in zip(s, fed)]
            s = side_block(t, i, s, mask, options)
        ends = [linear(layer_norm(state, t["norm"], t["norm_bias"]), t["U"], t["U_bias"]) for state in s]
        output.append([end if real else [0.0] * len(end) for end, real in zip(ends, mask)])
    return {"output": tensor(output)}


def gradients(case: Case) -> dict:
    """No taps: they are detached."""
    return output_gradients(reference, case, ())


MUTATIONS = [
    ("the gate weighs the base and not the side", lambda case: reference(case, swap=True)),
    ("the gate has no temperature", lambda case: reference(case, temperature=1.0)),
    ("a block reads what entered the base's block", lambda case: reference(case, shift=-1)),
    (
        "the side sees the future, or does not see it",
        lambda case: reference(changed(case, "options", causal=not case["options"]["causal"])),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
