"""BitFit: train the bias vectors alone. Ben Zaken et al., 2021, arXiv:2106.10199.

    linear   y = W x + base_bias + b
    norm     y = weight * normalised(x) + base_bias + b

b (out,) is the change of the base's own bias, zero at the start: the trained bias is base_bias + b. base: W
(out, in) and bias (out,); for a norm: weight (width,), bias (width,), eps. inputs: x (rows, tokens, in).
options: kind. `reference` also gives trained_bias.
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, every_token, layer_norm, linear, listed, tensor


def cases() -> list[Case]:
    found = []
    for seed, (kind, n_in, n_out) in enumerate([("linear", 5, 3), ("linear", 3, 4), ("norm", 4, 4)]):
        draw = Draw(600 + seed)
        base = {"bias": draw(n_out)}
        base |= {"W": draw(n_out, n_in)} if kind == "linear" else {"weight": draw(n_out), "eps": 1e-5}
        found.append(
            {
                "name": f"{kind}, {n_in} to {n_out}",
                "options": {"kind": kind},
                "base": base,
                "tensors": {"b": draw(n_out)},
                "trained": ("b",),
                "inputs": {"x": draw(2, 3, n_in)},
                "cotangent": draw(2, 3, n_out),
            }
        )
    return found


def reference(case: Case) -> dict:
    base = case["base"]
    bias = add(listed(base["bias"]), listed(case["tensors"]["b"]))

    def layer(token):
        if case["options"]["kind"] == "linear":
            return linear(token, listed(base["W"]), bias)
        return layer_norm(token, listed(base["weight"]), bias, base["eps"])

    return {
        "output": tensor(every_token(layer, listed(case["inputs"]["x"]))),
        "trained_bias": tensor(bias),
    }


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


MUTATIONS = [
    (
        "b replaces the base's bias",
        lambda case: reference(changed(case, "base", bias=0 * case["base"]["bias"])),
    ),
    (
        "b is subtracted",
        lambda case: reference(changed(case, "tensors", b=-case["tensors"]["b"])),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
