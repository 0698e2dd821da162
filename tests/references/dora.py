"""DoRA: W' = diag(magnitude / |W + s B A|) (W + s B A). Liu et al., 2024, arXiv:2402.09353.

    y = W' x + base_bias       | . | is the norm of a row (over the input dimension), s = alpha / rank

The norm is a constant in the backward (section 4.3 of the paper), so `gradients` are those with the norm held
at the value it has in the case. base: W (out, in), bias (out,) or None. tensors: A (rank, in), B (out, rank),
magnitude (out,). inputs: x (rows, tokens, in). Options: rank, alpha, rank_stabilized. delta = W' - W.
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import combine, every_token, linear, listed, matmul, norm, tensor, times, transpose
from .lora import scale


def cases() -> list[Case]:
    found = []
    for seed, (name, n_in, n_out, bias, options) in enumerate(
        [
            ("wide, bias", 5, 3, True, {"rank": 2, "alpha": 8.0}),
            ("tall, no bias", 3, 4, False, {"rank": 1, "alpha": 3.0}),
            ("square, rank-stabilized", 4, 4, True, {"rank": 3, "alpha": 2.0, "rank_stabilized": True}),
        ]
    ):
        draw = Draw(200 + seed)
        found.append(
            {
                "name": name,
                "options": options,
                "base": {"W": draw(n_out, n_in), "bias": draw(n_out) if bias else None},
                "tensors": {
                    "A": draw(options["rank"], n_in),
                    "B": draw(n_out, options["rank"]),
                    "magnitude": draw.uniform(n_out, low=0.5, high=2.5),
                },
                "trained": ("A", "B", "magnitude"),
                "inputs": {"x": draw(2, 3, n_in)},
                "cotangent": draw(2, 3, n_out),
            }
        )
    return found


def _directions(case: Case):
    """W + s B A, as nested lists."""
    update = matmul(listed(case["tensors"]["B"]), listed(case["tensors"]["A"]))
    return combine(1.0, listed(case["base"]["W"]), scale(case["options"]), update)


def row_norms(case: Case) -> list[float]:
    """|W + s B A|, one a row: held constant in the backward; a fresh adapter's magnitude starts here."""
    return [norm(row) for row in _directions(case)]


def reference(case: Case, norms: list[float] | None = None) -> dict:
    """norms: used in place of the norms of this case's tensors."""
    direction = _directions(case)
    norms = row_norms(case) if norms is None else norms
    magnitude = listed(case["tensors"]["magnitude"])
    adapted = [times(magnitude[i] / norms[i], direction[i]) for i in range(len(direction))]
    bias = listed(case["base"]["bias"])
    output = every_token(lambda token: linear(token, adapted, bias), listed(case["inputs"]["x"]))
    return {
        "output": tensor(output),
        "delta": tensor(combine(1.0, adapted, -1.0, listed(case["base"]["W"]))),
        "norms": tensor(norms),
    }


def gradients(case: Case) -> dict:
    constant = row_norms(case)
    return output_gradients(lambda moved: reference(moved, constant), case)


def _gradient_through_the_norm(case: Case) -> dict:
    return {f"gradient.{name}": value for name, value in output_gradients(reference, case).items()}


def _norm_over_columns(case: Case) -> dict:
    columns = transpose(_directions(case))
    norms = [norm(columns[i % len(columns)]) for i in range(len(case["base"]["W"]))]
    return {"output": reference(case, norms)["output"]}


def _norm_of_the_base(case: Case) -> dict:
    return {"output": reference(case, [norm(row) for row in listed(case["base"]["W"])])["output"]}


def _bias_scaled(case: Case) -> dict:
    bias = case["base"]["bias"]
    if bias is None:
        return {"output": reference(case)["output"]}
    factor = case["tensors"]["magnitude"] / tensor(row_norms(case))
    return {"output": reference(changed(case, "base", bias=bias * factor))["output"]}


MUTATIONS = [
    ("the gradient flows through the norm", _gradient_through_the_norm),
    ("the norm is taken over columns", _norm_over_columns),
    ("the norm is that of W alone", _norm_of_the_base),
    ("the bias is scaled too", _bias_scaled),
    (
        "alpha is not divided by the rank",
        lambda case: reference(
            changed(case, "options", alpha=case["options"]["alpha"] * case["options"]["rank"])
        ),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
