"""Compacter: an adapter whose matrices are sums of Kronecker products. Karimi Mahabadi et al., 2021,
arXiv:2106.04647.

    y <- y + s (act(y H + D_bias) H' + U_bias)
    H[j p + b, k q + c] = sum_i A_i[j, k] sum_r S_i[b, r] T_i[r, c]      S_i: (p, rank)   T_i: (rank, q)

tensors: A (n, n, n), shared by both matrices, or D_A and U_A; D_S (n, d / n, rank), D_T (n, rank, m / n), D_bias
(m,); U_S (n, m / n, rank), U_T (n, rank, d / n), U_bias (d,). inputs: y (rows, tokens, d). Options: n, rank,
activation, scale, independent.
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import ACTIVATIONS, add, every_token, linear, listed, tensor, times, transpose, zeros


def cases() -> list[Case]:
    found = []
    for seed, (n, rank, d, m, activation, scale, independent) in enumerate(
        [
            (2, 1, 6, 4, "gelu_new", 1.0, False),
            (2, 3, 4, 2, "relu", 2.0, True),
            (3, 2, 6, 3, "gelu_new", 1.0, False),
        ]
    ):
        draw = Draw(2900 + seed)
        names = ("D_A", "U_A") if independent else ("A",)
        tensors = {name: draw(n, n, n) for name in names} | {
            "D_S": draw(n, d // n, rank),
            "D_T": draw(n, rank, m // n),
            "D_bias": draw(m),
            "U_S": draw(n, m // n, rank),
            "U_T": draw(n, rank, d // n),
            "U_bias": draw(d),
        }
        found.append(
            {
                "name": f"n {n}, rank {rank}, {m} of {d}, {activation}, independent {independent}",
                "options": {
                    "n": n, "rank": rank, "activation": activation, "scale": scale, "independent": independent,
                    "reduction": d / m,
                },
                "base": {},
                "tensors": tensors,
                "trained": tuple(tensors),
                "inputs": {"y": draw(2, 2, d)},
                "cotangent": draw(2, 2, d),
            }
        )  # fmt: skip
    return found


def product(A, S, T, swapped: bool = False):
    """H (n p, n q); swapped: A_i inside of S_i T_i, the other order of the factors."""
    n, p, rank, q = len(A), len(S[0]), len(T[0]), len(T[0][0])
    H = zeros(n * p, n * q)
    for i in range(n):
        for j in range(n):
            for k in range(n):
                for b in range(p):
                    for c in range(q):
                        value = A[i][j][k] * sum(S[i][b][r] * T[i][r][c] for r in range(rank))
                        if swapped:
                            H[b * n + j][c * n + k] += value
                        else:
                            H[j * p + b][k * q + c] += value
    return H


def reference(case: Case, swapped: bool = False) -> dict:
    t, options = {name: listed(value) for name, value in case["tensors"].items()}, case["options"]
    D = product(t.get("A") or t["D_A"], t["D_S"], t["D_T"], swapped)
    U = product(t.get("A") or t["U_A"], t["U_S"], t["U_T"], swapped)

    def edited(y):
        inner = [ACTIVATIONS[options["activation"]](a) for a in linear(y, transpose(D), t["D_bias"])]
        return add(y, times(options["scale"], linear(inner, transpose(U), t["U_bias"])))

    return {"output": tensor(every_token(edited, listed(case["inputs"]["y"])))}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case, inputs=("y",))


def _one_term(case: Case) -> dict:
    """The first of the n products alone."""
    alone = {}
    for name in ("A", "D_A", "U_A"):
        if name in case["tensors"]:
            alone[name] = case["tensors"][name].clone()
            alone[name][1:] = 0
    return reference(changed(case, "tensors", **alone))


def _turned(case: Case) -> dict:
    turned = {n: v.transpose(1, 2).contiguous() for n, v in case["tensors"].items() if n.endswith("A")}
    return reference(changed(case, "tensors", **turned))


MUTATIONS = [
    ("the factors of the Kronecker product change places", lambda case: reference(case, swapped=True)),
    ("one product instead of a sum", _one_term),
    ("A is transposed", _turned),
    (
        "the upper bias is left out",
        lambda c: reference(changed(c, "tensors", U_bias=0 * c["tensors"]["U_bias"])),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
