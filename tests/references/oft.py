"""OFT: W' = W R^T, R orthogonal in blocks. Qiu et al., 2023, arXiv:2306.07280; OFTv2, arXiv:2506.19847.

    x_block <- x_block R        then the base layer; x is a row vector

Each block R (b, b) comes from a skew matrix S = U - U^T, U the strict upper triangle filled row by row from a
vector of b (b - 1) / 2 numbers:

    cayley = "exact"     R = (I - S) (I + S)^-1
    cayley = "neumann"   R = I + 2 S + 2 S^2 + ... + 2 S^(t-2) + S^(t-1) for t = terms >= 4;
                         t = 1: I, t = 2: I + 2 S, t = 3 the same as t = 4

The two turn in opposite directions. With eps (constrained OFT) S is first scaled down to a Frobenius norm of
at most eps / sqrt(blocks). base: W (out, in), bias (out,) or None. tensors: Q (blocks, b (b - 1) / 2); one
row where block_share. options: block_size, cayley, terms, block_share, eps. delta = W R^T - W; the reference
gives R (in, in).
"""

import math

from ._cases import Case, Draw, changed, output_gradients
from ._loops import (
    combine,
    every_token,
    frobenius,
    identity,
    inverse,
    linear,
    listed,
    matmul,
    tensor,
    times,
    transpose,
    zeros,
)


def cases() -> list[Case]:
    found = []
    exact = {"cayley": "exact"}
    neumann = [{"cayley": "neumann", "terms": t} for t in (2, 3, 4, 5, 6)]
    for seed, (n_in, n_out, block, bias, options) in enumerate(
        [
            (6, 4, 3, True, exact),
            (4, 5, 2, False, exact),
            (4, 3, 4, True, exact),
            (6, 3, 3, True, {**exact, "block_share": True}),
            (12, 3, 3, False, {**exact, "eps": 1.75}),
            *((6, 4, 3, True, options) for options in neumann),
            (6, 3, 3, True, {"cayley": "neumann", "terms": 5, "block_share": True}),
        ]
    ):
        draw = Draw(700 + seed)
        blocks = 1 if options.get("block_share") else n_in // block
        # Large turns for the exact form; for the series they would only show that it is a truncated one.
        size = 0.8 if options["cayley"] == "exact" else 0.3
        found.append(
            {
                "name": f"{n_in} to {n_out} in blocks of {block}, {options}",
                "options": {"block_size": block, **options},
                "base": {"W": draw(n_out, n_in), "bias": draw(n_out) if bias else None},
                "tensors": {"Q": draw(blocks, block * (block - 1) // 2, scale=size)},
                "trained": ("Q",),
                "inputs": {"x": draw(2, 2, n_in)},
                "cotangent": draw(2, 2, n_out),
            }
        )
    return found


def skew(vector, b: int):
    """S[i][j] = -S[j][i], the upper triangle row by row."""
    S = zeros(b, b)
    place = 0
    for i in range(b):
        for j in range(i + 1, b):
            S[i][j] = vector[place]
            S[j][i] = -vector[place]
            place += 1
    return S


def rotation(S, cayley: str, terms: int = 5):
    """(b, b)"""
    one = identity(len(S))
    if cayley == "exact":
        return matmul(combine(1.0, one, -1.0, S), inverse(combine(1.0, one, 1.0, S)))
    last = {1: 0, 2: 1, 3: 3}.get(terms, terms - 1)  # the highest power
    R, power = one, one
    for exponent in range(1, last + 1):
        power = matmul(power, S)
        ends = exponent == last and exponent > 1
        R = combine(1.0, R, 1.0 if ends else 2.0, power)
    return R


def reference(case: Case, turn=lambda R: R, fill=skew) -> dict:
    options = case["options"]
    W, bias, vectors = listed(case["base"]["W"]), listed(case["base"]["bias"]), listed(case["tensors"]["Q"])
    n_in, b = len(W[0]), options["block_size"]

    R = zeros(n_in, n_in)
    for block in range(n_in // b):
        S = fill(vectors[0 if options.get("block_share") else block], b)
        if options.get("eps") is not None:
            limit = options["eps"] / math.sqrt(len(vectors))
            if frobenius(S) > limit:
                S = [times(limit / frobenius(S), row) for row in S]
        rotated = turn(rotation(S, options["cayley"], options.get("terms", 5)))
        for i in range(b):
            for j in range(b):
                R[block * b + i][block * b + j] = rotated[i][j]

    def layer(token):
        turned = [sum(token[k] * R[k][c] for k in range(n_in)) for c in range(n_in)]
        return linear(turned, W, bias)

    adapted = matmul(W, transpose(R))
    return {
        "output": tensor(every_token(layer, listed(case["inputs"]["x"]))),
        "delta": tensor(combine(1.0, adapted, -1.0, W)),
        "R": tensor(R),
    }


def gradients(case: Case) -> dict:
    # With eps a checkpoint's Q is the projected one: the gradient is taken there, not through the projection.
    if case["options"].get("eps") is not None:
        return {"x": output_gradients(reference, {**case, "trained": ()})["x"]}
    return output_gradients(reference, case)


def _column_by_column(vector, b: int):
    S = zeros(b, b)
    place = 0
    for j in range(b):
        for i in range(j):
            S[i][j] = vector[place]
            S[j][i] = -vector[place]
            place += 1
    return S


def _one_term_more(case: Case) -> dict:
    terms = case["options"].get("terms")
    return reference(case if terms is None else changed(case, "options", terms=max(terms, 3) + 1))


MUTATIONS = [
    ("R is transposed: the other direction", lambda case: reference(case, turn=transpose)),
    ("the triangle is filled column by column", lambda case: reference(case, fill=_column_by_column)),
    (
        "the exact form for the series",
        lambda case: reference(changed(case, "options", cayley="exact")),
    ),
    ("one term more in the series", _one_term_more),
    (
        "half the turn",
        lambda case: reference(changed(case, "tensors", Q=case["tensors"]["Q"] / 2)),
    ),
    (
        "the norm is not limited",
        lambda case: reference(changed(case, "options", eps=None)),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
