"""Low-rank edits in several forms: what a method's `low_rank` gives, for the rows of many adapters at once.

The one idea: x down^T up^T is the same whichever adapters' factors stand side by side, so a form only says how they
lie in memory. Whether a definition's `low_rank` is its `branch` is tried once, on random numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer import kernels
from veneer.edits import At, Tensors, add_row_axis, call

from ._plan import SitePlan

ERROR = 1e-4  # of one way against another; relative to the largest entry, float64
_TRIED: dict[Any, str] = {}


def factors(sp: SitePlan, t: Tensors) -> str:
    """How `low_rank` gives what `branch` adds: "together" for tensors with a row axis, "apart" adapter by adapter, ""
    where it does not. Tried once for a site, on random numbers, since a class may have changed one of the two."""
    found = sp.__dict__.get("_factors")
    if found is None:
        found = sp.__dict__["_factors"] = _tried(sp, t)
    return found


@torch.no_grad()
def _tried(sp: SitePlan, t: Tensors) -> str:
    m, site = sp.method, sp.site
    if "low_rank" not in m.arguments or "branch" not in m.arguments or site.kind not in ("linear", "conv1d"):
        return ""
    shapes = tuple((n, tuple(v.shape)) for n, v in t.items() if isinstance(v, Tensor))
    key = (type(m), str(m), site.kind, site.shape, shapes)
    if key not in _TRIED:
        _TRIED[key] = _probe_factors(sp, t)
    return _TRIED[key]


def _probe_factors(sp: SitePlan, t: Tensors) -> str:
    m: Any = sp.method
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    pair = [Tensors({n: draw(v.shape) if isinstance(v, Tensor) else v for n, v in t.items()}) for _ in "ab"]
    x = draw(3, sp.site.shape[-1])
    try:
        alone = [m.low_rank(each) for each in pair]
        if any(each is None for each in alone):
            return ""
        for each, (down, up) in zip(pair, alone):
            expected = call(m, "branch", each, {"x": x, "at": At(site=sp.site)})
            if not _close(x @ down.mT @ up.mT, expected):
                return ""
    except Exception:  # it needs facts that no probe has
        return ""
    try:
        names = list(pair[0])
        both = m.low_rank(Tensors({n: _stacked([getattr(e, n) for e in pair], True) for n in names}))
        return "together" if all(map(_close, both, map(torch.stack, zip(*alone)))) else "apart"
    except Exception:  # a definition of one adapter's shapes meets a row axis
        return "apart"


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= ERROR * b.abs().max().clamp(min=1e-30))


class LowRank:
    """The factors of several adapters of one plan at one site, and which of them each row has."""

    __slots__ = ("_by_row", "as_one", "method", "slots", "tensors")

    def __init__(self, method: Any, tensors: Sequence[Tensors], slots: Sequence[int], as_one: bool) -> None:
        self.method, self.tensors, self.slots = method, list(tensors), list(slots)
        self.as_one = as_one  # whether `low_rank` serves tensors with a row axis
        self._by_row: tuple[Tensor, Tensor] | None = None

    def for_rows(self, chosen: Sequence[int]) -> LowRank:
        """The same adapters for some of the rows."""
        return LowRank(self.method, self.tensors, [self.slots[j] for j in chosen], self.as_one)

    def pair(self, slot: int) -> tuple[Tensor, Tensor]:
        """(rank, in) and (out, rank) of one adapter."""
        return self.method.low_rank(self.tensors[slot])

    def factors(self, chosen: Sequence[int], wide: bool) -> tuple[Tensor, Tensor]:
        """(n, in, rank) where `wide`, else (n, rank, in); and (n, rank, out): each contiguous."""
        mine = [self.tensors[i] for i in chosen]
        if self.as_one:
            t = Tensors({n: _stacked([getattr(t, n) for t in mine], wide) for n in mine[0]})
            down, up = self.method.low_rank(t)
        else:
            pairs = [self.method.low_rank(t) for t in mine]
            down, up = (torch.stack(each) for each in zip(*pairs))
        return (down.mT if wide else down).contiguous(), up.mT.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, tokens, in) -> (rows, tokens, out)"""
        if self._by_row is None:
            down, up = self.factors(range(len(self.tensors)), wide=True)
            index = torch.tensor(self.slots, device=down.device)
            self._by_row = down.index_select(0, index), up.index_select(0, index)
        down, up = self._by_row
        return torch.bmm(torch.bmm(x, down), up)


def _stacked(values: list[Tensor], wide: bool) -> Tensor:
    """(n, *shape), matrices in the order of memory in which the products read them."""
    if values[0].dim() == 2 and (wide or values[0].shape[0] > values[0].shape[1]):
        return torch.stack([v.mT for v in values]).mT
    return add_row_axis(torch.stack(values), values[0].dim())


class Kernel:
    """Low-rank products by Triton's kernels: adapters are read where they are, and no copy is made for each row."""

    __slots__ = ("_tiles", "down", "ranks", "slots", "up")

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor]], slots: Tensor) -> None:
        self.down, self.up, self.ranks = kernels.padded(factors)
        self.slots = slots.to(torch.int32)
        self._tiles: dict[int, kernels.Tiles] = {}  # by tokens of a row

    def for_rows(self, chosen: Sequence[int]) -> Kernel:
        """The same adapters for some of the rows."""
        made = object.__new__(Kernel)
        made.down, made.up, made.ranks, made._tiles = self.down, self.up, self.ranks, {}
        made.slots = self.slots[list(chosen)]
        return made

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, tokens, in) -> (rows, tokens, out)"""
        from veneer.kernels import _triton

        rows, tokens, _ = x.shape
        flat = x.reshape(rows * tokens, -1).contiguous()
        y = flat.new_zeros(rows * tokens, self.up.shape[1])
        if tokens == 1:
            _triton.bgmv(y, flat, self.down, self.up, self.slots, self.ranks)
        else:
            _triton.sgmv(y, flat, self.down, self.up, self._tiles_for(tokens), self.ranks)
        return y.view(rows, tokens, -1)

    def _tiles_for(self, tokens: int) -> kernels.Tiles:
        """Neighbouring rows of one adapter are one segment."""
        found = self._tiles.get(tokens)
        if found is None:
            owners = self.slots.tolist()
            begins = [i for i, a in enumerate(owners) if i == 0 or a != owners[i - 1]]
            starts = [i * tokens for i in (*begins, len(owners))]
            found = kernels.tiles_of(starts, [owners[i] for i in begins], self.slots.device)
            self._tiles[tokens] = found
        return found


class Packed:
    """Low-rank products with the factors of all adapters side by side: two products, and a mask between them."""

    __slots__ = ("down", "mask", "up")

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor]], slots: Tensor) -> None:
        self.down = torch.cat([down for down, _ in factors]).mT.contiguous()  # (in, columns)
        self.up = torch.cat([up.mT for _, up in factors]).contiguous()  # (columns, out)
        owner = torch.repeat_interleave(
            torch.arange(len(factors)), torch.tensor([down.shape[0] for down, _ in factors])
        ).to(slots.device)
        self.mask = (slots[:, None] == owner).to(self.down.dtype)[:, None]  # (rows, 1, columns)

    def for_rows(self, chosen: Sequence[int]) -> Packed:
        """The same adapters for some of the rows."""
        made = object.__new__(Packed)
        made.down, made.up, made.mask = self.down, self.up, self.mask[list(chosen)]
        return made

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, tokens, in) -> (rows, tokens, out)"""
        return ((x @ self.down) * self.mask) @ self.up


FORMS: dict[str, Any] = {"packed": Packed, "kernel": Kernel}

__all__ = ["FORMS", "Kernel", "LowRank", "Packed", "factors"]
