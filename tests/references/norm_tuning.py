"""Norm tuning: gain' = gain + v, shift' = shift + v_shift. Zhao et al., 2023, arXiv:2312.11420.

    y = norm(x) (gain + v) + shift + v_shift        norm: of layers (less the mean, over the deviation), or RMS

base: gain (width,), shift (width,) or None (RMS), eps. tensors: v (width,), v_shift (width,) where there is a
shift. inputs: x (rows, tokens, width). options: kind, "layer" or "rms".
"""

import math

from ._cases import Case, Draw, changed, output_gradients
from ._loops import every_token, listed, tensor


def cases() -> list[Case]:
    found = []
    for seed, (name, width) in enumerate([("layer", 5), ("rms", 4)]):
        draw, shifts = Draw(3300 + seed), name == "layer"
        tensors = {"v": draw(width)} | ({"v_shift": draw(width)} if shifts else {})
        found.append(
            {
                "name": name,
                "options": {"kind": name},
                "base": {
                    "gain": draw(width, mean=1.0),
                    "shift": draw(width) if shifts else None,
                    "eps": 1e-5,
                },
                "tensors": tensors,
                "trained": tuple(tensors),
                "inputs": {"x": draw(2, 3, width)},
                "cotangent": draw(2, 3, width),
            }
        )
    return found


def reference(case: Case, join=lambda a, b: a + b) -> dict:
    base, t = case["base"], {n: listed(v) for n, v in case["tensors"].items()}
    gain, shift, rms = listed(base["gain"]), listed(base["shift"]), case["options"]["kind"] == "rms"

    def norm(x):
        mean = 0.0 if rms else sum(x) / len(x)
        size = math.sqrt(sum((a - mean) ** 2 for a in x) / len(x) + base["eps"])
        y = [(a - mean) / size * join(g, v) for a, g, v in zip(x, gain, t["v"])]
        return y if shift is None else [a + s + v for a, s, v in zip(y, shift, t["v_shift"])]

    return {"output": tensor(every_token(norm, listed(case["inputs"]["x"])))}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _no_shift(case: Case) -> dict:
    if "v_shift" not in case["tensors"]:
        return reference(case)
    return reference(changed(case, "tensors", v_shift=case["tensors"]["v_shift"] * 0))


MUTATIONS = [
    ("v takes the gain's place", lambda case: reference(case, lambda g, v: v)),
    ("v is a factor", lambda case: reference(case, lambda g, v: g * (1 + v))),
    ("the shift is not trained", _no_shift),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
