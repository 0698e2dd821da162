"""LoHa: W' = W + s (B1 A1) * (B2 A2). FedPara, Hyeon-Woo et al., 2021, arXiv:2108.06098; LyCORIS,
arXiv:2309.14859.

    y = W x + base_bias + s ((B1 A1) * (B2 A2)) x       s = alpha / rank, * entry by entry

base: W (out, in), bias (out,) or None. tensors: A1, A2 (rank, in), B1, B2 (out, rank). inputs: x (rows,
tokens, in). options: rank, alpha.
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, combine, every_token, linear, listed, matmul, tensor, zeros


def cases() -> list[Case]:
    found = []
    for seed, (name, n_in, n_out, bias, rank, alpha) in enumerate(
        [
            ("wide, bias", 5, 3, True, 2, 3.0),
            ("tall, no bias", 3, 4, False, 1, 2.0),
            ("rank above the width", 3, 4, True, 4, 6.0),
        ]
    ):
        draw = Draw(2800 + seed)
        pairs = {f"{n}{i}": draw(*s) for i in (1, 2) for n, s in (("A", (rank, n_in)), ("B", (n_out, rank)))}
        found.append(
            {
                "name": name,
                "options": {"rank": rank, "alpha": alpha},
                "base": {"W": draw(n_out, n_in), "bias": draw(n_out) if bias else None},
                "tensors": pairs,
                "trained": ("A1", "B1", "A2", "B2"),
                "inputs": {"x": draw(2, 3, n_in)},
                "cotangent": draw(2, 3, n_out),
            }
        )
    return found


def reference(case: Case, join=lambda a, b: a * b) -> dict:
    options, t = case["options"], {n: listed(v) for n, v in case["tensors"].items()}
    W, bias = listed(case["base"]["W"]), listed(case["base"]["bias"])
    s = options["alpha"] / options["rank"]
    one, other = matmul(t["B1"], t["A1"]), matmul(t["B2"], t["A2"])
    delta = zeros(len(W), len(W[0]))
    for o in range(len(W)):
        for i in range(len(W[0])):
            delta[o][i] = s * join(one[o][i], other[o][i])
    output = every_token(lambda v: add(linear(v, W, bias), linear(v, delta)), listed(case["inputs"]["x"]))
    return {"output": tensor(output), "delta": tensor(combine(1.0, delta, 0.0, delta))}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _alpha(case: Case, factor: float) -> dict:
    return reference(changed(case, "options", alpha=case["options"]["alpha"] * factor))


def _crossed(case: Case) -> dict:
    t = case["tensors"]
    return reference(changed(case, "tensors", A1=t["A2"], A2=t["A1"]))


MUTATIONS = [
    ("the two are added", lambda case: reference(case, lambda a, b: a + b)),
    ("alpha is not divided by the rank", lambda case: _alpha(case, case["options"]["rank"])),
    (
        "each of the two is scaled",
        lambda case: _alpha(case, case["options"]["alpha"] / case["options"]["rank"]),
    ),
    ("each B meets the other A", _crossed),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
