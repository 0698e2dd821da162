"""Visual prompt tuning, shallow and deep. Jia et al., 2022, arXiv:2203.12119.

    shallow   x_0 = [cls ; prompt ; patches]                       once, before the first block
    deep      before every later block l the P prompt positions are overwritten by prompt_l

What a block put out at the prompt positions is thrown away in the deep form; the class token keeps index 0.
tensors: prompt (length, width) or, deep, prompt_0, prompt_1, ... one a block. base: for the toy blocks h <- h
+ tanh(M h N^T), M_l (length + tokens, length + tokens) and N_l (width, width). inputs: x (rows, tokens,
width), the class token first. options: length, deep, blocks. output: the states after the last block (rows,
length + tokens, width); per block also "before.l", what reaches block l, and "input.l", what it gets.
"""

import math

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, linear, listed, matmul, tensor


def cases() -> list[Case]:
    found = []
    for seed, (length, deep, blocks) in enumerate([(2, False, 2), (2, True, 2), (1, True, 3)]):
        draw = Draw(1800 + seed)
        rows, tokens, width = 2, 3, 3
        base = {}
        for block in range(blocks):
            base |= {
                f"M_{block}": draw(length + tokens, length + tokens, scale=0.5),
                f"N_{block}": draw(width, width, scale=0.7),
            }
        names = [f"prompt_{block}" for block in range(blocks)] if deep else ["prompt"]
        found.append(
            {
                "name": f"{length} positions, deep {deep}, {blocks} blocks",
                "options": {"length": length, "deep": deep, "blocks": blocks},
                "base": base,
                "tensors": {name: draw(length, width) for name in names},
                "trained": tuple(names),
                "inputs": {"x": draw(rows, tokens, width)},
                "cotangent": draw(rows, length + tokens, width),
            }
        )
    return found


def reference(case: Case, first: int = 1, overwrite: bool = True) -> dict:
    options = case["options"]
    t = {name: listed(value) for name, value in case["tensors"].items()}
    length = options["length"]
    found = {f"{when}.{block}": [] for block in range(options["blocks"]) for when in ("before", "input")}
    output = []
    for row in listed(case["inputs"]["x"]):
        prompt = t["prompt_0"] if options["deep"] else t["prompt"]
        h = row[:first] + prompt + row[first:]
        for block in range(options["blocks"]):
            found[f"before.{block}"].append([list(state) for state in h])
            if options["deep"] and block > 0:
                new = t[f"prompt_{block}"]
                for place in range(length):
                    old = h[first + place]
                    h[first + place] = new[place] if overwrite else add(old, new[place])
            found[f"input.{block}"].append([list(state) for state in h])
            mixed = matmul(listed(case["base"][f"M_{block}"]), h)
            N = listed(case["base"][f"N_{block}"])
            h = [add(state, [math.tanh(a) for a in linear(other, N)]) for state, other in zip(h, mixed)]
        output.append(h)
    return {"output": tensor(output), **{name: tensor(value) for name, value in found.items()}}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _carried_on(case: Case) -> dict:
    if not case["options"]["deep"]:
        return reference(case)
    first = changed(case, "tensors", prompt=case["tensors"]["prompt_0"])
    return reference(changed(first, "options", deep=False))


MUTATIONS = [
    ("put before the class token", lambda case: reference(case, first=0)),
    ("added to the old states, not put in their place", lambda case: reference(case, overwrite=False)),
    ("the first prompt is carried on", _carried_on),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
