"""LoHa: a low-rank update times another, entry by entry. Hyeon-Woo et al. (FedPara), 2021, arXiv:2108.06098;
Yeh et al. (LyCORIS), 2023, arXiv:2309.14859.

    W' = W + s (B1 A1) * (B2 A2)      A1, A2: (rank, in)   B1, B2: (out, rank)   s = alpha / rank

The product has a rank of up to rank^2 for twice the numbers of LoRA, and a pair of that rank is what computes
it: row (k, l) of A is A1[k] * A2[l], column (k, l) of B is B1[:, k] * B2[:, l], so no dense matrix is formed.

A2 starts at zero and the other three by He's rule, as in FedPara and HF PEFT (LyCORIS' own code draws them
from N(0, 0.1^2) and N(0, 1)). In the first step A2 alone has a gradient. The update is a product of small
numbers: it needs a larger learning rate than LoRA.

A kernel is flattened into A, or with `tucker` (FedPara's proposition 3) each factor is sum_kl T[k, l] B[:, k]
A[l] with a core T: (rank, rank, height, width) of its own and A: (rank, in). (There HF PEFT 0.21.2 has another
gradient of B1 and B2 than that of its own forward.) `rank_dropout` drops rows of the update, `module_dropout`
all of it, in training.
"""

import math

from torch import Tensor

from veneer.edits import Site, Sites, Specs, Tensors, WeightMethod, hyper, kaiming, method, zeros

from ._lycoris import core_product, draws, drop, drop_rows


@method(
    "loha",
    paper="arXiv:2108.06098",
    family="reparameterized/product",
    rates=(3e-3, 1e-1),
    kinds=("linear", "conv1d", "conv", "embedding", "recurrent", "experts", "parameter"),
)
class LoHa(WeightMethod):
    rank: int = hyper(8, "width of each of the two updates", at_least=1, alias="r", size=True)
    alpha: float = hyper(8.0, "numerator of s", more_than=0)
    tucker: bool = hyper(False, "kernels by a core of their own", alias="use_effective_conv2d")
    rank_dropout: float = hyper(0.0, "share of rows of the update dropped in training", at_least=0, at_most=1)
    module_dropout: float = hyper(0.0, "how often the update is dropped in training", at_least=0, at_most=1)
    sites: Sites = "attention.{query,value}"

    def tensors(self, site: Site) -> Specs:
        n_out, *inner = site.shape
        cores: Specs = {}
        if self.tucker and math.prod(inner[1:]) > 1:
            cores = {f"T{i}": kaiming(self.rank, self.rank, *inner[1:]) for i in (1, 2)}
            inner = inner[:1]
        return {
            "B1": kaiming(n_out, self.rank),
            "A1": kaiming(self.rank, *inner),
            "B2": kaiming(n_out, self.rank),
            "A2": zeros(self.rank, *inner),
            **cores,
            **draws(self.rank_dropout, self.module_dropout, n_out),
        }

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """(out, in) or (out, in, height, width) -> the same shape"""
        kernel = 2 - W.dim()  # the first axis of a kernel, from the end
        if "T1" in t:
            one, other = core_product(t.T1, t.B1, t.A1, kernel), core_product(t.T2, t.B2, t.A2, kernel)
        else:
            one, other = (B @ A.flatten(kernel - 1) for B, A in ((t.B1, t.A1), (t.B2, t.A2)))
        D = drop_rows(self.scale * one * other, t, self.rank_dropout, self.module_dropout)
        return D.unflatten(-1, W.shape[1:])

    def branch(self, t: Tensors, x: Tensor) -> Tensor:
        """What delta adds to the output, by a pair of rank^2: (..., in) -> (..., out)"""
        A = (t.A1.unsqueeze(-2) * t.A2.unsqueeze(-3)).flatten(-3, -2)
        B = (t.B1.unsqueeze(-1) * t.B2.unsqueeze(-2)).flatten(-2)
        return drop((self.scale * (x @ A.mT)) @ B.mT, t, self.rank_dropout, self.module_dropout)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
