"""AdapterFusion: attend, per token, over the outputs of N frozen adapters. Pfeiffer et al., 2020,
arXiv:2005.00247.

    p = softmax_i( (Q h + Q_bias) . (K z_i + K_bias) / T )     output = sum_i p_i V z_i + residual
    penalty = 0.01 |I - V|_F^2

Scores are not divided by sqrt(width). h is the hidden state behind the block's norm, before any adapter.
tensors: Q, K (d, d), Q_bias, K_bias (d,), V (d, d) without bias; the static form has no V and no penalty.
inputs: h (rows, tokens, d), z (N, rows, tokens, d), the adapters' outputs before their residual, residual
(rows, tokens, d). options: static, temperature T. "weights" (rows, tokens, N) are the p. K_bias has no
gradient: it shifts all scores of a token alike.
"""

from ._cases import Case, Draw, changed, output_gradients, penalty_gradients
from ._loops import add, dot, linear, listed, softmax, tensor, times


def cases() -> list[Case]:
    found = []
    for seed, (adapters, static, temperature) in enumerate(
        [(2, False, 1.0), (3, False, 2.5), (3, True, 1.0)]
    ):
        draw = Draw(2100 + seed)
        rows, tokens, width = 2, 2, 3
        tensors = {
            "Q": draw(width, width),
            "Q_bias": draw(width),
            "K": draw(width, width),
            "K_bias": draw(width),
        }
        if not static:
            tensors["V"] = draw(width, width)
        found.append(
            {
                "name": f"{adapters} adapters, static {static}, temperature {temperature:g}",
                "options": {"static": static, "temperature": temperature, "weight": 0.01},
                "base": {},
                "tensors": tensors,
                "trained": tuple(tensors),
                "null_gradient": ("K_bias",),
                "inputs": {
                    "h": draw(rows, tokens, width),
                    "z": draw(adapters, rows, tokens, width),
                    "residual": draw(rows, tokens, width),
                },
                "cotangent": draw(rows, tokens, width),
            }
        )
    return found


def reference(case: Case, scale: float = 1.0, squared: bool = True) -> dict:
    t = {name: listed(value) for name, value in case["tensors"].items()}
    h, z, residual = (listed(case["inputs"][name]) for name in ("h", "z", "residual"))
    scale = scale / case["options"]["temperature"]
    output, weights = [], []
    for row in range(len(h)):
        output.append([])
        weights.append([])
        for token, state in enumerate(h[row]):
            query = linear(state, t["Q"], t["Q_bias"])
            outputs = [adapter[row][token] for adapter in z]
            p = softmax([scale * dot(query, linear(out, t["K"], t["K_bias"])) for out in outputs])
            mixed = residual[row][token]
            for weight, out in zip(p, outputs):
                mixed = add(mixed, times(weight, linear(out, t["V"]) if "V" in t else out))
            output[row].append(mixed)
            weights[row].append(p)
    found = {"output": tensor(output), "weights": tensor(weights)}
    if "V" in t:
        gap = sum((v - (i == j)) ** 2 for i, row in enumerate(t["V"]) for j, v in enumerate(row))
        found["penalty"] = tensor(case["options"]["weight"] * (gap if squared else gap**0.5))
    return found


def gradients(case: Case) -> dict:
    found = output_gradients(reference, case, ("h", "z", "residual"))
    return found if case["options"]["static"] else {**found, **penalty_gradients(reference, case, ("V",))}


MUTATIONS = [
    (
        "scores are divided by sqrt(width)",
        lambda case: reference(case, scale=case["inputs"]["h"].shape[-1] ** -0.5),
    ),
    ("the penalty is not squared", lambda case: reference(case, squared=False)),
    (
        "no residual",
        lambda case: reference(changed(case, "inputs", residual=0 * case["inputs"]["residual"])),
    ),
    (
        "queries and keys are swapped",
        lambda case: reference(
            changed(
                case,
                "tensors",
                Q=case["tensors"]["K"],
                Q_bias=case["tensors"]["K_bias"],
                K=case["tensors"]["Q"],
                K_bias=case["tensors"]["Q_bias"],
            )
        ),
    ),
    (
        "the temperature multiplies",
        lambda case: reference(changed(case, "options", temperature=1 / case["options"]["temperature"])),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
