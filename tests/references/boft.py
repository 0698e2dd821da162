"""BOFT: W' = diag(s) W R^T, R a product of butterfly factors. Liu et al., 2023, arXiv:2311.06243.

    y = s * (W (R x)) + base_bias ... as rows: x <- x R, then the base layer without its bias, times s

R = B_N .. B_2 B_1. Factor i has d orthogonal blocks (I - Q) (I + Q)^-1 of b inputs, Q = (M - M^T) / 2. In the
first, block j turns inputs j b .. j b + b - 1. In factor i > 1 inputs are pieces of b / 2; within each span of
2^i pieces, block j of the span turns piece j and piece j + 2^(i-1). base: W (out, in), bias (out,) or None.
tensors: M (factors, d, b, b), s (out,). inputs: x (rows, tokens, in). options: block_size, factors. The
reference gives R (in, in).
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import (
    add,
    combine,
    every_token,
    identity,
    inverse,
    linear,
    listed,
    matmul,
    tensor,
    transpose,
    zeros,
)


def cases() -> list[Case]:
    found = []
    for seed, (name, n_in, n_out, block, factors, bias) in enumerate(
        [
            ("one factor, bias", 6, 4, 3, 1, True),
            ("two factors, no bias", 8, 3, 4, 2, False),
            ("three factors, bias", 8, 3, 2, 3, True),
        ]
    ):
        draw = Draw(3400 + seed)
        found.append(
            {
                "name": name,
                "options": {"block_size": block, "factors": factors},
                "base": {"W": draw(n_out, n_in), "bias": draw(n_out) if bias else None},
                "tensors": {
                    "M": draw(factors, n_in // block, block, block),
                    "s": draw(n_out, mean=1.0, scale=0.3),
                },
                "trained": ("M", "s"),
                "inputs": {"x": draw(2, 2, n_in)},
                "cotangent": draw(2, 2, n_out),
            }
        )
    return found


def members(i: int, j: int, b: int) -> list[int]:
    """The inputs that block j of factor i (from 1) turns."""
    if i == 1:
        return list(range(j * b, j * b + b))
    reach, half = 2 ** (i - 1), b // 2
    piece = (j // reach) * 2 * reach + j % reach
    return [p * half + k for p in (piece, piece + reach) for k in range(half)]


def factor(blocks, i: int, b: int, turn, place) -> list:
    """B_i (in, in)"""
    B = zeros(len(blocks) * b, len(blocks) * b)
    for j, M in enumerate(blocks):
        Q = combine(0.5, M, -0.5, transpose(M))
        one = identity(b)
        R = turn(matmul(combine(1.0, one, -1.0, Q), inverse(combine(1.0, one, 1.0, Q))))
        inside = place(i, j, b)
        for u in range(b):
            for v in range(b):
                B[inside[u]][inside[v]] = R[u][v]
    return B


def reference(case: Case, turn=lambda R: R, place=members, order=lambda factors: factors, both=False) -> dict:
    W, bias, s = listed(case["base"]["W"]), listed(case["base"]["bias"]), listed(case["tensors"]["s"])
    b, R = case["options"]["block_size"], identity(len(W[0]))
    made = [factor(blocks, i, b, turn, place) for i, blocks in enumerate(listed(case["tensors"]["M"]), 1)]
    for B in order(made):
        R = matmul(B, R)

    def layer(token):
        turned = [sum(token[k] * R[k][c] for k in range(len(R))) for c in range(len(R))]
        y = linear(turned, W, bias if both else None)
        y = [a * scale for a, scale in zip(y, s)]
        return y if bias is None or both else add(y, bias)

    adapted = [[a * scale for a in row] for row, scale in zip(matmul(W, transpose(R)), s)]
    return {
        "output": tensor(every_token(layer, listed(case["inputs"]["x"]))),
        "delta": tensor(combine(1.0, adapted, -1.0, W)),
        "R": tensor(R),
    }


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


MUTATIONS = [
    ("blocks turn the other way", lambda case: reference(case, turn=transpose)),
    ("factors in the other order", lambda case: reference(case, order=lambda made: made[::-1])),
    (
        "no butterfly: all factors turn neighbours",
        lambda case: reference(case, place=lambda i, j, b: members(1, j, b)),
    ),
    ("the bias is scaled", lambda case: reference(case, both=True)),
    ("half the turn", lambda case: reference(changed(case, "tensors", M=case["tensors"]["M"] / 2))),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
