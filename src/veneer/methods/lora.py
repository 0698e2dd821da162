"""LoRA: a low-rank update beside a frozen weight. Hu et al., 2021, arXiv:2106.09685.

    W' = W + s B A        A: (rank, in)   B: (out, rank)   s = alpha / rank

B starts at zero, so an adapted model begins as its base model, bit for bit. Rank-stabilized LoRA
(Kalajdzievski, 2023, arXiv:2312.03732) changes s alone: alpha / sqrt(rank). Dropout acts on what A reads,
never on the base's input.

`init` chooses the start. "gaussian" draws A from N(0, 1 / rank^2). "orthogonal" starts with two factors that
are not zero and whose product is: A = Q_odd^T N, B = M Q_even, for the columns of one orthogonal Q (rank,
rank). PiSSA (Meng et al., 2024, arXiv:2404.02948) starts at the largest singular vectors of W, A0 = sqrt(S /
s) V^T, B0 = U sqrt(S / s); "pissa_niter_N" finds them by N rounds of subspace iteration. OLoRA
(arXiv:2406.01775) starts at W = Q R: B0 = Q[:, :rank], A0 = R[:rank]. Their papers take that start out of W;
here W stays as it is, and the start out of the update:

    W' = W + s (B A - B0 A0)        A0, B0 frozen, kept in the adapter

"none" draws both factors: not the identity, for tests.

A convolution has A: (rank, in, height, width), the update is B times A, kernel by kernel; with groups each
A[k] has the shape of one kernel and B reads all of them (HF PEFT's form is this one with zeros in B). The
table of an embedding, (rows, width), has B: (rows, rank) at zero and A: (rank, width) drawn from N(0, 1); in
HF PEFT's names lora_embedding_A is this B transposed, lora_embedding_B this A transposed.

Two kinds of bias can be trained: `lora_bias` adds s times a bias of B to the output; `bias="lora_only"`
trains the base's own bias at edited sites, `bias="all"` all biases of the base. What the first two add is
`bias_delta`, which merging puts into the base's bias. They are for linear layers and convolutions.

`trainable_tokens` trains the rows of some tokens in the embedding beside the update, new ones that a chat
form brings for example. An output layer that shares the table follows.
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
    hyper,
    method,
    zeros,
)
from veneer.errors import BadOption

from . import _beside, _starts


@method(
    "lora",
    paper="arXiv:2106.09685",
    family="reparameterized/low-rank",
    rates=(1e-4, 3e-3),
    kinds=("linear", "conv1d", "conv", "embedding", "recurrent", "experts", "parameter"),
)
class LoRA(WeightMethod):
    rank: int = hyper(8, "width of the update", at_least=1, alias="r", size=True)
    alpha: float = hyper(16.0, "numerator of s", alias="lora_alpha", more_than=0)
    rank_stabilized: bool = hyper(False, "s = alpha / sqrt(rank)", alias="use_rslora")
    dropout: float = hyper(
        0.0,
        "share of A's inputs dropped in training",
        alias="lora_dropout",
        at_least=0,
        at_most=1,
    )
    init: str | bool = hyper(
        "default",
        "default, gaussian, orthogonal, pissa, pissa_niter_N, olora or none",
        alias="init_lora_weights",
    )
    bias: str = hyper("none", "biases of the base that are trained too", choices=_beside.BIASES)
    lora_bias: bool = hyper(False, "B has a bias of its own, scaled by s")
    trainable_tokens: Sequence[int] | Mapping[str, Sequence[int]] = hyper(
        (), "token ids whose rows of the embedding are trained too", alias="trainable_token_indices"
    )
    sites: Sites = "attention.{query,value}"

    def __post_init__(self) -> None:
        _starts.check("lora", self.init, self.rank)

    def tensors(self, site: Site) -> Specs:
        return _starts.pair(self.init, self.rank, site) | self._biases(site)

    def _biases(self, site: Site) -> Specs:
        if self.lora_bias and site.kind not in _beside.WITH_BIAS:
            raise BadOption(
                f"lora: lora_bias=True is for linear sites and convolutions; '{site.name}' is of kind '{site.kind}'.",
                next_step=f"lora_bias=False, or exclude={site.name!r}",
            )
        of_pair = {"bias": zeros(site.n_out, decay=False)} if self.lora_bias else {}
        return of_pair | _beside.own_bias(self, site)

    def also(self) -> tuple[Method, ...]:
        return _beside.parts(self)

    @property
    def start_reads_weight(self) -> bool:
        return self.init == "orthogonal" or _starts.reads_weight(self.init)

    def start(self, site: Site, W: Tensor, t: Tensors) -> dict[str, Tensor]:
        return _starts.begin(self, site, W, t)

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """(out, in) or (out, in, height, width) -> the same shape"""
        axis = t.B.dim() - 1  # the first axis of a kernel
        product = t.B @ t.A.flatten(axis)
        if "A0" in t:
            product = product - t.B0 @ t.A0.flatten(axis)
        return self.scale * product.unflatten(-1, t.A.shape[axis:])

    def branch(self, t: Tensors, x: Tensor, at: At) -> Tensor:
        """What delta adds to the output, without forming B A: (..., in) -> (..., out)"""
        x = dropout(x, self.dropout, at)
        # s times the narrow factor: a pass over `rank` numbers a token in place of `out`.
        y = (self.scale * (x @ t.A.mT)) @ t.B.mT
        if "A0" in t:
            y = y - (self.scale * (x @ t.A0.mT)) @ t.B0.mT
        bias = self.bias_delta(t)
        return y if bias is None else y + bias

    def low_rank(self, t: Tensors) -> tuple[Tensor, Tensor] | None:
        """(rank, in) and (out, rank), their product being delta; None where a bias is trained beside"""
        if self.bias_delta(t) is not None:
            return None
        if "A0" in t:
            return torch.cat([self.scale * t.A, -self.scale * t.A0], -2), torch.cat([t.B, t.B0], -1)
        return self.scale * t.A, t.B

    def bias_delta(self, t: Tensors) -> Tensor | None:
        """What `branch` adds to the output whatever x is: (out,), or None where no bias is trained."""
        if "bias" in t and "base_bias" in t:
            return self.scale * t.bias + t.base_bias
        return self.scale * t.bias if "bias" in t else t.base_bias if "base_bias" in t else None

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)
