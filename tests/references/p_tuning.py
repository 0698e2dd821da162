"""P-tuning: rows before the text, made by a network. Liu et al., 2021, arXiv:2103.10385.

    mlp     p = L3 relu(L2 relu(L1 e + L1_bias) + L2_bias) + L3_bias
    lstm    p = L2 relu(L1 [f ; g] + L1_bias) + L2_bias      f, g: the states of an LSTM run forwards and backwards
    gates   i, f, o = sigmoid, c~ = tanh of W x + W_bias + V h + V_bias, rows of four blocks in the order i, f, c~, o
            c <- f c + i c~      h <- o tanh(c)

tensors: E (length, d) and the network's; of an LSTM W0, V0, W0_bias, V0_bias for the first layer, W1, ... for the
second, "_back" for the one that runs backwards. The output is the prompt, (length, d); there is no x.
"""

import math

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, linear, listed, sigmoid, tensor


def cases() -> list[Case]:
    return [_mlp(2700, 3, 2, 4), _mlp(2701, 2, 3, 3), _lstm(2702, 3, 2, 2, 1), _lstm(2703, 3, 2, 2, 2)]


def _case(name: str, options: dict, tensors: dict, cotangent) -> Case:
    return {
        "name": name,
        "options": options,
        "base": {},
        "tensors": tensors,
        "trained": tuple(tensors),
        "inputs": {},
        "cotangent": cotangent,
    }


def _mlp(seed: int, length: int, d: int, h: int) -> Case:
    draw = Draw(seed)
    tensors = {"E": draw(length, d)}
    for name, shape in {"L1": (h, d), "L2": (h, h), "L3": (d, h)}.items():
        tensors |= {name: draw(*shape), name + "_bias": draw(shape[0])}
    options = {"encoder": "mlp", "length": length, "hidden": h}
    return _case(f"mlp, {length} rows of {d} through {h}", options, tensors, draw(length, d))


def _lstm(seed: int, length: int, d: int, h: int, layers: int) -> Case:
    draw = Draw(seed)
    tensors = {"E": draw(length, d)}
    for layer in range(layers):
        for end in ("", "_back"):
            for name, into in (("W", d if layer == 0 else 2 * h), ("V", h)):
                key = f"{name}{layer}{end}"
                tensors |= {key: draw(4 * h, into), key + "_bias": draw(4 * h)}
    for name, shape in {"L1": (2 * h, 2 * h), "L2": (d, 2 * h)}.items():
        tensors |= {name: draw(*shape), name + "_bias": draw(shape[0])}
    options = {"encoder": "lstm", "length": length, "hidden": h, "layers": layers}
    return _case(f"lstm of {layers}, {length} rows of {d} through {h}", options, tensors, draw(length, d))


def _relu(u):
    return [max(a, 0.0) for a in u]


def _run(rows, t: dict, tail: str, h: int, back: bool):
    """The states of one direction of one layer, in the order of the rows."""
    state, cell, found = [0.0] * h, [0.0] * h, []
    for row in reversed(rows) if back else rows:
        z = add(
            linear(row, t["W" + tail], t["W" + tail + "_bias"]),
            linear(state, t["V" + tail], t["V" + tail + "_bias"]),
        )
        i, f, new, o = (z[k * h : (k + 1) * h] for k in range(4))
        cell = [sigmoid(f[j]) * cell[j] + sigmoid(i[j]) * math.tanh(new[j]) for j in range(h)]
        state = [sigmoid(o[j]) * math.tanh(cell[j]) for j in range(h)]
        found.append(state)
    return found[::-1] if back else found


def reference(case: Case, one_way: bool = False, act=_relu) -> dict:
    options = case["options"]
    t = {name: listed(value) for name, value in case["tensors"].items()}
    rows, h = t["E"], options["hidden"]
    names = ["L1", "L2", "L3"]
    if options["encoder"] == "lstm":
        names = ["L1", "L2"]
        for layer in range(options["layers"]):
            ahead = _run(rows, t, str(layer), h, False)
            behind = _run(rows, t, f"{layer}_back", h, not one_way)
            rows = [a + b for a, b in zip(ahead, behind)]
    for k, name in enumerate(names):
        rows = [linear(act(row) if k else row, t[name], t[name + "_bias"]) for row in rows]
    return {"output": tensor(rows)}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case, ())


def _flat(case: Case) -> dict:
    return {"output": case["tensors"]["E"]}


def _no_biases(case: Case) -> dict:
    t = case["tensors"]
    return reference(changed(case, "tensors", **{n: 0 * v for n, v in t.items() if n.endswith("_bias")}))


MUTATIONS = [
    ("the rows are not put through the network", _flat),
    ("both directions run forwards", lambda case: reference(case, one_way=True)),
    ("tanh stands for relu", lambda case: reference(case, act=lambda u: [math.tanh(a) for a in u])),
    ("the network has no biases", _no_biases),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
