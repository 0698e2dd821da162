"""SHiRA: W' = W + values at fixed places. Bhardwaj et al., 2024, arXiv:2406.13175.

    W'[k][l] = W[k][l] + values_j        index_j = k in + l, no two alike

base: W (out, in), bias (out,) or None. tensors: values (k,), index (k,) int64 with k = rank (in + out). inputs:
x (rows, tokens, in). options: rank.
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, every_token, linear, listed, tensor, zeros


def cases() -> list[Case]:
    found = []
    for seed, (name, n_in, n_out, bias, rank) in enumerate(
        [("wide, bias", 5, 3, True, 1), ("tall, no bias", 3, 4, False, 1), ("rank 2", 6, 4, True, 2)]
    ):
        draw = Draw(3200 + seed)
        k = rank * (n_in + n_out)
        found.append(
            {
                "name": name,
                "options": {"rank": rank},
                "base": {"W": draw(n_out, n_in), "bias": draw(n_out) if bias else None},
                "tensors": {
                    "values": draw(k),
                    "index": draw.uniform(n_in * n_out).argsort()[:k].sort().values,
                },
                "trained": ("values",),
                "inputs": {"x": draw(2, 3, n_in)},
                "cotangent": draw(2, 3, n_out),
            }
        )
    return found


def reference(case: Case, by_columns: bool = False, replaces: bool = False) -> dict:
    W, bias = listed(case["base"]["W"]), listed(case["base"]["bias"])
    n_out, n_in = len(W), len(W[0])
    delta = zeros(n_out, n_in)
    for value, place in zip(listed(case["tensors"]["values"]), case["tensors"]["index"].tolist()):
        k, l = (place % n_out, place // n_out) if by_columns else (place // n_in, place % n_in)
        delta[k][l] = value - (W[k][l] if replaces else 0.0)
    output = every_token(lambda v: add(linear(v, W, bias), linear(v, delta)), listed(case["inputs"]["x"]))
    return {"output": tensor(output), "delta": tensor(delta)}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _scaled(case: Case) -> dict:
    return reference(changed(case, "tensors", values=case["tensors"]["values"] * 2))


MUTATIONS = [
    ("places column by column", lambda case: reference(case, by_columns=True)),
    ("values take the place of the weight", lambda case: reference(case, replaces=True)),
    ("a scale of two", _scaled),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
