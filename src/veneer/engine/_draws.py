"""Dropout of adapters from seeds of their own: the same draws alone and in a batch with others.

A loop gives each adapter a seed for the step. A mask then follows from that seed, the site and the adapter's own
rows and tokens, whoever else is in the batch, and a block that checkpointing runs again draws what it drew before.
Without seeds, dropout draws from torch's generator as everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._frame import local


class Seeds:
    """{adapter: seed} for the calls inside of `dropout_seeds`, and the tokens of each adapter's own rows."""

    def __init__(self, seeds: Mapping[str, int], tokens: Mapping[str, tuple[int, int]]) -> None:
        self.seeds, self.tokens = dict(seeds), dict(tokens)
        self.longest = [max((n[i] for n in self.tokens.values()), default=0) for i in (0, 1)]

    def missing(self, name: str, stack: str) -> int:
        """How many tokens fewer than the longest an adapter's own rows have in a stack."""
        i = 1 if stack == "decoder" else 0
        return self.longest[i] - self.tokens[name][i] if name in self.tokens else 0


@contextmanager
def dropout_seeds(
    model: nn.Module, seeds: Mapping[str, int], tokens: Mapping[str, tuple[int, int]] | None = None
) -> Iterator[None]:
    """Adapters draw their dropout from these seeds.

    tokens: of their own rows, in the stack and in the decoder, where a batch was filled up.
    """
    host = model._modules.get("veneer")
    before, local.seeds = local.seeds, None if host is None else Seeds(seeds, tokens or {})
    try:
        yield
    finally:
        local.seeds = before


class Dropper:
    """Dropout for one function of one edit; called twice in a function, it draws twice."""

    def __init__(self, frame: Any, op: Any) -> None:
        self.frame, self.op, self.count = frame, op, 0

    def __call__(self, x: Tensor, p: float) -> Tensor:
        """x with a share p of its entries set to zero and the rest scaled up, by rows of one adapter at a time."""
        self.count += 1
        seeds: Seeds = self.frame.seeds
        parts, at = [], 0
        for name, rows in self._runs(x.shape[0]):
            seed = seeds.seeds.get(name)
            if seed is None:
                parts.append(torch.nn.functional.dropout(torch.ones_like(x[at : at + rows]), p, True))
            else:
                short = seeds.missing(name, self.op.site.stack) if x.dim() == 3 else 0
                parts.append(self._kept(x[at : at + rows], p, seed, short))
            at += rows
        return x * (parts[0] if len(parts) == 1 else torch.cat(parts))

    def _runs(self, length: int) -> list[tuple[str, int]]:
        """(adapter, rows of x) in their order: one for an edit of its own, several where a bank runs at once."""
        op, names = self.op, self.frame.names
        if not op.rowed or not names or isinstance(names[0], str):
            return [(op.adapter.name, length)]
        mine = op.rows.indices if op.rows is not None else range(len(names))
        found: list[tuple[str, int]] = []
        for row in mine:
            name = names[row][op.level]
            if found and found[-1][0] == name:
                found[-1] = (name, found[-1][1] + 1)
            else:
                found.append((name, 1))
        return found

    def _kept(self, x: Tensor, p: float, seed: int, short: int) -> Tensor:
        """0 or 1 / (1 - p) for each entry; drawn for the adapter's own tokens, so that padding changes nothing."""
        op = self.op
        text = f"{seed}/{op.site.name}/{op.port}/{op.plan.part}/{self.count}"
        value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        draw = torch.Generator(device=x.device).manual_seed(value)
        shape = (x.shape[0], x.shape[1] - short, *x.shape[2:]) if short else x.shape
        kept = (torch.rand(shape, generator=draw, device=x.device) >= p).to(x.dtype) / max(1 - p, 1e-9)
        return torch.cat([kept, kept.new_ones(x.shape[0], short, *x.shape[2:])], 1) if short else kept
