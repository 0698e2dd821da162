"""The products as Triton kernels: first what an adapter reads, to `rank` numbers, then what it writes.

Between the two lies a small float32 tensor (vectors, rank). Each kernel reads an adapter's factors up to that
adapter's own rank, so a large one in the batch costs the others nothing. Products accumulate in float32.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import HEIGHT, Tiles

WIDTH = 128  # inputs, or outputs, of a block
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # its `dot` reads bfloat16 as integers


@triton.jit
def _bgmv_down(x, down, h, slots, ranks, n_in, rank, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """h[i] = down[slots[i]] x[i]: one program a row."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        r = tl.arange(0, RANK)
        mine = r < tl.load(ranks + slot)
        total = tl.zeros((RANK,), dtype=tl.float32)
        base = down + slot.to(tl.int64) * rank * n_in
        for start in range(0, n_in, BLOCK):
            k = start + tl.arange(0, BLOCK)
            v = tl.load(x + row * n_in + k, mask=k < n_in, other=0.0).to(tl.float32)
            inside = mine[:, None] & (k < n_in)[None, :]
            d = tl.load(base + r[:, None] * n_in + k[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(d * v[None, :], axis=1)
        tl.store(h + row * rank + r, total, mask=mine)


@triton.jit
def _bgmv_up(h, up, y, slots, ranks, n_out, rank, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] += up[slots[i]] h[i]: one program a row and a block of outputs."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        r = tl.arange(0, RANK)
        mine = r < tl.load(ranks + slot)
        o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(h + row * rank + r, mask=mine, other=0.0)
        base = up + slot.to(tl.int64) * n_out * rank
        inside = (o < n_out)[:, None] & mine[None, :]
        u = tl.load(base + o[:, None] * rank + r[None, :], mask=inside, other=0.0).to(tl.float32)
        place = y + row * n_out + o
        now = tl.load(place, mask=o < n_out, other=0.0)
        tl.store(place, (now + tl.sum(u * v[None, :], axis=1)).to(now.dtype), mask=o < n_out)


@triton.jit
def _sgmv_down(
    x, down, h, first, end, slots, ranks, n_in, rank,
    RANK: tl.constexpr, BLOCK: tl.constexpr, HEIGHT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """h = x down[slot]^T for the vectors of one tile. WIDEN: in float32 from the start."""
    tile = tl.program_id(0)
    slot = tl.load(slots + tile)
    i = tl.load(first + tile) + tl.arange(0, HEIGHT)
    there = i < tl.load(end + tile)
    r = tl.arange(0, RANK)
    mine = r < tl.load(ranks + slot)
    total = tl.zeros((HEIGHT, RANK), dtype=tl.float32)
    base = down + slot.to(tl.int64) * rank * n_in
    row = i.to(tl.int64)
    for start in range(0, n_in, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (k < n_in)[None, :]
        v = tl.load(x + row[:, None] * n_in + k[None, :], mask=inside, other=0.0)
        inside = (k < n_in)[:, None] & mine[None, :]
        d = tl.load(base + r[None, :] * n_in + k[:, None], mask=inside, other=0.0)
        if WIDEN:
            total += tl.dot(v.to(tl.float32), d.to(tl.float32), input_precision="ieee")
        else:
            total += tl.dot(v, d.to(v.dtype), input_precision="ieee")
    inside = there[:, None] & mine[None, :]
    tl.store(h + row[:, None] * rank + r[None, :], total, mask=inside)


@triton.jit
def _sgmv_up(
    h, up, y, first, end, slots, ranks, n_out, rank,
    RANK: tl.constexpr, BLOCK: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """y += h up[slot]^T for the vectors of one tile and a block of outputs."""
    tile = tl.program_id(0)
    slot = tl.load(slots + tile)
    i = tl.load(first + tile) + tl.arange(0, HEIGHT)
    there = i < tl.load(end + tile)
    r = tl.arange(0, RANK)
    mine = r < tl.load(ranks + slot)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = i.to(tl.int64)
    v = tl.load(h + row[:, None] * rank + r[None, :], mask=there[:, None] & mine[None, :], other=0.0)
    base = up + slot.to(tl.int64) * n_out * rank
    inside = mine[:, None] & (o < n_out)[None, :]
    u = tl.load(base + o[None, :] * rank + r[:, None], mask=inside, other=0.0).to(tl.float32)
    new = tl.dot(v, u, input_precision="ieee")
    place = y + row[:, None] * n_out + o[None, :]
    inside = there[:, None] & (o < n_out)[None, :]
    now = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (now + new).to(now.dtype), mask=inside)


def bgmv(y: Tensor, x: Tensor, down: Tensor, up: Tensor, slots: Tensor, ranks: Tensor) -> Tensor:
    """y[i] += up[a] (down[a] x[i]), in place, for row i with adapter a = slots[i]; -1 leaves the row as it is.

    y (rows, out), x (rows, in), down (adapters, rank, in), up (adapters, out, rank), slots (rows,) int32, ranks
    (adapters,) int32; all contiguous. Returns y.
    """
    rows, n_in = x.shape
    n_out, rank = up.shape[1:]
    if rows == 0:
        return y
    h = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    wide = max(16, triton.next_power_of_2(rank))
    _bgmv_down[(rows,)](x, down, h, slots, ranks, n_in, rank, RANK=wide, BLOCK=WIDTH)
    blocks = triton.cdiv(n_out, WIDTH)
    _bgmv_up[(rows, blocks)](h, up, y, slots, ranks, n_out, rank, RANK=wide, BLOCK=WIDTH)
    return y


def sgmv(y: Tensor, x: Tensor, down: Tensor, up: Tensor, tiles: Tiles, ranks: Tensor) -> Tensor:
    """y += x down[a]^T up[a]^T, in place, for the vectors of each tile with its adapter a.

    y (vectors, out), x (vectors, in), factors and ranks as in `bgmv`; all contiguous. Returns y.
    """
    vectors, n_in = x.shape
    n_out, rank = up.shape[1:]
    count = tiles.slot.shape[0]
    if count == 0:
        return y
    h = torch.empty(vectors, rank, dtype=torch.float32, device=x.device)
    wide = max(16, triton.next_power_of_2(rank))
    where = (tiles.first, tiles.end, tiles.slot)
    sizes = {"RANK": wide, "BLOCK": WIDTH, "HEIGHT": HEIGHT}
    _sgmv_down[(count,)](x, down, h, *where, ranks, n_in, rank, WIDEN=INTERPRETED, **sizes)
    blocks = triton.cdiv(n_out, WIDTH)
    _sgmv_up[(count, blocks)](h, up, y, *where, ranks, n_out, rank, **sizes)
    return y
