"""FourierFT: W' = W + s Re(inverse transform of a few frequencies). Gao et al., 2024, arXiv:2405.03003.

    dW_pq = s / (out in) sum_j c_j cos(2 pi (p k_j / out + q l_j / in)),   index_j = k_j in + l_j

base: W (out, in), bias (out,) or None. tensors: c (frequencies,), index (frequencies,) int64, no two alike.
inputs: x (rows, tokens, in). options: frequencies, scale.
"""

import math

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, every_token, linear, listed, tensor, zeros


def cases() -> list[Case]:
    found = []
    for seed, (name, n_in, n_out, bias, frequencies, scale) in enumerate(
        [
            ("wide, bias", 5, 3, True, 4, 6.0),
            ("tall, no bias", 3, 4, False, 1, 20.0),
            ("every frequency", 3, 4, True, 12, 5.0),
        ]
    ):
        draw = Draw(3000 + seed)
        order = draw.uniform(n_in * n_out).argsort()
        found.append(
            {
                "name": name,
                "options": {"frequencies": frequencies, "scale": scale},
                "base": {"W": draw(n_out, n_in), "bias": draw(n_out) if bias else None},
                "tensors": {"c": draw(frequencies), "index": order[:frequencies].clone()},
                "trained": ("c",),
                "inputs": {"x": draw(2, 3, n_in)},
                "cotangent": draw(2, 3, n_out),
            }
        )
    return found


def reference(case: Case, wave=math.cos, by_columns: bool = False, count=lambda m, n: m * n) -> dict:
    W, bias = listed(case["base"]["W"]), listed(case["base"]["bias"])
    m, n, s = len(W), len(W[0]), case["options"]["scale"]
    delta = zeros(m, n)
    for c, place in zip(listed(case["tensors"]["c"]), case["tensors"]["index"].tolist()):
        k, l = (place % m, place // m) if by_columns else (place // n, place % n)
        for p in range(m):
            for q in range(n):
                delta[p][q] += s / count(m, n) * c * wave(2 * math.pi * (p * k / m + q * l / n))
    output = every_token(lambda v: add(linear(v, W, bias), linear(v, delta)), listed(case["inputs"]["x"]))
    return {"output": tensor(output), "delta": tensor(delta)}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


MUTATIONS = [
    ("the imaginary part", lambda case: reference(case, math.sin)),
    ("places column by column", lambda case: reference(case, by_columns=True)),
    ("an orthonormal transform", lambda case: reference(case, count=lambda m, n: math.sqrt(m * n))),
    (
        "no scale",
        lambda case: reference(changed(case, "options", scale=1.0)),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
