"""DoRA: the direction of a row of W by LoRA, its length by itself. Liu et al., 2024, arXiv:2402.09353.

    W' = diag(m / c) (W + s B A)      c_i = |W_i + s (B A)_i|,  W_i a row of W, over its inputs
    A: (rank, in)   B: (out, rank)   m: (out,)   s = alpha / rank

B starts at zero and m at the norms of W's rows, so W' = W. (The paper writes W (in, out), and says
"column".) c is a constant in the backward (section 4.3): the gradients of A and B are scaled by m / c and
not projected. The norms need no dense B A: c^2 = |W_i|^2 + 2 s <W A^T, B>_i + s^2 (B A A^T B^T)_ii. The bias
of the base is not scaled.

With dropout the base term sees the dropped input too, dy = (m / c - 1) W drop(x) + (m / c) s B A drop(x): so
do the authors' code and HF PEFT, and a base term from the whole x would be another model. m is not decayed:
its neutral value is the norm, not zero. A convolution's norm runs over all but the output channel. Merging a
second adapter later uses the norms of the bare W, since weight edits add up.
"""

from collections.abc import Mapping, Sequence

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
    kaiming,
    method,
    trained_tokens,
    zeros,
)


@method(
    "dora",
    paper="arXiv:2402.09353",
    family="reparameterized/low-rank",
    rates=(1e-4, 3e-3),
    kinds=("linear", "conv1d", "conv", "recurrent", "experts", "parameter"),
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
    sites: Sites = "attention.{query,value}"

    def also(self) -> tuple[Method, ...]:
        return trained_tokens(self.trainable_tokens)

    def tensors(self, site: Site) -> Specs:
        return {
            "A": kaiming(self.rank, *site.shape[1:]),
            "B": zeros(site.shape[0], self.rank),
            "magnitude": from_base(site.shape[0], decay=False, compute="float32"),
        }

    def start(self, site: Site, W: Tensor, t: Tensors) -> dict[str, Tensor]:
        return {"magnitude": _squares(W.flatten(1 - len(site.shape))).sqrt()}

    def derive(self, t: Tensors, W: Tensor) -> dict[str, Tensor]:
        """gain = m / c: (out,). With dropout also W, which the base term of a dropped input needs."""
        exact = t.magnitude.dtype
        W_, A, B = self._rows(W, t), t.A.detach().flatten(t.B.dim() - 1).to(exact), t.B.detach().to(exact)
        cross = ((W_ @ A.mT) * B).sum(-1)
        square = ((B @ (A @ A.mT)) * B).sum(-1)
        c = (_squares(W_) + 2 * self.scale * cross + self.scale**2 * square).clamp(min=0).sqrt()
        found = {"gain": t.magnitude / c.reshape(t.magnitude.shape)}
        return {**found, "base": W} if self.dropout else found

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """(out, in) or (out, in, height, width) -> the same shape"""
        axis = t.B.dim() - 1  # the first axis of a kernel
        W_ = self._rows(W, t)
        direction = W_ + self.scale * (t.B @ t.A.flatten(axis))
        gain = t.gain if "gain" in t else self.derive(t, W)["gain"]
        return ((direction.mT * gain).mT - W_).unflatten(-1, t.A.shape[axis:])

    def branch(self, t: Tensors, x: Tensor, y: Tensor, at: At) -> Tensor:
        """y = W x without the bias: (..., in), (..., out) -> (..., out)"""
        dropped = dropout(x, self.dropout, at)
        if dropped is not x:
            y = dropped @ t.base.mT
        return (t.gain - 1) * y + t.gain * (self.scale * (dropped @ t.A.mT) @ t.B.mT)

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def _rows(self, W: Tensor, t: Tensors) -> Tensor:
        """W as a matrix, a kernel flattened, in the precision of the magnitude."""
        return W.flatten(t.B.dim() - t.A.dim() - 1).to(t.magnitude.dtype)


def _squares(W: Tensor) -> Tensor:
    """Squared norms of rows: (..., out, in) -> (..., out)"""
    return (W * W).sum(-1)
