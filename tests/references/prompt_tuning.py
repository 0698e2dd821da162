"""Prompt tuning: learned rows put into the sequence of embeddings. Lester et al., 2021, arXiv:2104.08691.

    [p_1 .. p_length ; e(x)]       before the first real token, whatever the padding's side

tensors: prompt (length, width). inputs: x (rows, tokens, width), the embeddings; mask (rows, tokens) bool;
labels (rows, tokens), -100 where there is no loss. options: place = "first", or "after_first" (behind the
first real token, a class token). The reference gives output (rows, length + tokens, width), mask and added
(bool, the new positions), position_ids (counted over real tokens, 0 at pads), labels (-100 at new positions),
and trimmed: the output's entries at the old positions, in their old order, which is x again.
"""

import torch

from ._cases import Case, Draw, changed, mask_of, output_gradients
from ._loops import listed, tensor


def cases() -> list[Case]:
    found = []
    for seed, (length, padding, place) in enumerate(
        [
            (2, "right", "first"),
            (3, "left", "first"),
            (2, "right", "after_first"),
            (2, "left", "after_first"),
            (1, "none", "first"),
        ]
    ):
        draw = Draw(900 + seed)
        rows, tokens, width = 2, 4, 3
        mask = mask_of([4, 4] if padding == "none" else [4, 2], tokens, padding)
        labels = torch.arange(rows * tokens).reshape(rows, tokens) + 5
        found.append(
            {
                "name": f"{length} positions, padding {padding}, {place}",
                "options": {"length": length, "place": place},
                "base": {},
                "tensors": {"prompt": draw(length, width)},
                "trained": ("prompt",),
                "inputs": {
                    "x": draw(rows, tokens, width),
                    "mask": mask,
                    "labels": torch.where(mask, labels, torch.tensor(-100)),
                },
                "cotangent": draw(rows, length + tokens, width),
            }
        )
    return found


def reference(case: Case) -> dict:
    prompt = listed(case["tensors"]["prompt"])
    after = 1 if case["options"]["place"] == "after_first" else 0
    new = {name: [] for name in ("output", "mask", "added", "position_ids", "labels", "trimmed")}
    for x, mask, labels in zip(*(listed(case["inputs"][name]) for name in ("x", "mask", "labels"))):
        cut = mask.index(True) + after
        output = x[:cut] + prompt + x[cut:]
        real = mask[:cut] + [True] * len(prompt) + mask[cut:]
        added = [False] * cut + [True] * len(prompt) + [False] * (len(x) - cut)
        positions, count = [], 0
        for is_real in real:
            positions.append(count if is_real else 0)
            count += int(is_real)
        new["output"].append(output)
        new["mask"].append(real)
        new["added"].append(added)
        new["position_ids"].append(positions)
        new["labels"].append(labels[:cut] + [-100] * len(prompt) + labels[cut:])
        new["trimmed"].append([token for token, is_added in zip(output, added) if not is_added])
    return {
        name: tensor(value) if name in ("output", "trimmed") else torch.tensor(value)
        for name, value in new.items()
    }


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _before_the_pads(case: Case) -> dict:
    return reference(changed(case, "inputs", mask=torch.ones_like(case["inputs"]["mask"])))


MUTATIONS = [
    ("put at index 0, before the pads", _before_the_pads),
    (
        "the other place",
        lambda case: reference(
            changed(
                case, "options", place="first" if case["options"]["place"] == "after_first" else "after_first"
            )
        ),
    ),
    (
        "in reverse order",
        lambda case: reference(changed(case, "tensors", prompt=case["tensors"]["prompt"].flip(0))),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
