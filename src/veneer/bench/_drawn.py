"""Adapters with drawn values on a base of the benchmarks, and the check that rows of a batch do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import veneer

from ._bases import hidden
from ._clock import check_equal, check_moved

ALL = {
    "minilm": ["attention.{query,key,value,output}", "mlp.{up,down}"],
    "smollm2": ["attention.{query,key,value,output}", "mlp.{gate,up,down}"],
}
QUERY_VALUE = "attention.{query,value}"
SPREAD = 0.05


def draw(adapter: Any, seed: int) -> None:
    """Every value that trains is moved, so that no adapter is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in adapter.leaves():
            leaf.add_(torch.randn(leaf.shape, generator=generator) * SPREAD)


def loras(model: nn.Module, count: int, ranks: Sequence[int], sites: Any) -> list[str]:
    """So many LoRA adapters, their ranks in turn; the names."""
    names = [f"a{i}" for i in range(count)]
    for i, name in enumerate(names):
        rank = ranks[i % len(ranks)]
        made = veneer.attach(model, "lora", name=name, rank=rank, alpha=2 * rank, sites=sites, activate=False)
        draw(made, i)
    veneer.activate(model, None)
    return names


@torch.no_grad()
def check_rows(
    what: str, model: Any, inputs: dict[str, Tensor], names: Sequence[str | None], bare: Tensor
) -> float:
    """The first and the last row of a mixed batch against a whole batch of their adapter; the largest error."""
    mixed = hidden(model(**inputs, adapters=list(names)))
    check_moved(what, mixed, bare)
    found = 0.0
    for row in {0, len(names) - 1}:
        alone = hidden(model(**inputs, adapters=[names[row]] * len(names)))
        found = max(found, check_equal(f"{what}, row {row}", mixed[row], alone[row]))
    return found
