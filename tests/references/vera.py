"""VeRA: W' = W + diag(b) B diag(d) A with B and A frozen and shared. Kopiczko et al., 2023, arXiv:2310.11454.

    y = W x + base_bias + b * (B (d * (A x)))

base: W (out, in), bias (out,) or None. tensors: A (rank, in) and B (out, rank), frozen; d (rank,) and b
(out,), trained. There is no alpha. Where a case has "shared", A and B are the leading columns of shared A
(rank, largest in) and the leading rows of shared B (largest out, rank), as for sites of several shapes.
inputs: x (rows, tokens, in).
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, dot, linear, listed, tensor


def cases() -> list[Case]:
    found = []
    for seed, (name, n_in, n_out, rank, bias, shared) in enumerate(
        [
            ("wide, bias", 5, 3, 2, True, None),
            ("tall, rank above width", 3, 4, 6, False, None),
            ("sliced from larger shared factors", 4, 3, 3, True, (7, 6)),
        ]
    ):
        draw = Draw(300 + seed)
        A, B = draw(rank, shared[0] if shared else n_in), draw(shared[1] if shared else n_out, rank)
        case = {
            "name": name,
            "options": {"rank": rank},
            "base": {"W": draw(n_out, n_in), "bias": draw(n_out) if bias else None},
            "tensors": {
                "A": A[:, :n_in].contiguous(),
                "B": B[:n_out].contiguous(),
                "d": draw(rank),
                "b": draw(n_out),
            },
            "trained": ("d", "b"),
            "inputs": {"x": draw(2, 3, n_in)},
            "cotangent": draw(2, 3, n_out),
        }
        if shared:
            case["shared"] = {"A": A, "B": B}
        found.append(case)
    return found


def _delta(W, A, B, d, b):
    """delta_oi = b_o sum_r B_or d_r A_ri"""
    n_out, n_in, rank = len(W), len(W[0]), len(d)
    return [
        [b[o] * sum(B[o][r] * d[r] * A[r][i] for r in range(rank)) for i in range(n_in)] for o in range(n_out)
    ]


def reference(case: Case) -> dict:
    W, bias = listed(case["base"]["W"]), listed(case["base"]["bias"])
    source = case.get("shared", case["tensors"])
    A, B = listed(source["A"]), listed(source["B"])
    d, b = listed(case["tensors"]["d"]), listed(case["tensors"]["b"])
    n_in, rank = len(W[0]), len(d)
    output = []
    for row in listed(case["inputs"]["x"]):
        output.append([])
        for token in row:
            inner = [d[r] * dot(A[r][:n_in], token) for r in range(rank)]
            update = [b[o] * dot(B[o], inner) for o in range(len(W))]
            output[-1].append(add(linear(token, W, bias), update))
    return {"output": tensor(output), "delta": tensor(_delta(W, A, B, d, b))}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _last_rows_of_the_shared(case: Case) -> dict:
    if "shared" not in case:
        return reference(case)
    n_out, n_in = case["base"]["W"].shape
    shared = {"A": case["shared"]["A"][:, -n_in:], "B": case["shared"]["B"][-n_out:]}
    return reference({**case, "shared": shared})


MUTATIONS = [
    (
        "divided by the rank",
        lambda case: reference(changed(case, "tensors", d=case["tensors"]["d"] / case["options"]["rank"])),
    ),
    (
        "d acts twice",
        lambda case: reference(changed(case, "tensors", d=case["tensors"]["d"] ** 2)),
    ),
    (
        "b is left out",
        lambda case: reference(changed(case, "tensors", b=case["tensors"]["b"] * 0 + 1)),
    ),
    ("the shared factors are sliced at their end", _last_rows_of_the_shared),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
