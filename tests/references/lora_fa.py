"""LoRA-FA: A frozen, the gradient of B corrected by A, then AdamW. Zhang et al., 2023, arXiv:2308.03303.

    g' = g (A A^T + 1e-8 I)^-1 / s^2
    B <- (1 - rate decay) B - rate m_hat / (sqrt(v_hat) + eps)      m, v: moments of g', hats: over 1 - beta^t

"A" (rank, in), "B" (out, rank), "slopes": the gradients of B, one a step. options: rate, decay, beta1, beta2,
eps, s. `reference` gives "corrected" and "B" (steps, out, rank), and A after the steps.
"""

import math

from ._cases import Case, Draw, changed
from ._loops import combine, identity, inverse, listed, matmul, tensor, times, transpose, zeros


def cases() -> list[Case]:
    found = []
    settings = {"rate": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    for seed, (name, n_in, n_out, rank, options) in enumerate(
        [
            ("rank 2", 5, 3, 2, {"s": 1.0, "decay": 0.0}),
            ("rank 3, scaled, decay", 4, 2, 3, {"s": 0.5, "decay": 0.2}),
        ]
    ):
        draw = Draw(3500 + seed)
        found.append(
            {
                "name": name,
                "options": {**settings, **options},
                "A": draw(rank, n_in),
                "B": draw(n_out, rank),
                "slopes": [draw(n_out, rank) for _ in range(4)],
            }
        )
    return found


def corrected(g, A, s: float):
    gram = combine(1.0, matmul(A, transpose(A)), 1e-8, identity(len(A)))
    return [times(1.0 / s**2, row) for row in matmul(g, inverse(gram))]


def reference(case: Case, correct=corrected, decays_A: bool = False) -> dict:
    o, A, B = case["options"], listed(case["A"]), listed(case["B"])
    m, v, found, moved = zeros(len(B), len(A)), zeros(len(B), len(A)), [], []
    for t, slope in enumerate(case["slopes"], start=1):
        g = correct(listed(slope), A, o["s"])
        found.append(g)
        for i in range(len(B)):
            for k in range(len(A)):
                m[i][k] = o["beta1"] * m[i][k] + (1 - o["beta1"]) * g[i][k]
                v[i][k] = o["beta2"] * v[i][k] + (1 - o["beta2"]) * g[i][k] ** 2
                m_hat, v_hat = m[i][k] / (1 - o["beta1"] ** t), v[i][k] / (1 - o["beta2"] ** t)
                B[i][k] = (1 - o["rate"] * o["decay"]) * B[i][k] - o["rate"] * m_hat / (
                    math.sqrt(v_hat) + o["eps"]
                )
        if decays_A:
            A = [times(1 - o["rate"] * 0.1, row) for row in A]
        moved.append([row[:] for row in B])
    return {"corrected": tensor(found), "B": tensor(moved), "A": tensor(A)}


def gradients(case: Case) -> dict:
    return {}


MUTATIONS = [
    ("no correction", lambda case: reference(case, lambda g, A, s: g)),
    ("multiplied by A A^T", lambda case: reference(case, lambda g, A, s: matmul(g, matmul(A, transpose(A))))),
    ("multiplied by s^2", lambda case: reference(case, lambda g, A, s: corrected(g, A, 1 / s))),
    ("A decays", lambda case: reference(case, decays_A=True)),
    ("decay is left out", lambda case: reference(changed(case, "options", decay=0.0))),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
