"""Law 8: a row gets its own adapter's answer, whoever else is in the batch."""

from __future__ import annotations

from typing import Any

import torch

from veneer import engine

from .._law import agree, differ, law
from .._subject import Subject


def mixed(s: Subject, model: Any) -> list[Any]:
    """Adapters of one shape, of another, of another method, stacks of two, and bare rows: names by row."""
    s.attach(model, "a", 1)
    s.attach(model, "b", 2)
    names: list[Any] = ["a", None, "b", "a"]
    if s.other_size is not None:
        s.attach(model, "c", 3, method=s.other_size)
        names += ["c", ["c", "a"]]
    if s.partner is not None:
        s.attach(model, "other", 4, method=s.partner)
        names += ["other", ["a", "other"], ["other", "b"]]
    return [*names, ["a", "b"]]


@law(8, "rows")
def rows(s: Subject) -> str:
    """Each row of a mixed batch equals that adapter alone: bare rows, other methods and ranks, stacks."""
    model = s.model()
    names = mixed(s, model)
    contents = s.base.contents(len(names))
    alone = [s.alone(model, tuple(n) if isinstance(n, list) else n, c) for n, c in zip(names, contents)]
    bare = s.alone(model, None, contents[0])
    differ(alone[0], bare, "the randomised adapter changes nothing")
    worst = 0.0
    for seed, side in enumerate(s.base.sides or ("right",)):
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed + 1)).tolist()
        chosen = [names[i] for i in order]
        with engine.rows(model, chosen):
            together = s.evaluated(model, [contents[i] for i in order], side=side)
        for i, found in zip(order, together):
            expected = alone[i][: len(found)]
            worst = max(
                worst,
                agree(
                    found,
                    expected,
                    f"the row of {names[i]} in a mixed batch, padded on the {side}, against it alone",
                ),
            )
    with engine.rows(model, names):  # the form that gradients use
        together = [row.detach() for row in s.outputs(model, contents)]
    for name, found, expected in zip(names, together, alone):
        worst = max(
            worst,
            agree(found, expected, f"the row of {name} in a mixed batch with gradients, against it alone"),
        )
    return f"{len(names)} rows, {worst:.1e}"
