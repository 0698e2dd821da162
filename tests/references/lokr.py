"""LoKr: W' = W + s C (x) D, Kronecker's product. LyCORIS, Yeh et al., 2023, arXiv:2309.14859.

    y = W x + base_bias + s (C (x) D) x     (C (x) D)[a m2 + c][b n2 + d] = C[a][b] D[c][d]     s = alpha / rank

base: W (out, in), bias (out,) or None. tensors: C (m1, n1), or C_B (m1, rank) and C_A (rank, n1) with C = C_B
C_A; D (m2, n2), or B (m2, rank) and A (rank, n2) with D = B A. inputs: x (rows, tokens, in). options: rank,
alpha, factor, decompose_both.
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, every_token, linear, listed, matmul, tensor, zeros


def cases() -> list[Case]:
    found = []
    for seed, (name, sizes, both, bias, options) in enumerate(
        [
            ("D has factors, bias", (2, 3, 2, 4), False, True, {"rank": 1, "alpha": 3.0}),
            ("D is whole, no bias", (2, 2, 1, 3), False, False, {"rank": 2, "alpha": 5.0}),
            (
                "both have factors",
                (3, 4, 3, 3),
                True,
                True,
                {"rank": 1, "alpha": 2.0, "decompose_both": True},
            ),
            ("a factor of four", (4, 1, 4, 2), False, True, {"rank": 4, "alpha": 6.0, "factor": 4}),
        ]
    ):
        m1, m2, n1, n2 = sizes
        draw, rank = Draw(3100 + seed), options["rank"]
        tensors = {"C_B": draw(m1, rank), "C_A": draw(rank, n1)} if both else {"C": draw(m1, n1)}
        if rank < max(m2, n2) / 2:
            tensors |= {"B": draw(m2, rank), "A": draw(rank, n2)}
        else:
            tensors |= {"D": draw(m2, n2)}
        found.append(
            {
                "name": name,
                "options": options,
                "base": {"W": draw(m1 * m2, n1 * n2), "bias": draw(m1 * m2) if bias else None},
                "tensors": tensors,
                "trained": tuple(tensors),
                "inputs": {"x": draw(2, 2, n1 * n2)},
                "cotangent": draw(2, 2, m1 * m2),
            }
        )
    return found


def reference(case: Case, swapped: bool = False) -> dict:
    options, t = case["options"], {n: listed(v) for n, v in case["tensors"].items()}
    W, bias = listed(case["base"]["W"]), listed(case["base"]["bias"])
    s = options["alpha"] / options["rank"]
    C = t["C"] if "C" in t else matmul(t["C_B"], t["C_A"])
    D = t["D"] if "D" in t else matmul(t["B"], t["A"])
    if swapped:
        C, D = D, C
    delta = zeros(len(W), len(W[0]))
    for a in range(len(C)):
        for b in range(len(C[0])):
            for c in range(len(D)):
                for d in range(len(D[0])):
                    delta[a * len(D) + c][b * len(D[0]) + d] = s * C[a][b] * D[c][d]
    output = every_token(lambda v: add(linear(v, W, bias), linear(v, delta)), listed(case["inputs"]["x"]))
    return {"output": tensor(output), "delta": tensor(delta)}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _scale_of_one_where_nothing_has_a_rank(case: Case) -> dict:
    if "C" in case["tensors"] and "D" in case["tensors"]:
        return reference(changed(case, "options", alpha=float(case["options"]["rank"])))
    return reference(case)


MUTATIONS = [
    ("D (x) C", lambda case: reference(case, swapped=True)),
    (
        "alpha is not divided by the rank",
        lambda case: reference(
            changed(case, "options", alpha=case["options"]["alpha"] * case["options"]["rank"])
        ),
    ),
    ("a scale of one where nothing has a rank", _scale_of_one_where_nothing_has_a_rank),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
