"""Compacter: adapters whose matrices are sums of Kronecker products. Karimi Mahabadi et al., 2021, arXiv:2106.04647.

    y' = y + U act(D y + b_D) + b_U
    D^T = sum_i A_i (x) (S_i T_i)        U^T = sum_i A_i (x) (S'_i T'_i)        i = 1 .. n
    A_i: (n, n)   S_i: (width / n, rank)   T_i: (rank, m / n)   S'_i: (m / n, rank)   T'_i: (rank, width / n)

The places are the serial adapter's: behind attention and MLP, before the residual; sites="mlp" is Compacter++.
The n small matrices A_i are shared by D and U of all places, so a place costs 2 rank (width + m) + width + m
numbers, a tenth and less of a dense adapter. m is width // reduction, rounded up to a multiple of n; n has to
divide the width. `independent` gives each matrix A_i of its own (AdapterHub's shared_phm_rule=False).

The default begins at the base: T' = 0, the other S and T as in the paper (Glorot), A_i of entries N(0, 1 / n).
The paper draws A_i from N(0, 1e-4^2) and begins near it (`init="paper"`): D and U are then so small that
their biases move first. Its runs train the base's norms too and count them (`train_norms`); Glorot has a
gain of sqrt(2) in its code and of 1 in AdapterHub's and here. The edit depends on the token: it does not merge.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.edits import (
    ACTIVATIONS,
    At,
    Method,
    OutputMethod,
    Site,
    Sites,
    Spec,
    Specs,
    Tensors,
    TrainedCopy,
    bottleneck,
    dropout,
    hyper,
    method,
    normal,
    uniform,
    zeros,
)
from veneer.errors import BadOption


@method("compacter", paper="arXiv:2106.04647", family="additive/adapter", rates=(3e-4, 1e-2))
class Compacter(OutputMethod):
    reduction: float = hyper(
        32.0,
        "width of the stream over width of the adapter",
        more_than=0,
        alias="reduction_factor",
        size=True,
    )
    n: int = hyper(4, "Kronecker products in each sum, and the size of A_i", at_least=1, alias="phm_dim")
    rank: int = hyper(1, "rank of S_i T_i", at_least=1, alias="phm_rank")
    independent: bool = hyper(False, "A_i of its own for each matrix")
    activation: str = hyper(
        "gelu_new", "act, between D and U", choices=tuple(ACTIVATIONS), alias="non_linearity"
    )
    scale: float = hyper(1.0, "size of what is added", alias="scaling")
    init: str = hyper("identity", "start of A, S and T", choices=("identity", "paper"))
    dropout: float = hyper(0.0, "share of what is added that is dropped in training", at_least=0, at_most=1)
    train_norms: bool = hyper(False, "train the base's norms as well, as the paper does")
    sites: Sites = "{attention,mlp}"

    def tensors(self, site: Site) -> Specs:
        d, n = site.width, self.n
        if d % n:
            raise BadOption(
                f"compacter: n={n} does not divide the width {d} of '{site.name}'.",
                nearest=[str(k) for k in range(max(1, n - 3), n + 4) if d % k == 0],
                next_step="n=4 divides the width of most bases",
            )
        m = -(-max(1, int(d // self.reduction)) // n) * n
        own = ("D_A", "U_A") if self.independent else ("A",)
        std = 1e-4 if self.init == "paper" else n**-0.5
        scope = "site" if self.independent else "adapter"
        quiet = self.init == "identity"
        return {
            **{name: normal(std, n, n, n, scope=scope) for name in own},
            "D_S": self._glorot(d // n, self.rank),
            "D_T": self._glorot(self.rank, m // n),
            "D_bias": zeros(m, decay=False),
            "U_S": self._glorot(m // n, self.rank),
            "U_T": zeros(n, self.rank, d // n) if quiet else self._glorot(self.rank, d // n),
            "U_bias": zeros(d, decay=False),
        }

    def _glorot(self, into: int, out: int) -> Spec:
        return uniform((6.0 / (into + out)) ** 0.5, self.n, into, out)

    def derive(self, t: Tensors) -> dict[str, Tensor]:
        """The matrices of one place: D (m, width) and U (width, m)."""
        first, last = (t.D_A, t.U_A) if self.independent else (t.A, t.A)
        return {"D": self.matrix(first, t.D_S, t.D_T), "U": self.matrix(last, t.U_S, t.U_T)}

    @staticmethod
    def matrix(A: Tensor, S: Tensor, T: Tensor) -> Tensor:
        """(sum_i A_i (x) S_i T_i)^T: (n, n, n), (n, in / n, rank), (n, rank, out / n) -> (out, in)"""
        whole = torch.einsum("ijk,ibr,irc->kcjb", A, S, T)
        return whole.flatten(2).flatten(0, 1)

    def output(self, t: Tensors, y: Tensor, at: At) -> Tensor:
        """(..., width) -> (..., width)"""
        f = bottleneck(y, t.D, t.D_bias, t.U, t.U_bias, self.activation)
        return y + self.scale * dropout(f, self.dropout, at)

    def also(self) -> Sequence[Method]:
        return (TrainedCopy(sites="norm"),) if self.train_norms else ()
