"""DiReFT: a free low-rank edit of hidden states at the prompt's ends. Wu et al., 2024, arXiv:2404.03592.

    h <- h + R^T (W h + b)        at the first `first` and the last `last` tokens of the prompt

tensors: R, W (rank, width), b (rank,); untied cases hold R_last, W_last, b_last for the last positions. inputs: x
(rows, tokens, width), prompt (rows, tokens) bool. On a prompt of n < first + last tokens each end takes at most
n // 2. Other tokens stay as they are. options: rank, first, last, tied.
"""

import torch

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, dot, listed, tensor, times


def cases() -> list[Case]:
    found = []
    for seed, (rank, prompts, first, last, tied) in enumerate(
        [
            (2, [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], 2, 1, True),
            (1, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], 2, 2, False),
            (3, [[0, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]], 1, 0, True),
        ]
    ):
        draw = Draw(2600 + seed)
        width, rows = 4, len(prompts)
        tensors = {}
        for end in ("",) if tied else ("", "_last"):
            tensors |= {"R" + end: draw(rank, width), "W" + end: draw(rank, width), "b" + end: draw(rank)}
        found.append(
            {
                "name": f"rank {rank}, first {first}, last {last}, tied {tied}",
                "options": {"rank": rank, "first": first, "last": last, "tied": tied},
                "base": {},
                "tensors": tensors,
                "trained": tuple(tensors),
                "inputs": {"x": draw(rows, 6, width), "prompt": torch.tensor(prompts).bool()},
                "cotangent": draw(rows, 6, width),
            }
        )
    return found


def places(prompt, first: int, last: int) -> dict[int, str]:
    """Index of each edited token of one row -> the set of tensors that edits it."""
    real = [i for i, inside in enumerate(prompt) if inside]
    if len(real) < first + last and first and last:
        first, last = min(first, len(real) // 2), min(last, len(real) // 2)
    return dict.fromkeys(real[:first], "") | dict.fromkeys(real[len(real) - last :], "_last")


def reference(case: Case, subtract: bool = False, everywhere: bool = False, bias: float = 1.0) -> dict:
    options = case["options"]
    t = {name: listed(value) for name, value in case["tensors"].items()}
    output = listed(case["inputs"]["x"])
    for row, prompt in enumerate(listed(case["inputs"]["prompt"])):
        chosen = places(prompt, options["first"], options["last"])
        for i, end in (dict.fromkeys(range(len(prompt)), "") if everywhere else chosen).items():
            end = "" if options["tied"] else end
            h = output[row][i]
            for R, W, b in zip(t["R" + end], t["W" + end], t["b" + end]):
                size = dot(W, output[row][i]) + bias * b - (dot(R, output[row][i]) if subtract else 0.0)
                h = add(h, times(size, R))
            output[row][i] = h
    return {"output": tensor(output)}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _swapped(case: Case) -> dict:
    t = case["tensors"]
    other = {"R": "W", "W": "R"}
    return reference(changed(case, "tensors", **{n: t[other.get(n[0], n[0]) + n[1:]] for n in t}))


MUTATIONS = [
    ("R h is taken away, as in NoReFT", lambda case: reference(case, subtract=True)),
    ("every token is edited", lambda case: reference(case, everywhere=True)),
    ("R and W change places", _swapped),
    ("there is no b", lambda case: reference(case, bias=0.0)),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
