"""Static slots: keys and values of all running rows in one block of memory a layer, a slot a row.

[slots, kv heads, positions, head width]. Rows have lengths of their own; what lies beyond a row's length is masked,
and later written over. A forward sees the slots of its own rows alone: as a view where they are neighbours.

It is a cache of transformers' kind, so that a base's own forward runs on it. `place(...)` says before each forward
which rows it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from veneer.errors import Unsupported

from ._joint import Joint, by_mask

STEP = 256  # positions by which the memory grows
MEANINGFUL = ("softcap", "s_aux", "position_bias", "head_mask")  # of an attention, and not run here


@dataclass
class Placing:
    """Where the tokens of one forward go. Row i has `counts[i]` of its columns: those that `real` tells."""

    slots: Sequence[int]
    lengths: Sequence[int]  # positions that each row has already
    counts: Sequence[int]  # tokens that each row brings
    tokens: int  # columns of the forward
    real: Tensor  # (rows, tokens) bool: columns that hold a token
    columns: list[Tensor | slice]  # the same, as an index for each row
    span: slice | Tensor  # the slots, as an index of the first axis
    keys: int  # positions that the forward sees
    rows: Tensor  # the slots as a tensor
    where: Tensor  # a forward of one token a row: its position

    @property
    def fresh(self) -> bool:
        """Rows that have nothing in their slots see their own tokens alone."""
        return not any(self.lengths)


class Slots(Cache):
    """slots: how many rows. positions: the most that a row may have."""

    def __init__(self, slots: int, positions: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.slots, self.positions = slots, positions
        self.capacity = 0
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.now: Placing | Joint | None = None
        self._given: Tensor | None = None  # the keys that `update` gave last

    # -- what a forward is for ----------------------------------------------------------------------------------

    def place(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        counts: Sequence[int],
        device: Any = None,
        real: Tensor | None = None,
    ) -> Placing:
        """Say which rows the next forward is for, and make room for their tokens.

        real: (rows, tokens) bool, True where a column holds a token; by default a row's last `counts` columns do.
        """
        tokens = max(counts) if real is None else real.shape[1]
        keys = max(n + c for n, c in zip(lengths, counts))
        self._grow(keys)
        first_column = torch.tensor([tokens - c for c in counts], device=device)[:, None]
        at_the_end = torch.arange(tokens, device=device)[None] >= first_column
        columns: list[Tensor | slice] = [slice(tokens - c, tokens) for c in counts]
        if real is None:
            real = at_the_end
        elif not torch.equal(real, at_the_end):
            columns = [row.nonzero()[:, 0] for row in real]
        first = slots[0]
        neighbours = list(slots) == list(range(first, first + len(slots)))
        rows = torch.tensor(list(slots), device=device)
        span = slice(first, first + len(slots)) if neighbours else rows
        self.now = Placing(
            slots, lengths, counts, tokens, real, columns, span, keys, rows, torch.tensor(list(lengths), device=device),
        )  # fmt: skip
        return self.now

    def join(
        self, slots: Sequence[int], lengths: Sequence[int], counts: Sequence[int], speaking: int, device: Any,
        aligned: bool = False,
    ) -> Joint:  # fmt: skip
        """Say which single tokens the next forward is of (see `Joint`), and make room for them."""
        self.now = Joint(slots, lengths, counts, speaking, device, aligned)
        self._grow(self.now.keys)
        return self.now

    def mask(self, window: int | None = None) -> Tensor:
        """(rows, 1, tokens, keys) bool, True where a token sees a position. Padding sees itself, so that nothing is
        made of no keys at all; nobody reads it."""
        now = self._placed()
        if isinstance(now, Joint):
            return now.mask(window)
        device = now.rows.device
        column = torch.arange(now.tokens, device=device)
        at = now.real.long().cumsum(1) - 1 + now.where[:, None]  # position of each token in its row
        if now.fresh:
            seen = (column[None, :, None] >= column[None, None]) & now.real[:, None, :]
            if window is not None:
                seen = seen & (at[:, :, None] - at[:, None, :] < window)
            return (seen | torch.eye(now.tokens, dtype=torch.bool, device=device))[:, None]
        key = torch.arange(now.keys, device=device)
        seen = key[None, None] <= at[..., None]
        if window is not None:
            seen = seen & (at[..., None] - key[None, None] < window)
        return (seen | ((key == 0)[None, None] & ~now.real[..., None]))[:, None]

    def position_ids(self) -> Tensor:
        """(rows, tokens): position of each token in its row; 0 for padding."""
        now = self._placed()
        if isinstance(now, Joint):
            return now.position_ids()
        at = now.real.long().cumsum(1) - 1 + now.where[:, None]
        return torch.where(now.real, at, 0)

    # -- transformers' interface --------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(rows, kv heads, tokens, d) in -> keys and values that the rows see, (rows, kv heads, keys, d)"""
        now = self._placed()
        while len(self.k) <= layer_idx:
            self.k.append(self._room(key_states))
            self.v.append(self._room(value_states))
        k, v = self.k[layer_idx], self.v[layer_idx]
        if isinstance(now, Joint):
            k[now.slot, :, now.at] = key_states[:, :, 0]
            v[now.slot, :, now.at] = value_states[:, :, 0]
            found = now.rows_of(k, v) if now.aligned else (key_states, value_states)
            self._given = found[0]
            return found
        if now.tokens == 1:
            k[now.rows, :, now.where] = key_states[:, :, 0]
            v[now.rows, :, now.where] = value_states[:, :, 0]
        else:
            for i, (slot, length, count) in enumerate(zip(now.slots, now.lengths, now.counts)):
                k[slot, :, length : length + count] = key_states[i, :, now.columns[i]]
                v[slot, :, length : length + count] = value_states[i, :, now.columns[i]]
        if now.fresh:
            return key_states, value_states
        return k[now.span][:, :, : now.keys], v[now.span][:, :, : now.keys]

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float | None = None,
        sliding_window: int | None = None, **others: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """The attention of a forward of single tokens: over slots, or over what an edit made of some rows' keys."""
        more = [n for n in MEANINGFUL if others.get(n) is not None]
        if more:
            raise Unsupported(
                f"an attention with {', '.join(more)} is not run over slots.", next_step="slots=1"
            )
        now = self._placed()
        if isinstance(now, Joint) and k is self._given:
            whole = self.k[module.layer_idx], self.v[module.layer_idx]
            return now.attend(q, whole, scaling, sliding_window), None
        return by_mask(q, k, v, mask, scaling), None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.now is None else max(self.now.lengths)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        now = self._placed()
        return (now.tokens if isinstance(now, Placing) and now.fresh else now.keys), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.positions

    # -- moving rows ----------------------------------------------------------------------------------------------

    def move(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of a slot into another."""
        for x in (*self.k, *self.v):
            x[target, :, :length] = x[source, :, :length]

    def read(self, slot: int, start: int, end: int) -> list[Tensor]:
        """A copy of some positions of a slot, keys then values of each layer: (kv heads, end - start, d)."""
        return [x[slot, :, start:end].clone() for x in (*self.k, *self.v)]

    def write(self, slot: int, start: int, kept: Sequence[Tensor]) -> None:
        """What `read` gave, into a slot."""
        length = kept[0].shape[1]
        self._grow(start + length)
        for x, own in zip((*self.k, *self.v), kept, strict=True):
            x[slot, :, start : start + length] = own

    def clear(self, slot: int) -> None:
        """Zeros into a slot: a weight of 0 times what is no number is no number, so none may stay behind."""
        for x in (*self.k, *self.v):
            x[slot].zero_()

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.k, *self.v))

    def _room(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[3])

    def _grow(self, positions: int) -> None:
        if positions <= self.capacity:
            return
        before, wanted = self.capacity, max(positions, self.capacity * 2)
        self.capacity = min(-(-wanted // STEP) * STEP, max(self.positions, positions))
        for stack in (self.k, self.v):
            for i, old in enumerate(stack):
                stack[i] = self._room(old)
                stack[i][:, :, :before] = old

    def _placed(self) -> Placing | Joint:
        if self.now is None:
            raise RuntimeError("no forward was placed")
        return self.now
