"""Full fine-tuning: every entry of W and of the bias is trained.

    y = W x + bias

base: W (out, in), bias (out,) or None: where training began. tensors: W, and bias where the base has one: the
trained copies. inputs: x (rows, tokens, in). delta = W - base W, bias_delta likewise.
"""

from ._cases import Case, Draw, output_gradients
from ._loops import combine, every_token, linear, listed, tensor


def cases() -> list[Case]:
    found = []
    for seed, (n_in, n_out, bias) in enumerate([(5, 3, True), (3, 4, False)]):
        draw = Draw(1200 + seed)
        base = {"W": draw(n_out, n_in), "bias": draw(n_out) if bias else None}
        tensors = {name: draw(*value.shape) for name, value in base.items() if value is not None}
        found.append(
            {
                "name": f"{n_in} to {n_out}, bias {bias}",
                "options": {},
                "base": base,
                "tensors": tensors,
                "trained": tuple(tensors),
                "inputs": {"x": draw(2, 3, n_in)},
                "cotangent": draw(2, 3, n_out),
            }
        )
    return found


def reference(case: Case) -> dict:
    t = {name: listed(value) for name, value in case["tensors"].items()}
    output = every_token(lambda token: linear(token, t["W"], t.get("bias")), listed(case["inputs"]["x"]))
    found = {
        "output": tensor(output),
        "delta": tensor(combine(1.0, t["W"], -1.0, listed(case["base"]["W"]))),
    }
    if "bias" in t:
        found["bias_delta"] = tensor([a - b for a, b in zip(t["bias"], listed(case["base"]["bias"]))])
    return found


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _from_the_base(case: Case, names) -> dict:
    kept = {name: case["base"][name] if name in names else value for name, value in case["tensors"].items()}
    return reference({**case, "tensors": kept})


MUTATIONS = [
    ("the base's weight is used", lambda case: _from_the_base(case, ("W",))),
    ("the base's bias is used", lambda case: _from_the_base(case, ("bias",))),
    (
        "the trained weight is added to the base's",
        lambda case: reference(
            {**case, "tensors": {**case["tensors"], "W": case["tensors"]["W"] + case["base"]["W"]}}
        ),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
