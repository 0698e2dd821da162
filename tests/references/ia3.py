"""(IA)^3: scale an output, or an input, by a learned vector. Liu et al., 2022, arXiv:2205.05638.

    output side (attention keys and values)          y = scale * (W x + base_bias)        scale: (out,)
    input side (what enters the MLP's last linear)   y = W (scale * x) + base_bias        scale: (in,)

base: W (out, in), bias (out,) or None. tensors: scale. options: side = "output" | "input". inputs: x (rows,
tokens, in). The reference also gives the merged layer: merged_W, and merged_bias where the base has a bias.
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import every_token, linear, listed, tensor, times


def cases() -> list[Case]:
    found = []
    for seed, (name, n_in, n_out, bias, side) in enumerate(
        [
            ("output, bias", 5, 3, True, "output"),
            ("output, no bias", 3, 4, False, "output"),
            ("input, bias", 5, 3, True, "input"),
            ("input, no bias", 3, 4, False, "input"),
        ]
    ):
        draw = Draw(400 + seed)
        found.append(
            {
                "name": name,
                "options": {"side": side},
                "base": {"W": draw(n_out, n_in), "bias": draw(n_out) if bias else None},
                "tensors": {"scale": draw(n_out if side == "output" else n_in)},
                "trained": ("scale",),
                "inputs": {"x": draw(2, 3, n_in)},
                "cotangent": draw(2, 3, n_out),
            }
        )
    return found


def reference(case: Case) -> dict:
    W, bias = listed(case["base"]["W"]), listed(case["base"]["bias"])
    scale, side = listed(case["tensors"]["scale"]), case["options"]["side"]

    def layer(token):
        if side == "input":
            return linear([a * s for a, s in zip(token, scale)], W, bias)
        return [a * s for a, s in zip(linear(token, W, bias), scale)]

    if side == "input":
        merged_W = [[w * s for w, s in zip(row, scale)] for row in W]
        merged_bias = bias
    else:
        merged_W = [times(s, row) for row, s in zip(W, scale)]
        merged_bias = None if bias is None else [b * s for b, s in zip(bias, scale)]
    found = {
        "output": tensor(every_token(layer, listed(case["inputs"]["x"]))),
        "merged_W": tensor(merged_W),
    }
    return found if merged_bias is None else {**found, "merged_bias": tensor(merged_bias)}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _bias_not_scaled(case: Case) -> dict:
    if case["options"]["side"] == "input" or case["base"]["bias"] is None:
        return reference(case)
    return reference(changed(case, "base", bias=case["base"]["bias"] / case["tensors"]["scale"]))


def _bias_scaled_on_the_input_side(case: Case) -> dict:
    bias = case["base"]["bias"]
    if case["options"]["side"] == "output" or bias is None:
        return reference(case)
    n_out = len(bias)
    longer = case["tensors"]["scale"].repeat(n_out)[:n_out]
    return reference(changed(case, "base", bias=bias * longer))


MUTATIONS = [
    ("the bias is not scaled with the output", _bias_not_scaled),
    ("the bias is scaled although the input is", _bias_scaled_on_the_input_side),
    (
        "1 + scale",
        lambda case: reference(changed(case, "tensors", scale=case["tensors"]["scale"] + 1)),
    ),
    (
        "scaled twice",
        lambda case: reference(changed(case, "tensors", scale=case["tensors"]["scale"] ** 2)),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
