"""Starts of a low-rank pair B A that need more than one draw. No method: what a method's `start` is made of.

W: (..., out, in), a kernel flattened; leading axes (experts) are carried along.
"""

import re

import torch
from torch import Tensor

NAMES = ("default", "gaussian", "orthogonal", "pissa", "olora", "none")


def named(init: str | bool) -> str:
    """HF PEFT's True and False by name."""
    return {"True": "default", "False": "none"}.get(str(init), str(init))


def iterations(init: str | bool) -> int:
    """N of "pissa_niter_N"; 0 for any other start."""
    found = re.fullmatch(r"pissa_niter_([1-9]\d*)", str(init))
    return int(found[1]) if found else 0


def is_known(init: str | bool) -> bool:
    return named(init) in NAMES or iterations(init) > 0


def reads_weight(init: str | bool) -> bool:
    """Whether the pair starts at a part of W, which the update then subtracts."""
    return named(init) in ("pissa", "olora") or iterations(init) > 0


def from_weight(init: str | bool, W: Tensor, rank: int, scale: float, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """B0 (..., out, rank), A0 (..., rank, in). drawn: (..., rank, in), where subspace iteration begins."""
    if named(init) == "olora":
        Q, R = torch.linalg.qr(W)
        return Q[..., :rank], R[..., :rank, :]
    if iterations(init):
        basis = torch.linalg.qr(W @ drawn.mT)[0]
        for _ in range(iterations(init)):
            basis = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ basis)[0])[0]
        U, S, Vt = torch.linalg.svd(basis.mT @ W, full_matrices=False)
        U = basis @ U
    else:
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    root = (S[..., :rank] / scale).sqrt()
    return U[..., :rank] * root[..., None, :], root[..., None] * Vt[..., :rank, :]


def orthogonal_pair(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """B, A with B A = 0 and neither of them zero, from normal draws of the same shapes. The rank is even.

    A = Q_odd^T N / 10, B = M Q_even^T / 10 (columns of one orthogonal Q): half of the draws is N and M, the
    other half makes Q, which takes 2 rank <= in + out.
    """
    rank = B.shape[-1]
    half = rank // 2
    spare = torch.cat([A[..., half:, :].flatten(-2), B[..., half:].flatten(-2)], dim=-1)[..., : rank**2]
    Q = torch.linalg.qr(spare.unflatten(-1, (rank, rank)))[0]
    return B[..., :half] @ Q[..., 0::2].mT / 10, Q[..., 1::2] @ A[..., :half, :] / 10
