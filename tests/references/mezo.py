"""MeZO: a gradient step from two forward passes. Malladi et al., 2023, arXiv:2305.17333.

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)         z ~ N(0, I), drawn again from the step's seed
    theta <- theta - rate (g z + decay theta)                   no decay on norms and biases

The parameters of the cases, in their order, are W (2, 3), bias (2,), norm (3,); the loss of one step is

    L = mean over rows of [ sum_c (W (norm * x) + bias - y)_c^2 / 2 + 0.1 sum_c (W (norm * x) + bias)_c^3 ]

inputs: x (steps, rows, 3), y (steps, rows, 2). "seeds": one a step. `draws(seed, shapes)` gives z: one
generator seeded once a step, float64 normals, tensor after tensor in order; what draws in another way can be
given "z", the same numbers. options: eps, rate, decay. `reference` gives g (steps,), the two losses "plus"
and "minus" (steps,), and W, bias, norm after each step (steps, ...).
"""

import torch

from ._cases import Case, Draw, changed
from ._loops import linear, listed, tensor

ORDER = ("W", "bias", "norm")


def draws(seed: int, shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def cases() -> list[Case]:
    found = []
    for seed, (eps, decay) in enumerate([(1e-3, 0.0), (1e-1, 0.2)]):
        draw = Draw(2600 + seed)
        tensors = {"W": draw(2, 3), "bias": draw(2), "norm": draw(3, mean=1.0, scale=0.2)}
        seeds = [11, 5, 2026]
        shapes = [tensors[name].shape for name in ORDER]
        found.append(
            {
                "name": f"eps {eps:g}, decay {decay:g}",
                "options": {"eps": eps, "rate": 0.01, "decay": decay},
                "tensors": tensors,
                "trained": ORDER,
                "inputs": {"x": draw(3, 4, 3), "y": draw(3, 4, 2)},
                "seeds": seeds,
                "z": [dict(zip(ORDER, draws(one, shapes))) for one in seeds],
            }
        )
    return found


def loss(theta: dict, x, y) -> float:
    total = 0.0
    for row, target in zip(x, y):
        out = linear([n * a for n, a in zip(theta["norm"], row)], theta["W"], theta["bias"])
        total += sum((o - a) ** 2 / 2 + 0.1 * o**3 for o, a in zip(out, target))
    return total / len(x)


def _moved(theta: dict, size: float, z: dict) -> dict:
    def move(p, d):
        return [move(a, b) for a, b in zip(p, d)] if isinstance(p, list) else p + size * d

    return {name: move(theta[name], z[name]) for name in theta}


def reference(case: Case, two_sided: bool = True, decayed=("W",), halved: bool = True) -> dict:
    options = case["options"]
    eps, rate = options["eps"], options["rate"]
    theta = {name: listed(value) for name, value in case["tensors"].items()}
    history = {name: [] for name in ("g", "plus", "minus", *ORDER)}
    for x, y, directions in zip(listed(case["inputs"]["x"]), listed(case["inputs"]["y"]), case["z"]):
        z = {name: listed(value) for name, value in directions.items()}
        plus = loss(_moved(theta, eps, z), x, y)
        minus = loss(_moved(theta, -eps, z), x, y) if two_sided else loss(theta, x, y)
        g = (plus - minus) / (2 * eps if two_sided and halved else eps)
        decay = {name: options["decay"] if name in decayed else 0.0 for name in ORDER}
        shrunk = {name: _moved({name: theta[name]}, -rate * decay[name], theta)[name] for name in ORDER}
        theta = _moved(shrunk, -rate * g, z)
        for name, value in (("g", g), ("plus", plus), ("minus", minus), *theta.items()):
            history[name].append(value)
    return {name: tensor(value) for name, value in history.items()}


def gradients(case: Case) -> dict:
    return {}


def _flipped(case: Case) -> dict:
    z = [{name: -value if name == "bias" else value for name, value in step.items()} for step in case["z"]]
    return reference({**case, "z": z})


MUTATIONS = [
    ("one-sided", lambda case: reference(case, two_sided=False)),
    ("not divided by 2", lambda case: reference(case, halved=False)),
    ("biases decay", lambda case: reference(case, decayed=ORDER)),
    ("another stream of directions", _flipped),
    ("no decay", lambda case: reference(changed(case, "options", decay=0.0))),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
