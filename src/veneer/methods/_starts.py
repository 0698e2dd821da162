"""A low-rank pair B A, its tensors and its starts. No method: what low-rank methods are made of.

W: (..., out, in), a kernel flattened; leading axes (experts) are carried along.
"""

import functools
import re
from typing import Any

import torch
from torch import Tensor

from veneer.edits import Site, Specs, Tensors, from_base, kaiming, normal, zeros
from veneer.errors import BadOption

NAMES = ("default", "gaussian", "orthogonal", "pissa", "olora", "none")


def named(init: str | bool) -> str:
    """HF PEFT's True and False by name."""
    return {"True": "default", "False": "none"}.get(str(init), str(init))


@functools.cache
def iterations(init: str | bool) -> int:
    """N of "pissa_niter_N"; 0 for any other start."""
    found = re.fullmatch(r"pissa_niter_([1-9]\d*)", str(init))
    return int(found[1]) if found else 0


def is_known(init: str | bool) -> bool:
    return named(init) in NAMES or iterations(init) > 0


@functools.cache
def reads_weight(init: str | bool) -> bool:
    """Whether the pair starts at a part of W, which the update then subtracts."""
    return named(init) in ("pissa", "olora") or iterations(init) > 0


def check(key: str, init: str | bool, rank: int) -> None:
    """Raise BadOption for a start that there is not, or that this rank cannot have."""
    if not is_known(init):
        raise BadOption(
            f"{key}: init={init!r} is not a start.",
            nearest=(*NAMES, "pissa_niter_4"),
            next_step=f"veneer methods {key}    shows every option",
        )
    if init == "orthogonal" and rank % 2:
        raise BadOption(
            f"{key}: init='orthogonal' needs an even rank; rank={rank} is odd.",
            next_step=f"rank={rank + 1}, or init='default'",
        )


def pair(init: str | bool, rank: int, site: Site) -> Specs:
    """A: (rank, in, ...), B: (out, rank), and the frozen A0, B0 of a start that the update subtracts."""
    a, b = (rank, *site.shape[1:]), (site.shape[0], rank)
    if reads_weight(init):
        frozen = {"A0": from_base(*a, trained=False), "B0": from_base(*b, trained=False)}
        return {"A": normal(1.0, *a), "B": from_base(*b), **frozen}
    if init == "orthogonal":
        return {"A": normal(1.0, *a), "B": normal(1.0, *b)}
    A = normal(1.0, *a) if site.kind == "embedding" else kaiming(*a)
    A = normal(1.0 / rank, *a) if init == "gaussian" else A
    return {"A": A, "B": kaiming(*b) if named(init) == "none" else zeros(*b)}


def begin(method: Any, site: Site, W: Tensor, t: Tensors) -> dict[str, Tensor]:
    """The tensors of a pair that one draw does not make: {} for a plain start. method: with init, rank, scale."""
    init, rank = method.init, method.rank
    if not (init == "orthogonal" or reads_weight(init)):
        return {}
    kernel = 1 - len(site.shape)
    W, A = W.flatten(kernel), t.A.flatten(kernel)
    most = {"orthogonal": sum(W.shape[-2:]) // 2}.get(str(init), min(W.shape[-2:]))
    if rank > most:
        raise BadOption(
            f"{method.key}: init={init!r} has rank={most} at most at '{site.name}', not rank={rank}.",
            next_step=f"rank={most}, or init='default'",
        )
    if init == "orthogonal":
        B, A = orthogonal_pair(A, t.B)
        return {"A": A.reshape(t.A.shape), "B": B}
    B, A = from_weight(init, W, rank, method.scale, A)
    A = A.reshape(rank, *site.shape[1:])
    # In the layout that a file gives them back in, so that products round alike.
    A, B = A.contiguous(), B.contiguous()
    return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}


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
