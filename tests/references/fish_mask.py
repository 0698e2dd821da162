"""FISH mask: train the k entries of largest Fisher information. Sung et al., 2021, arXiv:2111.09839.

    F_i = sum over samples of g_i(x, y)^2                       the empirical form, one sample at a time
    F_i = sum over samples, sum_y p(y | x) g_i(x, y)^2          option expected=True

g is the gradient of the cross-entropy of one sample. The model of the cases is logits = W2 (W1 x) + b2, its
parameters in that order (W1, W2, b2). The k = int(keep_ratio * all entries) largest are chosen over all
parameters together; of equal scores the lowest flat index (over the concatenation in order) wins. base: W1
(hidden, in), W2 (classes, hidden), b2 (classes,). tensors: values (k,), the trained changes, in the order of
the flat index. inputs: x (samples, in), y (samples,) class numbers.

The reference gives "score.NAME", "mask.NAME" (1 or 0), "adapted.NAME" = base + scattered values, indices
(k,), and output: the adapted model's logits (samples, classes).
"""

import torch

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, linear, listed, softmax, tensor, transpose

ORDER = ("W1", "W2", "b2")


def cases() -> list[Case]:
    found = []
    for seed, (n_in, hidden, classes, k, expected, tied) in enumerate(
        [(3, 2, 3, 6, False, False), (4, 2, 4, 5, True, False), (4, 2, 3, 7, False, True)]
    ):
        draw = Draw(1300 + seed)
        x = draw(4, n_in)
        if tied:  # equal columns of x make equal scores in W1; k is moved so that it cuts between two of them
            x[:, 1] = x[:, 0]
        base = {"W1": draw(hidden, n_in), "W2": draw(classes, hidden), "b2": draw(classes)}
        total = sum(value.numel() for value in base.values())
        case = {
            "name": f"{k} of {total}, expected {expected}, tied {tied}",
            "options": {"keep_ratio": (k + 0.5) / total, "expected": expected, "tied": tied},
            "base": base,
            "tensors": {"values": draw(k)},
            "trained": ("values",),
            "inputs": {"x": x, "y": torch.arange(4) % classes},
            "cotangent": draw(4, classes),
        }
        if tied:
            ranked = sorted(_flat(_scores(case)), reverse=True)
            k = next(i for i in range(2, len(ranked)) if ranked[i - 1] == ranked[i])
            case["options"]["keep_ratio"] = (k + 0.5) / total
            case["tensors"]["values"] = draw(k)
        found.append(case)
    return found


def _sample_gradients(base: dict, x, y: int) -> dict:
    """Of one sample's cross-entropy, by the chain rule."""
    hidden = linear(x, base["W1"])
    p = softmax(linear(hidden, base["W2"], base["b2"]))
    miss = [value - (1.0 if c == y else 0.0) for c, value in enumerate(p)]
    back = linear(miss, transpose(base["W2"]))
    return {
        "W1": [[b * a for a in x] for b in back],
        "W2": [[m * h for h in hidden] for m in miss],
        "b2": [miss],
    }


def _flat(parameters: dict) -> list[float]:
    return [entry for name in ORDER for row in parameters[name] for entry in row]


def _scores(case: Case, square=lambda g: g * g, per_sample: bool = True) -> dict:
    base = {name: listed(value) for name, value in case["base"].items()}
    total = {name: [[0.0] * len(row) for row in _rows(base[name])] for name in ORDER}
    summed = {name: [[0.0] * len(row) for row in _rows(base[name])] for name in ORDER}
    for x, y in zip(listed(case["inputs"]["x"]), listed(case["inputs"]["y"])):
        p = softmax(linear(linear(x, base["W1"]), base["W2"], base["b2"]))
        labels = [(c, p[c]) for c in range(len(p))] if case["options"]["expected"] else [(y, 1.0)]
        for label, weight in labels:
            gradient = _sample_gradients(base, x, label)
            for name in ORDER:
                for i, row in enumerate(gradient[name]):
                    for j, g in enumerate(row):
                        total[name][i][j] += weight * square(g)
                        summed[name][i][j] += weight * g
    if per_sample:
        return total
    return {name: [[square(g) for g in row] for row in summed[name]] for name in ORDER}


def _rows(value):
    return value if isinstance(value[0], list) else [value]


def reference(case: Case, lowest_first: bool = True, **how) -> dict:
    scores = _scores(case, **how)
    flat = _flat(scores)
    k = int(case["options"]["keep_ratio"] * len(flat))
    ranked = sorted(range(len(flat)), key=lambda i: (-flat[i], i if lowest_first else -i))
    indices = sorted(ranked[:k])
    values = dict(zip(indices, listed(case["tensors"]["values"])))

    found, place, adapted = {"indices": torch.tensor(indices)}, 0, {}
    for name in ORDER:
        shape = case["base"][name].shape
        rows = _rows(listed(case["base"][name]))
        mask, moved = [], []
        for row in rows:
            mask.append([1.0 if place + j in values else 0.0 for j in range(len(row))])
            moved.append([w + values.get(place + j, 0.0) for j, w in enumerate(row)])
            place += len(row)
        adapted[name] = moved
        found[f"score.{name}"] = tensor(scores[name]).reshape(shape)
        found[f"mask.{name}"] = tensor(mask).reshape(shape)
        found[f"adapted.{name}"] = tensor(moved).reshape(shape)
    logits = [
        add(linear(linear(x, adapted["W1"]), adapted["W2"]), adapted["b2"][0])
        for x in listed(case["inputs"]["x"])
    ]
    return {**found, "output": tensor(logits)}


def gradients(case: Case) -> dict:
    """The mask is held: it is a function of the base alone."""
    return output_gradients(reference, case, inputs=())


MUTATIONS = [
    ("the square of the batch's gradient", lambda case: reference(case, per_sample=False)),
    ("absolute values for squares", lambda case: reference(case, square=abs)),
    ("of equal scores the highest index", lambda case: reference(case, lowest_first=False)),
    (
        "empirical for expected",
        lambda case: reference(changed(case, "options", expected=not case["options"]["expected"])),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
