"""One forward over single tokens: those of rows that speak and of prompts that are read, nothing padded.

Weights are read once for all of them, which is what a step of few tokens costs. Each token is a row of the call, with
the name of its adapter. Attention alone knows what belongs together: tokens that speak see their slots where they lie,
a product for all of them; prompts are laid side by side for one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Window = int | None  # positions that a token sees; None: all


class Joint:
    """Which tokens a forward has, in order: one of each row that speaks, then those of prompts, row by row.

    slots, lengths, counts: of rows, the speaking ones first: where they lie, positions that they have, tokens that
    they bring. speaking: how many speak. aligned: whether keys and values are wanted row by row, as edits of attention
    take them.
    """

    def __init__(
        self, slots: Sequence[int], lengths: Sequence[int], counts: Sequence[int], speaking: int, device: Any,
        aligned: bool = False,
    ) -> None:  # fmt: skip
        self.speaking, self.device = speaking, device
        self.slots, self.lengths, self.counts = list(slots), list(lengths), list(counts)
        row = [i for i, c in enumerate(counts) for _ in range(c)]
        at = [n + j for n, c in zip(lengths, counts) for j in range(c)]
        self.slot = torch.tensor([slots[i] for i in row], device=device)  # (tokens,)
        self.at = torch.tensor(at, device=device)  # (tokens,): the position of each in its row
        self.tokens, self.keys = len(at), max(at) + 1
        self.one_span = speaking == self.tokens and self.slots == list(
            range(self.slots[0], self.slots[0] + speaking)
        )
        self.aligned = aligned or self.one_span
        self._masks: dict[Any, Tensor] = {}
        self._speakers()
        self._readers()

    def _speakers(self) -> None:
        n = self.speaking
        self.spoken = max((x + 1 for x in self.lengths[:n]), default=0)
        self.first = min(self.slots[:n], default=0)
        self.span = max(self.slots[:n], default=-1) + 1 - self.first
        places = [s - self.first for s in self.slots[:n]]
        self.spread = None if places == list(range(n)) else torch.tensor(places, device=self.device)

    def _readers(self) -> None:
        counts = self.counts[self.speaking :]
        self.longest = longest = max(counts, default=0)
        self.read_keys = max(
            (n + c for n, c in zip(self.lengths[self.speaking :], counts)), default=0
        )  # positions of them all
        starts = [0]
        for c in counts:
            starts.append(starts[-1] + c)
        # Shorter prompts are laid to the left; what is padded is a token of the same row, and nobody reads it.
        wide = [[starts[i] + min(j, c - 1) for j in range(longest)] for i, c in enumerate(counts)]
        self.even = all(c == longest for c in counts)
        self.wide = torch.tensor(wide, dtype=torch.long, device=self.device).flatten()
        back = [i * longest + j for i, c in enumerate(counts) for j in range(c)]
        self.back = torch.tensor(back, dtype=torch.long, device=self.device)
        slots = self.slots[self.speaking :]
        neighbours = bool(slots) and slots == list(range(slots[0], slots[0] + len(slots)))
        self.read_slots: Any = (
            slice(slots[0], slots[0] + len(slots)) if neighbours else torch.tensor(slots, device=self.device)
        )

    # -- what the base's forward takes --------------------------------------------------------------------------

    def position_ids(self) -> Tensor:
        return self.at[:, None]

    def mask(self, window: Window = None) -> Tensor:
        """(tokens, 1, 1, keys) bool: what each token sees of its own slot."""
        return self._seen(("all", window), self.at, self.keys, window)[:, None, None]

    def _seen(self, key: Any, at: Tensor, keys: int, window: Window) -> Tensor:
        """(*at, keys) bool, made once a forward and window."""
        found = self._masks.get(key)
        if found is None:
            places = torch.arange(keys, device=self.device)
            found = places <= at[..., None]
            if window is not None:
                found = found & (at[..., None] - places < window)
            self._masks[key] = found
        return found

    # -- attention ------------------------------------------------------------------------------------------------

    def attend(
        self, q: Tensor, whole: tuple[Tensor, Tensor], scaling: float | None, window: Window
    ) -> Tensor:
        """q (tokens, heads, 1, d) -> (tokens, 1, heads, d). whole: the layer's keys and values of all slots."""
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        parts = []
        if self.speaking:
            parts.append(self._spoken(q[: self.speaking], *whole, scale, window))
        if self.longest:
            parts.append(self._read(q[self.speaking :], *whole, scale, window))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:, None]

    def rows_of(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots -> (tokens, kv heads, keys, d): of each token those of its slot."""
        if self.one_span:
            rows = slice(self.first, self.first + self.span)
            return k[rows, :, : self.keys], v[rows, :, : self.keys]
        return k[:, :, : self.keys].index_select(0, self.slot), v[:, :, : self.keys].index_select(
            0, self.slot
        )

    def _spoken(self, q: Tensor, K: Tensor, V: Tensor, scale: float, window: Window) -> Tensor:
        """q (rows, heads, 1, d) -> (rows, heads, d)"""
        rows = slice(self.first, self.first + self.span)
        k, v = K[rows, :, : self.spoken], V[rows, :, : self.spoken]
        lengths = self.at[: self.speaking]
        if self.spread is not None:
            q = q.new_zeros(self.span, *q.shape[1:]).index_copy_(0, self.spread, q)
            lengths = lengths.new_zeros(self.span).index_copy_(0, self.spread, lengths)
        seen = self._seen(("spoken", window), lengths, self.spoken, window)
        out = grouped(q, k, v, self._bias(("spoken", window), seen, q, k.shape[1]), scale)[:, :, 0]
        return out if self.spread is None else out.index_select(0, self.spread)

    def _bias(self, key: Any, seen: Tensor, q: Tensor, kv_heads: int) -> Tensor:
        """(rows * kv heads, 1, keys): 0 where a row sees a key, else the lowest number."""
        name = ("bias", key, q.dtype, kv_heads)
        found = self._masks.get(name)
        if found is None:
            found = (
                _lowest(seen[:, None, None], q.dtype).expand(-1, kv_heads, -1, -1).flatten(0, 1).contiguous()
            )
            self._masks[name] = found
        return found

    def _read(self, q: Tensor, K: Tensor, V: Tensor, scale: float, window: Window) -> Tensor:
        """q (tokens, heads, 1, d) of prompts -> (tokens, heads, d)"""
        rows = len(self.counts) - self.speaking
        k, v = K[self.read_slots, :, : self.read_keys], V[self.read_slots, :, : self.read_keys]
        q = q[:, :, 0] if self.even else q[:, :, 0].index_select(0, self.wide)
        q = q.unflatten(0, (rows, self.longest)).transpose(1, 2)
        at = self.at[self.speaking :]
        at = (at if self.even else at.index_select(0, self.wide)).view(rows, self.longest)
        seen = self._seen(("read", window), at, self.read_keys, window)[:, None]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out = out.transpose(1, 2).flatten(0, 1)
        return out if self.even else out.index_select(0, self.back)


def grouped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention of one token a row, query heads of one key head in one product, and no key copied for them.

    q (rows, heads, 1, d); k, v (rows, kv heads, keys, d), any strides; bias (rows * kv heads, 1, keys).
    """
    rows, heads, _, d = q.shape
    kv_heads = k.shape[1]
    folded = q.reshape(rows * kv_heads, heads // kv_heads, d)
    scores = torch.baddbmm(bias, folded, k.flatten(0, 1).mT, alpha=scale)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(rows, heads, 1, v.shape[-1])


def by_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention of some rows with keys and a mask of their own, as edits make them: -> (rows, queries, heads, d).

    q (rows, heads, queries, d); k, v (rows, kv heads, keys, d); mask: (rows, 1 or heads, queries, keys).
    """
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _lowest(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min
    )


__all__ = ["Joint", "by_mask", "grouped"]
