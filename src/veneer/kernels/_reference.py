"""The products in plain PyTorch: what every kernel is compared with."""

from __future__ import annotations

from torch import Tensor


def bgmv_reference(y: Tensor, x: Tensor, down: Tensor, up: Tensor, slots: Tensor, ranks: Tensor) -> Tensor:
    """y[i] + up[a] (down[a] x[i]) for row i with adapter a = slots[i]; -1 leaves the row as it is.

    y (rows, out), x (rows, in), down (adapters, rank, in), up (adapters, out, rank), ranks (adapters,): of each the
    first `ranks[a]` columns count. Punica's batched gathered matrix-vector product, Chen et al., arXiv:2310.18547.
    """
    made = y.clone()
    for i, a in enumerate(slots.tolist()):
        if a >= 0:
            r = int(ranks[a])
            made[i] += (up[a, :, :r].float() @ (down[a, :r].float() @ x[i].float())).to(y.dtype)
    return made


def sgmv_reference(
    y: Tensor, x: Tensor, down: Tensor, up: Tensor, starts: list[int], slots: list[int], ranks: Tensor
) -> Tensor:
    """The same for segments: vectors starts[s] to starts[s + 1] have the adapter slots[s].

    y (vectors, out), x (vectors, in); starts has one entry more than slots. Punica's segmented product.
    """
    made = y.clone()
    for begin, end, a in zip(starts, starts[1:], slots):
        if a >= 0 and end > begin:
            r = int(ranks[a])
            part = (x[begin:end].float() @ down[a, :r].float().mT) @ up[a, :, :r].float().mT
            made[begin:end] += part.to(y.dtype)
    return made
