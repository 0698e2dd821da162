"""Pfeiffer adapter: one bottleneck behind the MLP, reading the block's sum. Pfeiffer et al., 2021,
arXiv:2005.00247.

    y <- y + s f(h)      f(h) = U act(D h + D_bias) + U_bias
    h = LN(r + y)  where the block normalises its sums ("post");  h = r + y  ("pre");  h = y  ("none")

y is the MLP's output and r the stream that it will be added to. tensors: D (m, d), D_bias (m,), U (d, m),
U_bias (d,). inputs: y (rows, tokens, d), and r where there is one. base: for "post" the frozen norm's gain
and shift (d,) and eps. Options: activation, scale s.
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, bottleneck, layer_norm, listed, tensor, times


def cases() -> list[Case]:
    found = []
    for seed, (place, activation, width, m, scale) in enumerate(
        [
            ("post", "relu", 5, 2, 1.0),
            ("post", "gelu", 4, 3, 2.0),
            ("pre", "relu", 4, 3, 1.0),
            ("pre", "silu", 3, 2, 0.5),
            ("none", "relu", 5, 2, 1.0),
            ("none", "gelu", 4, 3, 2.0),
        ]
    ):
        draw = Draw(2300 + seed)
        case: Case = {
            "name": f"{place}, {activation}, {m} of {width}, scale {scale:g}",
            "options": {"place": place, "activation": activation, "scale": scale},
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
        if place != "none":
            case["inputs"]["r"] = draw(2, 3, width)
        if place == "post":
            case["base"] = {"gain": draw(width, mean=1.0, scale=0.3), "shift": draw(width), "eps": 1e-5}
        found.append(case)
    return found


def reference(case: Case, place: str | None = None, inner: bool = False) -> dict:
    """place: another place than the case's; inner: f's own input is added to f."""
    t = {name: listed(value) for name, value in case["tensors"].items()}
    activation, scale = case["options"]["activation"], case["options"]["scale"]
    base, place = case["base"], place or case["options"]["place"]

    def edited(y, r):
        h = y if r is None or place == "none" else add(r, y)
        if place == "post" and base:
            h = layer_norm(h, listed(base["gain"]), listed(base["shift"]), base["eps"])
        f = bottleneck(h, t["D"], t["D_bias"], t["U"], t["U_bias"], activation)
        return add(y, times(scale, add(f, h) if inner else f))

    ys, rs = listed(case["inputs"]["y"]), case["inputs"].get("r")
    streams = listed(rs) if rs is not None else [[None] * len(row) for row in ys]
    return {"output": tensor([[edited(y, r) for y, r in zip(*rows)] for rows in zip(ys, streams)])}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case, inputs=tuple(case["inputs"]))


def _unscaled_norm(case: Case) -> dict:
    if not case["base"]:
        return reference(case)
    return reference(
        changed(case, "base", gain=0 * case["base"]["gain"] + 1.0, shift=0 * case["base"]["shift"])
    )


MUTATIONS = [
    ("the adapter reads the MLP's output alone", lambda case: reference(case, place="none")),
    ("the sum is not normalised", lambda case: reference(case, place="pre")),
    ("the norm has no gain and no shift", _unscaled_norm),
    ("the adapter adds its own residual", lambda case: reference(case, inner=True)),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
