"""LoReFT and its ablations: move a hidden state inside a subspace, at prompt positions. arXiv:2404.03592.

    loreft     h + R^T (W h + b - R h)     R R^T = I
    noreft     h + R^T (W h + b - R h)     R free (the paper's W2; W is its W1)
    direft     h + R^T (W h + b)           R free
    consreft   h + R^T (b - R h)           R R^T = I
    lobireft   h + R^T b                   R R^T = I

tensors: R, W (rank, width), b (rank,); those that the form has. Untied cases hold a second set for the last
positions: R_last, W_last, b_last. inputs: x (rows, tokens, width), a block's output; mask (rows, tokens)
bool; prompt (rows, tokens) bool, the tokens of the prompt (in training the answer follows it). options: form,
first, last, tied.

Positions: of the n prompt tokens of a row the first `first` and the last `last`; on a short prompt (n < first
+ last) each end takes min(its number, n // 2), so that no token is edited twice. All other tokens stay as
they are, bit for bit. "edited" (rows, tokens) says which were.
"""

import torch

from ._cases import Case, Draw, changed, mask_of, output_gradients
from ._loops import add, gram_schmidt, linear, listed, tensor, transpose

ORTHONORMAL = ("loreft", "consreft", "lobireft")
HELD = {
    "loreft": ("R", "W", "b"),
    "noreft": ("R", "W", "b"),
    "direft": ("R", "W", "b"),
    "consreft": ("R", "b"),
    "lobireft": ("R", "b"),
}


def cases() -> list[Case]:
    plain = {"first": 2, "last": 2, "tied": True}
    found = []
    for seed, (form, rank, padding, lengths, answers, options) in enumerate(
        [
            ("loreft", 2, "right", (7, 5), (0, 0), plain),
            ("loreft", 1, "left", (7, 4), (0, 0), plain),
            ("loreft", 3, "right", (7, 6), (2, 1), plain),
            ("loreft", 2, "left", (7, 6), (1, 2), {"first": 2, "last": 1, "tied": False}),
            ("loreft", 2, "right", (3, 1), (0, 0), plain),
            ("loreft", 2, "left", (2, 5), (0, 2), {**plain, "tied": False}),
            ("loreft", 2, "left", (7, 5), (0, 0), {"first": 1, "last": 0, "tied": True}),
            ("noreft", 2, "right", (7, 5), (0, 0), plain),
            ("direft", 2, "left", (7, 5), (0, 0), plain),
            ("consreft", 2, "right", (7, 5), (0, 0), plain),
            ("lobireft", 2, "left", (7, 5), (0, 0), {**plain, "tied": False}),
        ]
    ):
        draw = Draw(1100 + seed)
        tokens, width = 7, 4
        mask = mask_of(lengths, tokens, padding)
        tensors = {}
        for end in ("",) if options["tied"] else ("", "_last"):
            R = draw(rank, width)
            if form in ORTHONORMAL:
                R = tensor(gram_schmidt(listed(R)))
            made = {"R": R, "W": draw(rank, width), "b": draw(rank)}
            tensors |= {name + end: made[name] for name in HELD[form]}
        prompt = mask.clone()
        for row, answer in enumerate(answers):
            real = mask[row].nonzero()[:, 0]
            prompt[row, real[len(real) - answer :]] = False
        found.append(
            {
                "name": f"{form}, {lengths} tokens padded {padding}, answers of {answers}, {options}",
                "options": {"form": form, "rank": rank, **options},
                "base": {},
                "tensors": tensors,
                "trained": tuple(tensors),
                "inputs": {"x": draw(2, tokens, width), "mask": mask, "prompt": prompt},
                "cotangent": draw(2, tokens, width),
            }
        )
    return found


def edit(form: str, h, R, W, b):
    """One state: (width,) -> (width,)"""
    target = linear(h, W, b) if W is not None else b
    if form in ("loreft", "noreft", "consreft"):
        target = [a - c for a, c in zip(target, linear(h, R))]
    return add(h, linear(target, transpose(R)))


def positions(prompt, first: int, last: int) -> tuple[list[int], list[int]]:
    """Indices edited from the start and from the end, of one row's prompt mask."""
    places = [i for i, inside in enumerate(prompt) if inside]
    if len(places) < first + last:
        first, last = min(first, len(places) // 2), min(last, len(places) // 2)
    return places[:first], places[len(places) - last :]


def reference(case: Case, choose=positions, form: str | None = None) -> dict:
    options = case["options"]
    form = form or options["form"]
    t = {name: listed(value) for name, value in case["tensors"].items()}
    output, edited = listed(case["inputs"]["x"]), torch.zeros_like(case["inputs"]["prompt"])
    for row, prompt in enumerate(listed(case["inputs"]["prompt"])):
        for end, places in zip(("", "_last"), choose(prompt, options["first"], options["last"])):
            end = "" if options["tied"] else end
            for place in places:
                output[row][place] = edit(
                    form, output[row][place], t["R" + end], t.get("W" + end), t["b" + end]
                )
                edited[row, place] = True
    return {"output": tensor(output), "edited": edited}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case)


def _real_tokens(case: Case) -> dict:
    return reference(changed(case, "inputs", prompt=case["inputs"]["mask"]))


def _from_index_zero(case: Case) -> dict:
    return reference(changed(case, "inputs", prompt=torch.ones_like(case["inputs"]["mask"])))


def _overlapping(prompt, first, last):
    places = [i for i, inside in enumerate(prompt) if inside]
    return places[:first], places[max(0, len(places) - last) :]


def _other_form(case: Case) -> dict:
    swapped = {
        "loreft": "direft",
        "direft": "noreft",
        "noreft": "direft",
        "consreft": "lobireft",
        "lobireft": "consreft",
    }
    return reference(case, form=swapped[case["options"]["form"]])


def _ends_swapped(case: Case) -> dict:
    if case["options"]["tied"]:
        return reference(case)
    names = case["tensors"]
    other = {n: names[n.removesuffix("_last") if n.endswith("_last") else n + "_last"] for n in names}
    return reference({**case, "tensors": other})


MUTATIONS = [
    ("the answer counts as prompt", _real_tokens),
    ("positions are counted over pads", _from_index_zero),
    ("a token is edited from both ends", lambda case: reference(case, choose=_overlapping)),
    ("R h is (not) subtracted", _other_form),
    ("the two untied sets are swapped", _ends_swapped),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
