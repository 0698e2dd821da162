"""A change of weights as one pair of factors for each module: exact where its rank allows, else the nearest of a rank.

    W' - W  ~  B A        A: (rank, in)   B: (out, rank)

The change is formed in float64 from what the method itself says of the weight, so that no method is named here. Its
range is found by random projections of growing width (Halko, Martinsson, Tropp, 2011, arXiv:0909.4061): a change of low
rank costs a few products, whatever the size of W.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.engine import Adapter, Host, why_not
from veneer.engine._merge import _bias_change, _changed
from veneer.engine._program import Op, site_tensors
from veneer.engine._weights import stored
from veneer.errors import Unsupported

EXACT = 1e-6  # relative Frobenius error below which factors count as the change itself
WHOLE = 1024  # a matrix whose shorter side is at most this is decomposed as it is
FIRST = 32  # columns of the first projection
SPARE = 16
NOISE = 1e-12  # of the largest singular value: below it there is rounding


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one module's weight, as x @ W.T takes it: (out, in) float64."""

    module: str
    sites: tuple[str, ...]
    transposed: bool  # the module stores its weight as (in, out)
    delta: Tensor


@dataclass(frozen=True)
class Spectrum:
    """The leading singular triples of a change, and the norm of all of it."""

    U: Tensor  # (out, k)
    S: Tensor  # (k,)
    V: Tensor  # (in, k)
    norm: float

    def error(self, rank: int) -> float:
        """Relative Frobenius error of the first `rank` of them."""
        if self.norm == 0:
            return 0.0
        kept = float((self.S[:rank] ** 2).sum())
        return (max(0.0, self.norm**2 - kept) ** 0.5) / self.norm

    def rank(self, tolerance: float = EXACT) -> int | None:
        """The smallest rank with at most this error; None where even all that was computed has more."""
        if self.norm == 0:
            return 0
        tails = (self.norm**2 - (self.S**2).cumsum(0)).clamp(min=0).sqrt() / self.norm
        # Squares cancel at 1e-8: what is left is then judged by the singular values themselves.
        own = (self.S**2).flip(0).cumsum(0).flip(0).sqrt()
        complete = float(tails[-1]) <= max(tolerance, 3e-8)
        left = torch.cat([own[1:], own.new_zeros(1)]) / self.norm if complete else tails
        found = (left <= tolerance).nonzero()
        return int(found[0]) + 1 if len(found) else None

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """(A, B) of exactly this rank, both of the same size; rows beyond the change's own rank are zero."""
        k = min(rank, len(self.S))
        root = self.S[:k].sqrt()
        A = self.V.new_zeros(rank, self.V.shape[0])
        B = self.U.new_zeros(self.U.shape[0], rank)
        A[:k], B[:, :k] = (self.V[:, :k] * root).mT, self.U[:, :k] * root
        return A, B


@torch.no_grad()
def changes(host: Host, adapter: Adapter) -> Iterator[Change]:
    """Every module whose weight the adapter changes. Raises Unsupported where it does more than that."""
    check(host, adapter)
    ops: dict[tuple[str, str], list[Op]] = {}
    for sp, t in zip(adapter.plan.sites, _wide_tensors(host, adapter)):
        ops.setdefault((sp.site.module, sp.site.parameter), []).append(Op(sp, t, None, False, adapter))
    for (module, parameter), members in ops.items():
        bare = stored(host.module(module), parameter).detach().double()
        new = bare
        for op in members:
            _check_bias(op, host)
            new = _changed(op, bare, new)
        delta = new - bare
        if not torch.isfinite(delta).all():
            raise Unsupported(
                f"the change at '{module}' is not finite.", next_step="an earlier checkpoint of that run"
            )
        site = members[0].site
        linear = parameter == "weight" and delta.dim() == 2 and site.kind in ("linear", "conv1d")
        if not linear or module == host.anatomy.facts.head:
            if bool((delta != 0).any()):
                raise _refusal(adapter, module, parameter, site)
            continue
        yield Change(
            module,
            tuple(o.site.name for o in members),
            site.transposed,
            delta.mT if site.transposed else delta,
        )


def _refusal(adapter: Adapter, module: str, parameter: str, site: Any) -> Unsupported:
    what = (
        "head"
        if parameter == "weight" and site.kind == "linear"
        else "bias"
        if parameter.endswith("bias")
        else f"{site.kind} weight"
    )
    return Unsupported(
        f"{adapter.method.key} changes the {what} of '{module}', and these engines add to the linear layers of blocks "
        "alone.",
        next_step="veneer merge    writes the adapter into the weights",
    )


def check(host: Host, adapter: Adapter) -> None:
    """Raise Unsupported with the reason where an adapter is no change of weights."""
    adapter.check_prepared()
    reason = why_not(adapter)
    if not reason and any("at" in sp.method.arguments.get("derive", ()) for sp in adapter.plan.sites):
        reason = "its weights depend on the rows"
    if not reason and any(sp.site.experts for sp in adapter.plan.sites):
        reason = "it edits experts, which these engines hold in one tensor"
    if reason:
        raise Unsupported(
            f"adapter '{adapter.name}' cannot be a pair of matrices: {reason}.",
            next_step="veneer serve    runs it as it is",
        )


def _wide_tensors(host: Host, adapter: Adapter) -> list[Any]:
    """The adapter's tensors in float64."""
    before = host.__dict__.get("_dtype")
    host.__dict__["_dtype"] = torch.float64
    adapter._cached.clear()
    try:
        return site_tensors(host, adapter, training=False)
    finally:
        host.__dict__["_dtype"] = before
        adapter._cached.clear()


def _check_bias(op: Op, host: Host) -> None:
    change = _bias_change(op, host)
    if change is not None and bool((change != 0).any()):
        raise Unsupported(
            f"{op.method.key} changes the bias of '{op.site.module}', and these engines add to weights alone.",
            next_step="veneer merge    writes the adapter into the weights",
        )


@torch.no_grad()
def spectrum(delta: Tensor, most: int) -> Spectrum:
    """Singular triples of delta (out, in): all that matter, or the first `most` and some to spare."""
    norm = float(delta.norm())
    shorter = min(delta.shape)
    if norm == 0:
        return Spectrum(delta[:, :0], delta.new_zeros(0), delta[:0].mT, 0.0)
    if shorter <= WHOLE:
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        return _spectrum(U, S, Vh, norm)
    width = FIRST
    while True:
        width = min(width, most + SPARE, shorter)
        Q = _range(delta, width, powers=0)
        left = float((delta - Q @ (Q.mT @ delta)).norm()) / norm
        if left <= EXACT / 10:
            break
        if width >= min(most + SPARE, shorter):
            Q = _range(delta, width, powers=3)  # no low rank: the leading part, sharpened
            break
        width *= 2
    U, S, Vh = torch.linalg.svd(Q.mT @ delta, full_matrices=False)
    return _spectrum(Q @ U, S, Vh, norm)


def _spectrum(U: Tensor, S: Tensor, Vh: Tensor, norm: float) -> Spectrum:
    """Without what rounding alone has put there."""
    k = int((S[0] * NOISE < S).sum())
    return Spectrum(U[:, :k], S[:k], Vh[:k].mT, norm)


def _range(delta: Tensor, width: int, powers: int) -> Tensor:
    """(out, width): orthonormal columns that span the leading directions of delta."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(delta.shape[1], width, generator=draw, dtype=torch.float64).to(delta.device)
    Q = torch.linalg.qr(delta @ start).Q
    for _ in range(powers):
        Q = torch.linalg.qr(delta @ torch.linalg.qr(delta.mT @ Q).Q).Q
    return Q
