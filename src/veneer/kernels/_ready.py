"""Whether the kernels may be used on a device: tried once there, against the reference."""

from __future__ import annotations

import functools
import os

import torch

from ._reference import bgmv_reference, sgmv_reference
from ._tiles import padded, tiles_of

TOLERANCE = 1e-3  # relative to the largest entry: float32 sums in another order


def ready(device: torch.device) -> bool:
    """Whether triton is there and its kernels give on this device what the reference gives.

    On a GPU, or anywhere under triton's interpreter (TRITON_INTERPRET=1).
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return _tried(device.type, device.index)


@functools.cache
def _tried(kind: str, index: int | None) -> bool:
    try:
        return _agrees(torch.device(kind, index) if index is not None else torch.device(kind))
    except Exception:  # no triton, no compiler, a GPU that it does not know: the reference serves
        return False


@torch.no_grad()
def _agrees(device: torch.device) -> bool:
    from ._triton import bgmv, sgmv

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    down, up, ranks = padded([(draw(r, 40), draw(24, r)) for r in (4, 16)])
    x, y = draw(5, 40), draw(5, 24)
    slots = torch.tensor([1, 0, -1, 0, 1], dtype=torch.int32, device=device)
    pairs = [(bgmv(y.clone(), x, down, up, slots, ranks), bgmv_reference(y, x, down, up, slots, ranks))]
    starts, owners = [0, 3, 5], [1, 0]
    tiles = tiles_of(starts, owners, device)
    pairs.append(
        (sgmv(y.clone(), x, down, up, tiles, ranks), sgmv_reference(y, x, down, up, starts, owners, ranks))
    )
    return all(bool((a - b).abs().max() <= TOLERANCE * b.abs().max()) for a, b in pairs)
