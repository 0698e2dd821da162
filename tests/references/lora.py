"""LoRA: W' = W + s B A. Hu et al., 2021, arXiv:2106.09685. rsLoRA (arXiv:2312.03732): s = alpha / sqrt(rank).

    y = W x + base_bias + s (B A drop(x) + bias)       s = alpha / rank

base: W (out, in), bias (out,) or None. tensors: A (rank, in), B (out, rank); with option bias=True: bias
(out,), the bias of B. Starts that subtract themselves (PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775) hold
A0 (rank, in) and B0 (out, rank), frozen: W' = W + s (B A - B0 A0). inputs: x (rows, tokens, in); in the
dropout case also dropout_mask like x, entries 0 or 1 / (1 - p). Option names: rank, alpha, rank_stabilized,
bias, dropout, start.

`start(kind, W, rank, s)` gives what the start must satisfy whatever the signs: B0 A0, and for PiSSA A0 A0^T
and B0^T B0. delta is the change of the dense weight; bias_delta that of the bias.
"""

import math

from ._cases import Case, Draw, changed, output_gradients
from ._loops import (
    add,
    combine,
    gram_schmidt,
    linear,
    listed,
    matmul,
    singular_vectors,
    tensor,
    times,
    transpose,
)


def cases() -> list[Case]:
    found = []
    for seed, (name, n_in, n_out, bias, options) in enumerate(
        [
            ("wide, bias", 5, 3, True, {"rank": 2, "alpha": 8.0}),
            ("tall, no bias", 3, 4, False, {"rank": 1, "alpha": 3.0}),
            ("rank-stabilized", 4, 3, True, {"rank": 3, "alpha": 2.0, "rank_stabilized": True}),
            ("bias of B", 4, 5, True, {"rank": 2, "alpha": 3.0, "bias": True}),
            ("dropout", 5, 4, True, {"rank": 2, "alpha": 4.0, "dropout": 0.25}),
            ("pissa", 5, 4, True, {"rank": 2, "alpha": 3.0, "start": "pissa"}),
            ("olora", 4, 5, False, {"rank": 2, "alpha": 3.0, "start": "olora"}),
        ]
    ):
        draw = Draw(100 + seed)
        rank = options["rank"]
        x = draw(2, 3, n_in)
        case = {
            "name": name,
            "options": options,
            "base": {"W": draw(n_out, n_in), "bias": draw(n_out) if bias else None},
            "tensors": {"A": draw(rank, n_in), "B": draw(n_out, rank)},
            "trained": ("A", "B"),
            "inputs": {"x": x},
            "cotangent": draw(2, 3, n_out),
        }
        if options.get("bias"):
            case["tensors"]["bias"] = draw(n_out)
            case["trained"] = ("A", "B", "bias")
        if options.get("dropout"):
            p = options["dropout"]
            case["inputs"]["dropout_mask"] = (draw.uniform(*x.shape) > p).to(x.dtype) / (1 - p)
        if options.get("start"):
            A0, B0 = _factors(options["start"], listed(case["base"]["W"]), rank, scale(options))
            case["tensors"] |= {"A0": tensor(A0), "B0": tensor(B0)}
        found.append(case)
    return found


def scale(options: dict) -> float:
    return options["alpha"] / (
        math.sqrt(options["rank"]) if options.get("rank_stabilized") else options["rank"]
    )


def _factors(kind: str, W, rank: int, s: float):
    if kind == "pissa":  # A0 = sqrt(S / s) V^T, B0 = U sqrt(S / s)
        U, S, V = singular_vectors(W)
        A0 = [times(math.sqrt(S[i] / s), V[i]) for i in range(rank)]
        B0 = transpose([times(math.sqrt(S[i] / s), U[i]) for i in range(rank)])
        return A0, B0
    Q = gram_schmidt(transpose(W)[: min(len(W), len(W[0]))])  # olora: W = Q R, not divided by s
    return matmul(Q, W)[:rank], transpose(Q[:rank])


def start(kind: str, W, rank: int, s: float) -> dict:
    """{"product": B0 A0, "gram_A": A0 A0^T, "gram_B": B0^T B0}: these do not depend on signs."""
    A0, B0 = _factors(kind, listed(W), rank, s)
    return {
        "product": tensor(matmul(B0, A0)),
        "gram_A": tensor(matmul(A0, transpose(A0))),
        "gram_B": tensor(matmul(transpose(B0), B0)),
    }


def reference(case: Case) -> dict:
    t = {name: listed(value) for name, value in case["tensors"].items()}
    W, base_bias = listed(case["base"]["W"]), listed(case["base"]["bias"])
    s, x = scale(case["options"]), listed(case["inputs"]["x"])
    product = matmul(t["B"], t["A"])
    if "A0" in t:
        product = combine(1.0, product, -1.0, matmul(t["B0"], t["A0"]))
    n_out = len(W)
    added_bias = times(s, t["bias"]) if "bias" in t else [0.0] * n_out

    keep = listed(case["inputs"].get("dropout_mask"))
    output = []
    for i, row in enumerate(x):
        output.append([])
        for j, token in enumerate(row):
            dropped = [a * k for a, k in zip(token, keep[i][j])] if keep is not None else token
            update = times(s, linear(dropped, product))
            output[i].append(add(add(linear(token, W, base_bias), update), added_bias))
    return {
        "output": tensor(output),
        "delta": tensor([times(s, row) for row in product]),
        "bias_delta": tensor(added_bias),
    }


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _alpha(case: Case, factor: float) -> dict:
    return reference(changed(case, "options", alpha=case["options"]["alpha"] * factor))


def _dropout_before_the_base(case: Case) -> dict:
    keep = case["inputs"].get("dropout_mask")
    return reference(
        case if keep is None else changed(case, "inputs", x=case["inputs"]["x"] * keep, dropout_mask=None)
    )


def _without(case: Case, *names: str) -> dict:
    kept = {name: value for name, value in case["tensors"].items() if name not in names}
    return reference({**case, "tensors": kept})


def _bias_not_scaled(case: Case) -> dict:
    if "bias" not in case["tensors"]:
        return reference(case)
    return reference(changed(case, "tensors", bias=case["tensors"]["bias"] / scale(case["options"])))


MUTATIONS = [
    ("alpha is not divided by the rank", lambda case: _alpha(case, case["options"]["rank"])),
    ("alpha is divided by the rank twice", lambda case: _alpha(case, 1 / case["options"]["rank"])),
    (
        "rank stabilization the wrong way round",
        lambda case: reference(
            changed(case, "options", rank_stabilized=not case["options"].get("rank_stabilized", False))
        ),
    ),
    ("dropout also acts on the base's input", _dropout_before_the_base),
    ("the start is not subtracted", lambda case: _without(case, "A0", "B0")),
    ("the bias of B is not scaled", _bias_not_scaled),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
