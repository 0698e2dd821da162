"""DoRA: the direction of a row of W by LoRA, its length by itself. Liu et al., 2024, arXiv:2402.09353.

    W' = diag(m / c) (W + s B A)      c_i = |W_i + s (B A)_i|,  W_i a row of W, over its inputs
    A: (rank, in)   B: (out, rank)   m: (out,)   s = alpha / rank

B starts at zero and m at the norms of W's rows, so W' = W. (The paper writes W (in, out), and says
"column".) c is a constant in the backward (section 4.3): the gradients of A and B are scaled by m / c and
not projected. The norms need no dense B A: c^2 = |W_i|^2 + 2 s <W A^T, B>_i + s^2 (B A A^T B^T)_ii. The bias
of the base is not scaled.

With dropout the base term sees the dropped input too, dy = (m / c - 1) W drop(x) + (m / c) s B A drop(x): so
do the authors' code and HF PEFT, and a base term from the whole x would be another model. m is not decayed:
its neutral value is the norm, not zero. A convolution's norm runs over all but the output channel. The table of an
embedding, (rows, width), has a length for each column, m: (width,), as in HF PEFT. Merging a second
adapter later uses the norms of the bare W, since weight edits add up.

`init` chooses the start of the pair, as for `lora`: B A stands for B A - B0 A0 where the start is a part of W.
`bias="lora_only"` trains the base's own bias at edited sites beside it, `bias="all"` all biases of the base.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.edits import (
    At,
    Method,
    Site,
    Sites,
    Specs,
    Tensors,
    WeightMethod,
    dropout,
    from_base,
    hyper,
    method,
)

from . import _beside, _starts


@method(
    "dora",
    paper="arXiv:2402.09353",
    family="reparameterized/low-rank",
    rates=(1e-4, 3e-3),
    kinds=("linear", "conv1d", "conv", "embedding", "recurrent", "experts", "parameter"),
)
class DoRA(WeightMethod):
    rank: int = hyper(8, "width of the update of directions", at_least=1, alias="r", size=True)
    alpha: float = hyper(16.0, "numerator of s", alias="lora_alpha", more_than=0)
    rank_stabilized: bool = hyper(False, "s = alpha / sqrt(rank)", alias="use_rslora")
    dropout: float = hyper(
        0.0,
        "share of this edit's inputs dropped in training",
        alias="lora_dropout",
        at_least=0,
        at_most=1,
    )
    trainable_tokens: Sequence[int] | Mapping[str, Sequence[int]] = hyper(
        (), "token ids whose rows of the embedding are trained too", alias="trainable_token_indices"
    )
    init: str | bool = hyper(
        "default",
        "default, gaussian, orthogonal, pissa, pissa_niter_N, olora or none",
        alias="init_lora_weights",
    )
    bias: str = hyper("none", "biases of the base that are trained too", choices=_beside.BIASES)
    sites: Sites = "attention.{query,value}"

    def __post_init__(self) -> None:
        _starts.check("dora", self.init, self.rank)

    def also(self) -> tuple[Method, ...]:
        return _beside.parts(self)

    def tensors(self, site: Site) -> Specs:
        found = _starts.pair(self.init, self.rank, site)
        name, size = ("columns", site.shape[1]) if site.kind == "embedding" else ("magnitude", site.shape[0])
        found[name] = from_base(size, decay=False, compute="float32")
        return found | _beside.own_bias(self, site)

    def start(self, site: Site, W: Tensor, t: Tensors) -> dict[str, Tensor]:
        found = _starts.begin(self, site, W, t)
        W = W.flatten(1 - len(site.shape))
        if _starts.named(self.init) == "none":  # the only start whose B A is not zero
            W = W + self.scale * (t.B @ t.A.flatten(1 - len(site.shape)))
        if site.kind == "embedding":
            return {**found, "columns": _squares(W.mT).sqrt()}
        return {**found, "magnitude": _squares(W).sqrt()}

    def derive(self, t: Tensors, W: Tensor) -> dict[str, Tensor]:
        """gain = m / c: (out,). Also W, where the base term is not the bare output: dropped inputs, columns."""
        m = _lengths(t)
        W_ = _rows(W, t)
        A, B = (v.detach().to(m.dtype) for v in _factors(t))
        cross = ((W_ @ A.mT) * B).sum(-1)
        square = ((B @ (A @ A.mT)) * B).sum(-1)
        c = (_squares(W_) + 2 * self.scale * cross + self.scale**2 * square).clamp(min=0).sqrt()
        found = {"gain": m / c.reshape(m.shape)}
        return {**found, "base": W} if self.dropout or "columns" in t else found

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """(out, in), (out, in, height, width) or an embedding's (rows, width) -> the same shape"""
        W_ = _rows(W, t)
        A, B = _factors(t)
        direction = W_ + self.scale * (B @ A)
        gain = t.gain if "gain" in t else self.derive(t, W)["gain"]
        change = (direction.mT * gain).mT - W_
        return change.mT if "columns" in t else change.unflatten(-1, t.A.shape[t.B.dim() - 1 :])

    def branch(self, t: Tensors, x: Tensor, y: Tensor, at: At) -> Tensor:
        """y = W x without the bias: (..., in), (..., out) -> (..., out)"""
        dropped = dropout(x, self.dropout, at)
        if "columns" in t:  # an output layer that shares the table of an embedding
            scaled = (dropped * t.gain).to(x.dtype)
            return (scaled - x) @ t.base.mT + self._update(t, scaled)
        if dropped is not x:
            y = dropped @ t.base.mT
        dy = (t.gain - 1) * y + t.gain * self._update(t, dropped)
        return dy + t.base_bias if "base_bias" in t else dy

    def bias_delta(self, t: Tensors) -> Tensor | None:
        """What is added to the base's bias: (out,), or None where it is not trained."""
        return t.base_bias if "base_bias" in t else None

    def _update(self, t: Tensors, x: Tensor) -> Tensor:
        """s B A x: (..., in) -> (..., out)"""
        y = (x @ t.A.mT) @ t.B.mT
        if "A0" in t:
            y = y - (x @ t.A0.mT) @ t.B0.mT
        return self.scale * y

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


def _lengths(t: Tensors) -> Tensor:
    """m: of rows, or of the columns of an embedding's table."""
    return t.columns if "columns" in t else t.magnitude


def _rows(W: Tensor, t: Tensors) -> Tensor:
    """W as a matrix whose rows have the lengths, a kernel flattened, in the precision of the lengths."""
    W = W.mT if "columns" in t else W
    return W.flatten(t.B.dim() - t.A.dim() - 1).to(_lengths(t).dtype)


def _factors(t: Tensors) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose product is the update; a start that is subtracted stands behind it."""
    A, B = t.A.flatten(t.B.dim() - 1), t.B
    if "A0" in t:
        A = torch.cat([A, t.A0.flatten(t.B.dim() - 1)], -2)
        B = torch.cat([B, -t.B0], -1)
    return (B.mT, A.mT) if "columns" in t else (A, B)


def _squares(W: Tensor) -> Tensor:
    """Squared norms of rows: (..., out, in) -> (..., out)"""
    return (W * W).sum(-1)
