"""Parallel adapter: a bottleneck beside a sub-layer, reading what it starts from. He et al., 2022,
arXiv:2110.04366.

    y <- y + s (U act(D r + D_bias) + U_bias)

y is the sub-layer's output, r what the adapter reads: the stream ("residual"), or what the sub-layer reads
("normed"), which are one where no norm stands between. tensors: D (m, d), D_bias (m,), U (d, m), U_bias (d,), and
s (1,) where it is trained. inputs: x (what the sub-layer reads) and y (rows, tokens, d), and r where the stream is
another. Options: activation, scale, reads, learn_scale.
"""

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, bottleneck, listed, tensor, times


def cases() -> list[Case]:
    found = []
    for seed, (activation, width, m, scale, reads, learned, two) in enumerate(
        [
            ("relu", 5, 2, 4.0, "residual", False, True),
            ("gelu", 4, 3, 1.0, "normed", False, True),
            ("relu", 4, 6, 0.5, "residual", True, True),
            ("tanh", 3, 2, 4.0, "residual", False, False),
        ]
    ):
        draw = Draw(2400 + seed)
        tensors = {
            "D": draw(m, width, scale=1.5),
            "D_bias": draw(m),
            "U": draw(width, m, scale=1.5),
            "U_bias": draw(width),
        }
        if learned:
            tensors["s"] = draw(1, mean=1.0)
        inputs = {name: draw(2, 3, width) for name in ("x", "y")}
        if two:
            inputs["r"] = draw(2, 3, width)
        found.append(
            {
                "name": f"{activation}, {m} of {width}, scale {scale:g}, {reads}, learned {learned}, own {two}",
                "options": {
                    "activation": activation,
                    "scale": scale,
                    "reads": reads,
                    "learn_scale": learned,
                },
                "base": {},
                "tensors": tensors,
                "trained": tuple(tensors),
                "inputs": inputs,
                "cotangent": draw(2, 3, width),
            }
        )
    return found


def _read(case: Case) -> str:
    return "r" if case["options"]["reads"] == "residual" and "r" in case["inputs"] else "x"


def reference(case: Case, read: str = "", own: bool = False) -> dict:
    """read: the input that the adapter reads; own: what it reads is added to what it gives."""
    t = {name: listed(value) for name, value in case["tensors"].items()}
    options = case["options"]
    scale = t["s"][0] if "s" in t else options["scale"]
    output = listed(case["inputs"]["y"])
    for y_row, r_row in zip(output, listed(case["inputs"][read or _read(case)])):
        for place, r in enumerate(r_row):
            f = bottleneck(r, t["D"], t["D_bias"], t["U"], t["U_bias"], options["activation"])
            y_row[place] = add(y_row[place], times(scale, add(f, r) if own else f))
    return {"output": tensor(output)}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case, inputs=("y", _read(case)))


def _unscaled(case: Case) -> dict:
    if "s" in case["tensors"]:
        return reference(changed(case, "tensors", s=case["tensors"]["s"] * 0 + 1))
    return reference(changed(case, "options", scale=1.0))


MUTATIONS = [
    ("the adapter stands behind the sub-layer", lambda case: reference(case, read="y")),
    ("the adapter reads the normed stream", lambda case: reference(case, read="x")),
    ("the adapter adds its own residual", lambda case: reference(case, own=True)),
    ("what is added is not scaled", _unscaled),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
