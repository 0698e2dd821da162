"""HyperFormer and HyperFormer++: adapters written by a shared network. Mahabadi et al., 2021,
arXiv:2106.04489.

    ++       I = LN( trunk2 relu(trunk1 [task_k ; layer_l ; position_p] + trunk1_bias) + trunk2_bias )
    plain    I = LN( trunk2 relu(trunk1 task_k + trunk1_bias) + trunk2_bias ), and generators of their own
             for every layer and site
    each generated tensor = G I + G_bias, read row by row into its shape
    y <- y + LN( U act(D y + d) + u; scale, shift )

tensors: task (tasks, t); ++ also layer (layers, t), position (2, t); trunk1 (e', 3 t or t), trunk1_bias,
trunk2 (e, e'), trunk2_bias, trunk_norm (e,), trunk_norm_bias; generators down_weight (m d, e) for D (m, d),
down_bias (m, e) for d, up_weight (d m, e) for U (d, m), up_bias (d, e) for u, norm_scale and norm_shift (d,
e); to each its bias, as down_weight_bias (m d,). inputs: y (rows, tokens, d), the sub-layer's output;
task_ids (rows,), one task a row. options: plus, layer, position (0 attention, 1 MLP), activation, width, m.
Both norms have eps 1e-5.

The reference also gives what is generated per row: "D", "U", "scale", "shift".
"""

import torch

from ._cases import Case, Draw, changed, output_gradients
from ._loops import ACTIVATIONS, add, bottleneck, layer_norm, linear, listed, tensor

GENERATED = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_scale", "norm_shift")


def cases() -> list[Case]:
    found = []
    for seed, (plus, layer, position, task_ids, activation) in enumerate(
        [(True, 1, 0, [0, 2], "gelu_new"), (True, 0, 1, [1, 1], "silu"), (False, 0, 0, [2, 1], "relu")]
    ):
        draw = Draw(2200 + seed)
        t, hidden, e, width, m, tasks, layers = 2, 4, 3, 3, 2, 3, 2
        tensors = {"task": draw(tasks, t)}
        if plus:
            tensors |= {"layer": draw(layers, t), "position": draw(2, t)}
        tensors |= {
            "trunk1": draw(hidden, 3 * t if plus else t),
            "trunk1_bias": draw(hidden, mean=0.5),
            "trunk2": draw(e, hidden),
            "trunk2_bias": draw(e),
            "trunk_norm": draw(e),
            "trunk_norm_bias": draw(e),
        }
        for name, size in zip(GENERATED, (m * width, m, width * m, width, width, width)):
            tensors |= {name: draw(size, e, scale=0.7), f"{name}_bias": draw(size, scale=0.7)}
        found.append(
            {
                "name": f"plus {plus}, layer {layer}, position {position}, tasks {task_ids}, {activation}",
                "options": {
                    "plus": plus,
                    "layer": layer,
                    "position": position,
                    "activation": activation,
                    "width": width,
                    "m": m,
                },
                "base": {},
                "tensors": tensors,
                "trained": tuple(tensors),
                "inputs": {"y": draw(2, 2, width), "task_ids": torch.tensor(task_ids)},
                "cotangent": draw(2, 2, width),
            }
        )
    return found


def conditioning(t: dict, options: dict, task: int, order=("task", "layer", "position")):
    """I of one task: (e,)"""
    places = {"task": task, "layer": options["layer"], "position": options["position"]}
    joined = [entry for name in order if name in t for entry in t[name][places[name]]]
    hidden = [ACTIVATIONS["relu"](a) for a in linear(joined, t["trunk1"], t["trunk1_bias"])]
    return layer_norm(linear(hidden, t["trunk2"], t["trunk2_bias"]), t["trunk_norm"], t["trunk_norm_bias"])


def cut(flat, rows: int, columns: int, transposed: bool = False):
    if transposed:
        return [[flat[j * rows + i] for j in range(columns)] for i in range(rows)]
    return [[flat[i * columns + j] for j in range(columns)] for i in range(rows)]


def reference(case: Case, transposed: bool = False, order=("task", "layer", "position"), after=True) -> dict:
    options = case["options"]
    t = {name: listed(value) for name, value in case["tensors"].items()}
    width, m = options["width"], options["m"]
    output, made = [], {"D": [], "U": [], "scale": [], "shift": []}
    for y, task in zip(listed(case["inputs"]["y"]), listed(case["inputs"]["task_ids"])):
        known = conditioning(t, options, task, order)
        flat = {name: linear(known, t[name], t[f"{name}_bias"]) for name in GENERATED}
        D, U = cut(flat["down_weight"], m, width, transposed), cut(flat["up_weight"], width, m, transposed)
        scale, shift = flat["norm_scale"], flat["norm_shift"]
        states = []
        for state in y:
            branch = bottleneck(state, D, flat["down_bias"], U, flat["up_bias"], options["activation"])
            normed = layer_norm(branch, scale, shift)
            states.append(add(state, normed) if after else layer_norm(add(state, branch), scale, shift))
        output.append(states)
        for name, value in zip(made, (D, U, scale, shift)):
            made[name].append(value)
    return {"output": tensor(output), **{name: tensor(value) for name, value in made.items()}}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case, ("y",))


MUTATIONS = [
    ("generated matrices are read column by column", lambda case: reference(case, transposed=True)),
    ("layer and position change places", lambda case: reference(case, order=("task", "position", "layer"))),
    ("the norm is behind the residual", lambda case: reference(case, after=False)),
    (
        "all rows have the first row's task",
        lambda case: reference(changed(case, "inputs", task_ids=case["inputs"]["task_ids"][:1].expand(2))),
    ),
    (
        "generators without bias",
        lambda case: reference(
            changed(
                case, "tensors", **{f"{name}_bias": 0 * case["tensors"][f"{name}_bias"] for name in GENERATED}
            )
        ),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
