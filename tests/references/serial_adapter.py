"""Serial bottleneck adapter (Houlsby): y <- y + s f(y) behind a sub-layer. Houlsby et al., 2019,
arXiv:1902.00751.

    f(y) = U act(D y + D_bias) + U_bias

y is the sub-layer's output after its own projection and before the residual addition. tensors: D (m, d),
D_bias (m,), U (d, m), U_bias (d,). inputs: y (rows, tokens, d). Options: activation, and scale s (1).
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, bottleneck, every_token, listed, tensor, times


def cases() -> list[Case]:
    found = []
    for seed, (activation, width, m, scale) in enumerate(
        [
            ("relu", 5, 2, 1.0),
            ("gelu", 4, 3, 1.0),
            ("gelu_new", 3, 2, 1.0),
            ("silu", 4, 6, 1.0),
            ("tanh", 3, 2, 4.0),
        ]
    ):
        draw = Draw(500 + seed)
        found.append(
            {
                "name": f"{activation}, {m} of {width}, scale {scale:g}",
                "options": {"activation": activation, "scale": scale},
                "base": {},
                "tensors": {
                    "D": draw(m, width, scale=1.5),
                    "D_bias": draw(m),
                    "U": draw(width, m, scale=1.5),
                    "U_bias": draw(width),
                },
                "trained": ("D", "D_bias", "U", "U_bias"),
                "inputs": {"y": draw(2, 3, width)},
                "cotangent": draw(2, 3, width),
            }
        )
    return found


def reference(case: Case, keep: float = 1.0) -> dict:
    t = {name: listed(value) for name, value in case["tensors"].items()}
    activation, scale = case["options"]["activation"], case["options"]["scale"]

    def adapter(y):
        return add(
            times(keep, y), times(scale, bottleneck(y, t["D"], t["D_bias"], t["U"], t["U_bias"], activation))
        )

    return {"output": tensor(every_token(adapter, listed(case["inputs"]["y"])))}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case, inputs=("y",))


MUTATIONS = [
    ("the residual is added twice", lambda case: reference(case, keep=2.0)),
    ("the inner residual is missing", lambda case: reference(case, keep=0.0)),
    (
        "another activation",
        lambda case: reference(
            changed(case, "options", activation="relu" if case["options"]["activation"] != "relu" else "gelu")
        ),
    ),
    (
        "the exact gelu for the tanh form",
        lambda case: reference(
            changed(case, "options", activation=case["options"]["activation"].replace("gelu_new", "gelu"))
        ),
    ),
    (
        "the upper bias is left out",
        lambda case: reference(changed(case, "tensors", U_bias=0 * case["tensors"]["U_bias"])),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
