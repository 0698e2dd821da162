"""HiRA: W' = W + W * (B A), entry by entry. Huang et al., 2025, ICLR, OpenReview TwJrTz9cRS.

    y = W x + base_bias + (W * (B A)) drop(x)

base: W (out, in), some entries zero, bias (out,) or None. tensors: A (rank, in), B (out, rank). inputs: x
(rows, tokens, in); in the dropout case also dropout_mask like x. options: rank, dropout. There is no scale.
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, linear, listed, tensor, zeros


def cases() -> list[Case]:
    found = []
    for seed, (name, n_in, n_out, bias, options) in enumerate(
        [
            ("wide, bias", 5, 3, True, {"rank": 2}),
            ("tall, no bias", 3, 4, False, {"rank": 1}),
            ("dropout", 4, 3, True, {"rank": 3, "dropout": 0.25}),
        ]
    ):
        draw = Draw(2900 + seed)
        rank, x = options["rank"], draw(2, 3, n_in)
        W = draw(n_out, n_in)
        W[0], W[1, 0] = 0.0, 0.0
        case = {
            "name": name,
            "options": options,
            "base": {"W": W, "bias": draw(n_out) if bias else None},
            "tensors": {"A": draw(rank, n_in), "B": draw(n_out, rank)},
            "trained": ("A", "B"),
            "inputs": {"x": x},
            "cotangent": draw(2, 3, n_out),
        }
        if options.get("dropout"):
            p = options["dropout"]
            case["inputs"]["dropout_mask"] = (draw.uniform(*x.shape) > p).to(x.dtype) / (1 - p)
        found.append(case)
    return found


def reference(case: Case, weight=lambda w: w) -> dict:
    W, bias = listed(case["base"]["W"]), listed(case["base"]["bias"])
    A, B = listed(case["tensors"]["A"]), listed(case["tensors"]["B"])
    delta = zeros(len(W), len(W[0]))
    for o in range(len(W)):
        for i in range(len(W[0])):
            delta[o][i] = weight(W[o][i]) * sum(B[o][k] * A[k][i] for k in range(len(A)))
    x, keep = case["inputs"]["x"], case["inputs"].get("dropout_mask")
    dropped = listed(x if keep is None else x * keep)
    output = [
        [add(linear(v, W, bias), linear(d, delta)) for v, d in zip(row, other)]
        for row, other in zip(listed(x), dropped)
    ]
    return {"output": tensor(output), "delta": tensor(delta)}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _dropout_before_the_base(case: Case) -> dict:
    keep = case["inputs"].get("dropout_mask")
    if keep is None:
        return reference(case)
    return reference(changed(case, "inputs", x=case["inputs"]["x"] * keep, dropout_mask=None))


def _half(case: Case) -> dict:
    return reference(changed(case, "tensors", B=case["tensors"]["B"] / 2))


MUTATIONS = [
    ("W is left out", lambda case: reference(case, lambda w: 1.0)),
    ("sizes of W alone", lambda case: reference(case, abs)),
    ("zeros of W are moved", lambda case: reference(case, lambda w: w if w else 1.0)),
    ("a scale of one half", _half),
    ("dropout also acts on the base's input", _dropout_before_the_base),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
