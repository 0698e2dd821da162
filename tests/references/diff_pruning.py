"""Diff pruning: W' = W + z_group z w with hard-concrete gates z. Guo et al., 2020, arXiv:2012.07463.

    s = sigmoid(log u - log(1 - u) + alpha)      z = min(1, max(0, s (high - low) + low))
    penalty = weight * [ sum_i sigmoid(alpha_i - log(-low / high)) + the same of alpha_group ]

base: W (out, in), bias (out,) or None. tensors: w (out, in), alpha (out, in), alpha_group () (one gate for
the whole tensor). inputs: x (rows, tokens, in); in training the noise u (out, in) and u_group (), uniform in
(1e-4, 1 - 1e-4). options: low -1.5, high 1.5, weight of the penalty (1.25e-7 in the paper, larger here),
training, keep. Outside training u is 0.5, the median; with keep, only the `keep` largest |z_group z w| are
left (of equal ones the lowest flat index). delta = z_group z w.
"""

import math

from ._cases import Case, Draw, changed, output_gradients, penalty_gradients
from ._loops import combine, every_token, linear, listed, sigmoid, tensor


def cases() -> list[Case]:
    found = []
    usual = {"low": -1.5, "high": 1.5, "weight": 0.01}
    for seed, (n_in, n_out, bias, options) in enumerate(
        [
            (5, 3, True, {**usual, "training": True}),
            (3, 4, False, {**usual, "low": -0.1, "high": 1.1, "training": True}),
            (4, 3, True, {**usual, "training": False}),
            (4, 3, False, {**usual, "training": False, "keep": 5}),
        ]
    ):
        draw = Draw(1400 + seed)
        u = draw.uniform(n_out, n_in, low=1e-4, high=1 - 1e-4)
        found.append(
            {
                "name": f"{n_in} to {n_out}, {options}",
                "options": options,
                "base": {"W": draw(n_out, n_in), "bias": draw(n_out) if bias else None},
                "tensors": {
                    "w": draw(n_out, n_in),
                    "alpha": draw(n_out, n_in),
                    "alpha_group": draw(scale=0.2, mean=0.3),
                },
                "trained": ("w", "alpha", "alpha_group"),
                "inputs": {
                    "x": draw(2, 3, n_in),
                    "u": u,
                    "u_group": draw.uniform(low=0.4, high=0.6),
                },
                "cotangent": draw(2, 3, n_out),
            }
        )
    return found


def gate(alpha: float, u: float, options: dict) -> float:
    s = sigmoid(math.log(u) - math.log(1 - u) + alpha)
    return min(1.0, max(0.0, s * (options["high"] - options["low"]) + options["low"]))


def expected_open(alpha: float, options: dict, with_ratio: bool = True) -> float:
    """The probability that the gate is not zero."""
    ratio = math.log(-options["low"] / options["high"]) if with_ratio else 0.0
    return sigmoid(alpha - ratio)


def reference(case: Case, group: bool = True, with_ratio: bool = True) -> dict:
    options, base = case["options"], case["base"]
    w, alpha, alpha_group = (listed(case["tensors"][name]) for name in ("w", "alpha", "alpha_group"))
    u, u_group = listed(case["inputs"]["u"]), listed(case["inputs"]["u_group"])
    n_out, n_in = len(w), len(w[0])
    if not options["training"]:
        u, u_group = [[0.5] * n_in for _ in range(n_out)], 0.5
    whole = gate(alpha_group, u_group, options) if group else 1.0
    delta = [
        [whole * gate(alpha[i][j], u[i][j], options) * w[i][j] for j in range(n_in)] for i in range(n_out)
    ]
    if options.get("keep") is not None:
        places = [(i, j) for i in range(n_out) for j in range(n_in)]
        kept = sorted(places, key=lambda place: -abs(delta[place[0]][place[1]]))[: options["keep"]]
        delta = [[delta[i][j] if (i, j) in kept else 0.0 for j in range(n_in)] for i in range(n_out)]
    adapted = combine(1.0, listed(base["W"]), 1.0, delta)
    bias = listed(base["bias"])
    output = every_token(lambda token: linear(token, adapted, bias), listed(case["inputs"]["x"]))
    penalty = sum(expected_open(a, options, with_ratio) for row in alpha for a in row)
    penalty += expected_open(alpha_group, options, with_ratio)
    return {
        "output": tensor(output),
        "delta": tensor(delta),
        "penalty": tensor(options["weight"] * penalty),
    }


def gradients(case: Case) -> dict:
    found = output_gradients(reference, case)
    return {**found, **penalty_gradients(reference, case, ("alpha", "alpha_group"))}


MUTATIONS = [
    ("no group gate", lambda case: reference(case, group=False)),
    ("the log ratio is left out of the penalty", lambda case: reference(case, with_ratio=False)),
    ("no noise in training", lambda case: reference(changed(case, "options", training=False))),
    ("noise outside training", lambda case: reference(changed(case, "options", training=True))),
    ("another stretch", lambda case: reference(changed(case, "options", low=-0.2, high=1.2))),
    ("nothing is pruned", lambda case: reference(changed(case, "options", keep=None))),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
