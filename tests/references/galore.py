"""GaLore: Adam in a low-rank projection of the gradient. Zhao et al., 2024, arXiv:2403.03507.

    every `refresh` steps, from the gradient G (m, n) of that step and its singular vectors U S V^T:
        m >= n    P = the first rank rows of V^T, (rank, n);     R = G P^T,   back(N) = N P
        m < n     P = the first rank columns of U, (m, rank);    R = P^T G,   back(N) = P N
    M <- beta1 M + (1 - beta1) R        v <- beta2 v + (1 - beta2) R^2
    N = M / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
    W <- W - rate decay W - rate scale back(N)

The moments are kept when P is renewed. The signs of singular vectors are free: one projection gives the same
steps with any signs, a renewed one does not, so that later cases name their "projections" {step: P} and a
test gives these to what it tests. "W" is the start, "slopes" the gradients, one a step (t = 1, 2, ...).
`reference` gives W (steps, m, n) and "P.t", the projection made at step t.
"""

import math

from ._cases import Case, Draw, changed
from ._loops import combine, listed, matmul, singular_vectors, tensor, times, transpose


def cases() -> list[Case]:
    found = []
    for seed, (m, n, rank, refresh, steps, decay) in enumerate(
        [(4, 3, 2, 200, 3, 0.0), (3, 5, 2, 200, 3, 0.1), (5, 4, 1, 2, 4, 0.0), (2, 4, 1, 2, 3, 0.0)]
    ):
        draw = Draw(2500 + seed)
        case = {
            "name": f"{m} by {n}, rank {rank}, renewed every {refresh}, decay {decay:g}",
            "options": {
                "rank": rank,
                "refresh": refresh,
                "scale": 0.25,
                "rate": 0.1,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "decay": decay,
            },
            "W": draw(m, n),
            "slopes": [draw(m, n) for _ in range(steps)],
        }
        if refresh < steps:
            case["projections"] = {
                t: tensor(projection(listed(case["slopes"][t - 1]), rank))
                for t in range(1, steps + 1, refresh)
            }
        found.append(case)
    return found


def projection(G, rank: int, wrong_side: bool = False):
    """(rank, n) where G (m, n) has m >= n, else (m, rank)"""
    U, _, V = singular_vectors(G)
    if (len(G) >= len(G[0])) != wrong_side:
        return V[:rank]
    return transpose(U[:rank])


def reference(case: Case, wrong_side: bool = False, forget: bool = False, corrected: bool = True) -> dict:
    o, W = case["options"], listed(case["W"])
    right = (len(W) >= len(W[0])) != wrong_side
    found, history, P, M, v = {}, [], None, None, None
    for t, G in enumerate((listed(slope) for slope in case["slopes"]), start=1):
        if (t - 1) % o["refresh"] == 0:
            given = case.get("projections", {}).get(t)
            if given is not None and not wrong_side:
                P = listed(given)
            else:
                P = projection(G, o["rank"], wrong_side)
            found[f"P.{t}"] = tensor(P)
            if forget:
                M = v = None
        R = matmul(G, transpose(P)) if right else matmul(transpose(P), G)
        if M is None:
            M = v = [[0.0] * len(R[0]) for _ in R]
        M = combine(o["beta1"], M, 1 - o["beta1"], R)
        v = combine(o["beta2"], v, 1 - o["beta2"], [[r * r for r in row] for row in R])
        first, second = (1 - o["beta1"] ** t, 1 - o["beta2"] ** t) if corrected else (1.0, 1.0)
        N = [
            [a / first / (math.sqrt(b / second) + o["eps"]) for a, b in zip(row, other)]
            for row, other in zip(M, v)
        ]
        back = matmul(N, P) if right else matmul(P, N)
        W = combine(1 - o["rate"] * o["decay"], W, -o["rate"] * o["scale"], back)
        history.append([times(1.0, row) for row in W])
    return {"W": tensor(history), **found}


def gradients(case: Case) -> dict:
    return {}


def _steps_alone(**how):
    return lambda case: {"W": reference(case, **how)["W"]}


MUTATIONS = [
    ("the longer side is projected", _steps_alone(wrong_side=True)),
    ("the moments are forgotten when P is renewed", _steps_alone(forget=True)),
    ("no bias correction", _steps_alone(corrected=False)),
    ("no scale", lambda case: {"W": reference(changed(case, "options", scale=1.0))["W"]}),
    (
        "decay is left out",
        lambda case: {"W": reference(changed(case, "options", decay=0.0))["W"]},
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
