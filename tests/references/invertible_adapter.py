"""Invertible adapters at the embedding and, inverted, at its other end. Pfeiffer et al., 2020,
arXiv:2005.00052.

NICE, with e = [e1 ; e2] cut in the middle:

    o1 = e1 + F(e2)    o2 = e2 + G(o1)            inverse: e2 = o2 - G(o1), e1 = o1 - F(e2)

GLOW, F and G giving [s ; t], twice the half width:

    o1 = e1 c(s_F) + t_F,  [s_F ; t_F] = F(e2)    o2 = e2 c(s_G) + t_G,  [s_G ; t_G] = G(o1)
    c(s) = exp(5 * 0.636 atan(s / 5))             inverse: e2 = (o2 - t_G) / c(s_G), e1 = (o1 - t_F) / c(s_F)

F(v) = F_up act(F_down v + F_down_bias) + F_up_bias, G alike. tensors: F_down (m, d/2), F_down_bias (m,), F_up
(d/2, m) (GLOW: (d, m)), F_up_bias, and the same with G. inputs: x (rows, tokens, d). options: form = "nice" |
"glow", inverse (which of the two maps the output is), activation.
"""

import math

from ._cases import Case, Draw, changed, output_gradients
from ._loops import bottleneck, every_token, listed, tensor


def cases() -> list[Case]:
    found = []
    for seed, (form, inverse, width, m, activation) in enumerate(
        [
            ("nice", False, 6, 4, "relu"),
            ("nice", True, 6, 3, "relu"),
            ("nice", False, 4, 3, "gelu"),
            ("glow", False, 4, 4, "relu"),
            ("glow", True, 4, 2, "silu"),
        ]
    ):
        draw = Draw(1520 + seed)
        half = width // 2
        out = width if form == "glow" else half
        tensors = {}
        for net in "FG":
            tensors |= {
                f"{net}_down": draw(m, half),
                f"{net}_down_bias": draw(m),
                f"{net}_up": draw(out, m),
                f"{net}_up_bias": draw(out),
            }
        found.append(
            {
                "name": f"{form}, inverse {inverse}, width {width}, {activation}",
                "options": {"form": form, "inverse": inverse, "activation": activation},
                "base": {},
                "tensors": tensors,
                "trained": tuple(tensors),
                "inputs": {"x": draw(2, 2, width)},
                "cotangent": draw(2, 2, width),
            }
        )
    return found


def _coupling(values, half: int, form: str):
    """(factors, shifts) from what F or G gives."""
    if form == "nice":
        return [1.0] * half, values
    return [math.exp(5 * 0.636 * math.atan(s / 5)) for s in values[:half]], values[half:]


def reference(case: Case, second_reads: str = "o1") -> dict:
    t = {name: listed(value) for name, value in case["tensors"].items()}
    options = case["options"]

    def net(name, v):
        tensors = (t[f"{name}_{part}"] for part in ("down", "down_bias", "up", "up_bias"))
        return _coupling(bottleneck(v, *tensors, options["activation"]), len(v), options["form"])

    def forward(e):
        e1, e2 = e[: len(e) // 2], e[len(e) // 2 :]
        c, shift = net("F", e2)
        o1 = [a * f + s for a, f, s in zip(e1, c, shift)]
        c, shift = net("G", o1 if second_reads == "o1" else e1)
        return o1 + [a * f + s for a, f, s in zip(e2, c, shift)]

    def backward(o):
        o1, o2 = o[: len(o) // 2], o[len(o) // 2 :]
        c, shift = net("G", o1)
        e2 = [(a - s) / f for a, f, s in zip(o2, c, shift)]
        c, shift = net("F", e2 if second_reads == "o1" else o2)
        return [(a - s) / f for a, f, s in zip(o1, c, shift)] + e2

    function = backward if options["inverse"] else forward
    return {"output": tensor(every_token(function, listed(case["inputs"]["x"])))}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _swapped(case: Case) -> dict:
    other = {("G" if name[0] == "F" else "F") + name[1:]: value for name, value in case["tensors"].items()}
    return reference({**case, "tensors": other})


MUTATIONS = [
    ("G reads e1 and not o1", lambda case: reference(case, second_reads="e1")),
    ("F and G are swapped", _swapped),
    (
        "forward for inverse",
        lambda case: reference(changed(case, "options", inverse=not case["options"]["inverse"])),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
