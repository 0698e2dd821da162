"""Linear probe: logits = W pool(h) + b over frozen states.

pool is the first real token, the last real token, or the mean over real tokens. tensors: W (classes, width),
b (classes,). inputs: h (rows, tokens, width), mask (rows, tokens) bool. options: pool. output (rows,
classes).
"""

import torch

from ._cases import Case, Draw, changed, mask_of, output_gradients
from ._loops import linear, listed, tensor


def cases() -> list[Case]:
    found = []
    for seed, (pool, padding) in enumerate(
        [("first", "left"), ("first", "right"), ("last", "right"), ("last", "left"), ("mean", "right")]
    ):
        draw = Draw(1600 + seed)
        found.append(
            {
                "name": f"{pool}, padding {padding}",
                "options": {"pool": pool},
                "base": {},
                "tensors": {"W": draw(3, 4), "b": draw(3)},
                "trained": ("W", "b"),
                "inputs": {"h": draw(2, 5, 4), "mask": mask_of([5, 3], 5, padding)},
                "cotangent": draw(2, 3),
            }
        )
    return found


def reference(case: Case) -> dict:
    W, b = listed(case["tensors"]["W"]), listed(case["tensors"]["b"])
    output = []
    for states, mask in zip(listed(case["inputs"]["h"]), listed(case["inputs"]["mask"])):
        real = [state for state, is_real in zip(states, mask) if is_real]
        if case["options"]["pool"] == "mean":
            pooled = [sum(state[c] for state in real) / len(real) for c in range(len(real[0]))]
        else:
            pooled = real[0 if case["options"]["pool"] == "first" else -1]
        output.append(linear(pooled, W, b))
    return {"output": tensor(output)}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case, inputs=("h",))


MUTATIONS = [
    (
        "pads are pooled too",
        lambda case: reference(changed(case, "inputs", mask=torch.ones_like(case["inputs"]["mask"]))),
    ),
    (
        "the other end",
        lambda case: reference(
            changed(case, "options", pool="last" if case["options"]["pool"] == "first" else "first")
        ),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
