"""SSF: scale and shift what an operation gives. Lian et al., 2022, arXiv:2210.08823.

    y = (W x + bias) * scale + shift       merged: W'_ij = scale_i W_ij, bias'_i = scale_i bias_i + shift_i

tensors: scale (out,), and shift (out,) where there is one. inputs: x (rows, tokens, in). base: W (out, in), bias
(out,) or None. Options: shift. A norm's case has base gain and bias in place of W, and its merged form scales them.
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import every_token, layer_norm, linear, listed, tensor


def cases() -> list[Case]:
    found = []
    for seed, (kind, n_in, n_out, shift, bias) in enumerate(
        [
            ("linear", 4, 3, True, True),
            ("linear", 2, 5, True, True),
            ("linear", 3, 4, False, False),
            ("norm", 4, 4, True, True),
        ]
    ):
        draw = Draw(2500 + seed)
        base = {"bias": draw(n_out) if bias else None}
        base["W" if kind == "linear" else "gain"] = draw(n_out, n_in) if kind == "linear" else draw(n_out)
        tensors = {"scale": draw(n_out, mean=1.0)}
        if shift:
            tensors["shift"] = draw(n_out)
        found.append(
            {
                "name": f"{kind}, {n_in} to {n_out}, shift {shift}, bias {bias}",
                "options": {"kind": kind, "shift": shift},
                "base": base,
                "tensors": tensors,
                "trained": tuple(tensors),
                "inputs": {"x": draw(2, 3, n_in)},
                "cotangent": draw(2, 3, n_out),
            }
        )
    return found


def reference(case: Case, before: bool = False, power: int = 1) -> dict:
    """before: the shift is scaled too; power: of the scale."""
    base, options = case["base"], case["options"]
    scale = [value**power for value in listed(case["tensors"]["scale"])]
    shift = listed(case["tensors"]["shift"]) if options["shift"] else [0.0] * len(scale)
    bias = listed(base["bias"]) or [0.0] * len(scale)

    def edited(x):
        if options["kind"] == "norm":
            y = layer_norm(x, listed(base["gain"]), bias)
        else:
            y = linear(x, listed(base["W"]), bias)
        return [s * (a + b) if before else s * a + b for a, s, b in zip(y, scale, shift)]

    found = {"output": tensor(every_token(edited, listed(case["inputs"]["x"])))}
    if options["kind"] == "linear":
        found["merged_W"] = tensor([[s * w for w in row] for s, row in zip(scale, listed(base["W"]))])
    else:
        found["merged_W"] = tensor([s * g for s, g in zip(scale, listed(base["gain"]))])
    if base["bias"] is not None:
        found["merged_bias"] = tensor([s * b + a for s, b, a in zip(scale, bias, shift)])
    return found


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _no_shift(case: Case) -> dict:
    return reference(changed(case, "options", shift=False))


MUTATIONS = [
    ("the shift is left out", _no_shift),
    ("the shift is scaled too", lambda case: reference(case, before=True)),
    ("the scale is applied twice", lambda case: reference(case, power=2)),
    (
        "the bias is not scaled",
        lambda case: (
            {k: v for k, v in reference(case).items() if k != "merged_bias"}
            | (
                {"merged_bias": case["base"]["bias"] + case["tensors"].get("shift", 0)}
                if case["base"]["bias"] is not None
                else {}
            )
        ),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
