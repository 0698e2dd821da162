"""The tokens port: positions that an edit puts into the stream of each row, before its first real token.

Rows keep their order and their own number of added positions. A row with fewer than the most gets padding: in front
of them in a causal stack, so that all rows end together, and at the end elsewhere, so that a base which counts
positions from the left counts them as it does for that row alone. What comes out is cut back to what went in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.edits import At

from ._facts import apply, facts, select
from ._frame import Frame
from ._program import Op
from ._rows import Rows


@dataclass(frozen=True)
class Insertion:
    """Where positions were put in. T tokens become T + length."""

    place: Tensor  # (rows,): index of the first real token, or one after it for a class token
    counts: Tensor  # (rows,): added positions of each row
    length: int  # the most of any row
    index: Tensor  # (rows, T + length): source of each new position in [tokens; added]
    added: Tensor  # (rows, T + length) bool
    padding: Tensor  # (rows, T + length) bool
    shift: Tensor  # (rows,): how far tokens behind the place have moved

    def extend(self, values: Tensor, fill: Any = 0, at_added: Any = None) -> Tensor:
        """(rows, T) -> (rows, T + length): `at_added` at added positions, `fill` at the padding before them."""
        rows, _tokens = values.shape
        extra = torch.full((rows, self.length), fill, dtype=values.dtype, device=values.device)
        out = torch.cat([values, extra], 1).gather(1, self.index)
        out = out.masked_fill(self.padding, fill)
        if at_added is None:
            return out
        return torch.where(
            self.added, torch.as_tensor(at_added, dtype=values.dtype, device=values.device), out
        )

    def cut_back(self, y: Tensor) -> Tensor:
        """(rows, T + length, ...) -> (rows, T, ...): the tokens that went in."""
        tokens = y.shape[1] - self.length
        old = torch.arange(tokens, device=y.device)[None]
        index = torch.where(old < self.place[:, None], old, old + self.shift[:, None])
        return y.gather(1, index.view(*index.shape, *[1] * (y.dim() - 2)).expand(-1, -1, *y.shape[2:]))


def insert(ops: list[Op], frame: Frame, embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Insertion]:
    """(rows, T, width) -> ((rows, T + length, width), where). `mask`: (rows, T), True at real tokens."""
    rows, tokens, width = embeds.shape
    device = embeds.device
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []
    counts = torch.zeros(rows, dtype=torch.long, device=device)
    # A head or pooler reads the first position of a base with a class token, so nothing may come before it.
    after_first = torch.full((rows,), frame.host.anatomy.facts.class_token, device=device)
    most = [0] * rows
    for op in ops:
        mine = list(range(rows)) if op.rows is None else _rows_at(op.rows, rows)
        given, real = apply(op, frame, "tokens", {"at": facts(op, frame)}), None
        if isinstance(given, tuple):  # with which of the tokens each row has
            given, real = given
        given = given.to(embeds.dtype)
        given = given.expand(len(mine), *given.shape) if given.dim() == 2 else given
        index = torch.tensor(mine, device=device)
        live = torch.ones(given.shape[:2], dtype=torch.bool, device=device) if real is None else real
        if op.live is not None:
            live = live & op.live.expand(len(mine))[:, None]
        pieces.append((index, given, live))
        counts = counts.index_add(0, index, live.long().sum(1))
        if getattr(op.method, "place", "first") == "after_first":
            after_first = after_first.index_fill(0, index, True)
        for i in mine:
            most[i] += given.shape[1]
    length = max(most)
    block = embeds.new_zeros(rows, length + 1, width)  # the last place takes what is not live
    filled = torch.zeros_like(counts)
    for index, given, live in pieces:  # in the order of the stack, right-aligned
        start = length - counts[index] + filled[index]
        column = start[:, None] + live.long().cumsum(1) - 1
        column = torch.where(live, column, length)
        block = block.index_put((index[:, None], column), given)
        filled = filled.index_add(0, index, live.long().sum(1))
    block = block[:, :length]
    if mask is None:
        place = torch.zeros(rows, dtype=torch.long, device=device)
    else:
        place = mask.to(torch.long).argmax(1)
    place = place + after_first.long()
    facts_of_base = frame.host.anatomy.facts
    trailing = facts_of_base.encoder_decoder or not facts_of_base.causal
    where = _insertion(place, counts, length, tokens, trailing)
    out = torch.cat([embeds, block], 1).gather(1, where.index[..., None].expand(-1, -1, width))
    return out, where


def _rows_at(rows: Rows, total: int) -> list[int]:
    each = total // rows.total
    return [i * each + j for i in rows.indices for j in range(each)]


def _insertion(place: Tensor, count: Tensor, length: int, tokens: int, trailing: bool) -> Insertion:
    new = torch.arange(tokens + length, device=place.device)[None]
    p, n = place[:, None], count[:, None]
    shift = n if trailing else torch.full_like(n, length)
    start = p if trailing else p + length - n  # of the added positions
    added = (new >= start) & (new < start + n)
    behind = new >= p + shift
    index = torch.where(new < p, new, torch.where(added, tokens + length - n + new - start, new - shift))
    padding = (behind & (new - shift >= tokens)) | ((new >= p) & (new < start))
    return Insertion(place, count, length, index.clamp(0, tokens + length - 1), added, padding, shift[:, 0])


def extend_facts(at: At, where: Insertion, mask: Tensor | None) -> At:
    """The facts of the longer stream."""
    changes: dict[str, Any] = {"added": where.added, "ids": None, "mask": mask, "mask_all": mask}
    if at.prompt is not None:
        changes["prompt"] = where.extend(at.prompt, fill=False)
    return at.with_(**changes)


def forget_rows(frame: Frame) -> None:
    """Facts of row subsets were cut from the shorter stream."""
    for key in [k for k in frame.captured if isinstance(k, tuple) and k[0] == "rows"]:
        del frame.captured[key]


def extend_mask(mask: Tensor | None, where: Insertion, rows: int, tokens: int, device: Any) -> Tensor:
    """(rows, T) mask, or None -> (rows, T + length) of the mask's own type (int64 where there was none)."""
    if mask is None:
        mask = torch.ones(rows, tokens, dtype=torch.long, device=device)
    one = True if mask.dtype == torch.bool else 1
    return where.extend(mask, fill=0, at_added=one)


def extend_positions(given: Tensor | None, mask: Tensor, where: Insertion, offset: int) -> Tensor:
    """Position ids of the longer stream: real tokens come after the added ones, padding takes position `offset`."""
    if given is None:
        count = mask.to(torch.long).cumsum(1)
        return torch.where(mask.bool(), count - 1 + offset, offset)
    given = given.expand(where.place.shape[0], -1)
    behind = torch.arange(given.shape[1], device=given.device)[None] >= where.place[:, None]
    shifted = torch.where(behind, given + where.counts[:, None], given)
    out = where.extend(shifted, fill=0)
    start = given.gather(1, where.place.clamp(max=given.shape[1] - 1)[:, None])
    rank = where.added.long().cumsum(1) - 1
    return torch.where(where.added, start + rank, out)


def position_offset(backbone: nn.Module) -> int:
    """Where positions of real tokens start: RoBERTa's tables keep rows for padding."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


__all__ = [
    "Insertion",
    "extend_facts",
    "extend_mask",
    "extend_positions",
    "insert",
    "position_offset",
    "select",
]
