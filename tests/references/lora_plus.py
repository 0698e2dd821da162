"""LoRA+: B learns at ratio times the rate of A. Hayou et al., 2024, arXiv:2402.12354.

    A and all else    rate,           with decay
    B                 ratio * rate,   with decay
    vectors           ratio * rate,   without decay       trained one-dimensional tensors, no embedding
    embedding pairs   embedding_rate, with decay

"parameters": [(name, shape, kind)], kind "A", "B", "vector", "embedding" or "other". options: rate, ratio
(16), embedding_rate (1e-6), decay. `reference` gives "rate.NAME" and "decay.NAME", and "step.NAME": the
parameter after one SGD step with decoupled decay, p <- p - rate_p (gradient + decay_p p), from "values" and
"slopes".
"""

from ._cases import Case, Draw, changed
from ._loops import tensor


def cases() -> list[Case]:
    parameters = [
        ("block.0.query/A", (2, 3), "A"),
        ("block.0.query/B", (4, 2), "B"),
        ("block.0.query/bias", (4,), "vector"),
        ("block.1.value/A", (2, 4), "A"),
        ("block.1.value/B", (3, 2), "B"),
        ("embedding/A", (2, 5), "embedding"),
        ("embedding/B", (3, 2), "embedding"),
        ("head/W", (2, 3), "other"),
    ]
    found = []
    for seed, options in enumerate(
        [
            {"rate": 1e-2, "ratio": 16.0, "embedding_rate": 1e-3, "decay": 0.1},
            {"rate": 3e-2, "ratio": 4.0, "embedding_rate": 1e-6, "decay": 0.0},
        ]
    ):
        draw = Draw(2400 + seed)
        found.append(
            {
                "name": f"ratio {options['ratio']:g}",
                "options": options,
                "parameters": parameters,
                "values": {name: draw(*shape) for name, shape, _ in parameters},
                "slopes": {name: draw(*shape) for name, shape, _ in parameters},
            }
        )
    return found


def reference(case: Case) -> dict:
    options, found = case["options"], {}
    for name, _, kind in case["parameters"]:
        rate = options["rate"]
        if kind in ("B", "vector"):
            rate = options["rate"] * options["ratio"]
        if kind == "embedding":
            rate = options["embedding_rate"]
        decay = 0.0 if kind == "vector" else options["decay"]
        found[f"rate.{name}"], found[f"decay.{name}"] = tensor(rate), tensor(decay)
        p, g = case["values"][name], case["slopes"][name]
        moved = [a - rate * (b + decay * a) for a, b in zip(p.flatten().tolist(), g.flatten().tolist())]
        found[f"step.{name}"] = tensor(moved).reshape(p.shape)
    return found


def gradients(case: Case) -> dict:
    return {}


def _relabelled(case: Case, **kinds) -> dict:
    return reference({**case, "parameters": [(n, s, kinds.get(k, k)) for n, s, k in case["parameters"]]})


MUTATIONS = [
    ("A learns faster, B does not", lambda case: _relabelled(case, A="B", B="A")),
    ("embedding pairs as all others", lambda case: _relabelled(case, embedding="A")),
    ("vectors decay", lambda case: _relabelled(case, vector="B")),
    (
        "B is slower",
        lambda case: reference(changed(case, "options", ratio=1 / case["options"]["ratio"])),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
