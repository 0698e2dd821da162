"""Dropout of adapters from seeds of their own: the same draws alone and in a batch with others.

A loop gives each adapter a seed for the step. A mask then follows from that seed, the site and the adapter's own
rows and tokens, whoever else is in the batch, and a block that checkpointing runs again draws what it drew before.
Without seeds, dropout draws from torch's generator as everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
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
        layout = self.frame.layout
        if layout is None or not layout.holds(x):
            return x * self._mask(x, p)
        wide = x.new_ones(()).expand(
            layout.rows, layout.tokens, *x.shape[2:]
        )  # the draws of the padded batch
        return x * layout.flat(self._mask(wide, p))

    def _mask(self, x: Tensor, p: float) -> Tensor:
        self.count += 1
        seeds: Seeds = self.frame.seeds
        parts, at = [], 0
        for name, rows in self._runs(x.shape[0]):
            part, seed = x[at : at + len(rows)], seeds.seeds.get(name)
            if seed is None:
                parts.append(torch.nn.functional.dropout(torch.ones_like(part), p, True))
            else:
                parts.append(self._kept(part, p, name, rows, seed))
            at += len(rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _runs(self, length: int) -> list[tuple[str, list[int]]]:
        """(adapter, its rows of the batch) in the order of x: one for an edit of its own, more where a bank runs."""
        op, names = self.op, self.frame.names
        mine = list(op.rows.indices) if op.rows is not None else list(range(length))
        if not op.rowed or not names or isinstance(names[0], str):
            return [(op.adapter.name, mine if len(mine) == length else list(range(length)))]
        found: list[tuple[str, list[int]]] = []
        for row in mine:
            name = names[row][op.level]
            if found and found[-1][0] == name:
                found[-1][1].append(row)
            else:
                found.append((name, [row]))
        return found

    def _kept(self, x: Tensor, p: float, name: str, rows: list[int], seed: int) -> Tensor:
        """0 or 1 / (1 - p) for each entry. Drawn for the adapter's own tokens and then for the positions that it adds,
        and laid out as x is: neither padding nor what others add changes a draw.
        """
        op = self.op
        short = self.frame.seeds.missing(name, op.site.stack) if x.dim() == 3 else 0
        where = self.frame.inserted if x.dim() == 3 else None
        if where is not None and x.shape[1] != where.index.shape[1]:
            where = None  # a stack into which nothing was put
        if where is None:
            shape = (x.shape[0], x.shape[1] - short, *x.shape[2:]) if short else x.shape
            return _filled(self._draw(shape, p, seed, x), short)
        chosen = torch.tensor(rows, device=x.device)
        added = int(where.counts[chosen].max())
        tokens = x.shape[1] - where.length
        drawn = self._draw((x.shape[0], tokens - short + added, x.shape[2]), p, seed, x)
        own, others = drawn[:, : tokens - short], drawn[:, tokens - short :]
        gap = drawn.new_ones(x.shape[0], where.length - added, x.shape[2])
        whole = torch.cat([_filled(own, short), gap, others], 1)
        return whole.gather(1, where.index[chosen][..., None].expand(-1, -1, x.shape[2]))

    def _draw(self, shape: Sequence[int], p: float, seed: int, like: Tensor) -> Tensor:
        op = self.op
        text = f"{seed}/{op.site.name}/{op.port}/{op.plan.part}/{self.count}"
        value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        draw = torch.Generator(device=like.device).manual_seed(value)
        kept = torch.rand(tuple(shape), generator=draw, device=like.device) >= p
        return kept.to(like.dtype) / max(1 - p, 1e-9)


def _filled(kept: Tensor, short: int) -> Tensor:
    """Ones at the tokens behind an adapter's own."""
    return torch.cat([kept, kept.new_ones(kept.shape[0], short, *kept.shape[2:])], 1) if short else kept
