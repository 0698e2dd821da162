"""LoRA on an embedding table: a row gets what B makes of its column of A. arXiv:2106.09685.

    table'[id] = table[id] + s B A[:, id]                 s = alpha / rank

base: table (vocabulary, width). tensors: A (rank, vocabulary), B (width, rank). inputs: ids (rows, tokens).
options: rank, alpha. delta (vocabulary, width) is the change of the table. The gradient of A is zero at ids
that do not occur.
"""

import torch

from ._cases import Case, Draw, changed, output_gradients
from ._loops import add, linear, listed, tensor, times, transpose


def cases() -> list[Case]:
    found = []
    for seed, (vocabulary, width, rank, alpha) in enumerate([(5, 3, 2, 4.0), (4, 6, 1, 3.0)]):
        draw = Draw(2800 + seed)
        found.append(
            {
                "name": f"{vocabulary} rows of {width}, rank {rank}",
                "options": {"rank": rank, "alpha": alpha},
                "base": {"table": draw(vocabulary, width)},
                "tensors": {"A": draw(rank, vocabulary), "B": draw(width, rank)},
                "trained": ("A", "B"),
                "inputs": {"ids": torch.tensor([[0, 3, 3], [2, 0, 3]])},
                "cotangent": draw(2, 3, width),
            }
        )
    return found


def reference(case: Case) -> dict:
    table, A, B = listed(case["base"]["table"]), listed(case["tensors"]["A"]), listed(case["tensors"]["B"])
    s = case["options"]["alpha"] / case["options"]["rank"]
    delta = [times(s, linear(column, B)) for column in transpose(A)]
    output = [[add(table[token], delta[token]) for token in row] for row in listed(case["inputs"]["ids"])]
    return {"output": tensor(output), "delta": tensor(delta)}


def gradients(case: Case) -> dict:
    return output_gradients(reference, case, inputs=())


MUTATIONS = [
    (
        "alpha is not divided by the rank",
        lambda case: reference(
            changed(case, "options", alpha=case["options"]["alpha"] * case["options"]["rank"])
        ),
    ),
    (
        "the columns of A are one off",
        lambda case: reference(changed(case, "tensors", A=case["tensors"]["A"].roll(1, dims=1))),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
