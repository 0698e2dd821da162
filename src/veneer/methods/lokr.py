"""LoKr: a small matrix times a low-rank one, by Kronecker's product. Yeh et al. (LyCORIS), 2023,
arXiv:2309.14859; as KronA, Edalati et al., 2022, arXiv:2212.10650.

    W' = W + s C (x) D        C: (m1, n1)   D: (m2, n2)   m1 m2 = out, n1 n2 = in   s = alpha / rank
    D = B A where rank < max(m2, n2) / 2      B: (m2, rank)   A: (rank, n2)

and with `decompose_both` also C = C_B C_A where rank < max(m1, n1) / 2. Sizes are the two factors nearest each
other, the smaller one first, or `factor` of which the first is where it divides. dW x is D X^T C^T for x cut
into X (n1, n2): no dense matrix is formed. The rank of the update is the product of theirs.

C starts at zero (C_B where it has factors), all else by He's rule, as in HF PEFT; "lycoris" starts at zero in D
(A) instead. s is alpha / rank even where nothing has a rank: LyCORIS' own files take 1 there.

Of a kernel (out, in, height, width) D has the last two axes: (m2, n2, height, width), flattened into A; with
`tucker` D is made by a core, as in `loha`. `rank_dropout` drops rows of the update, `module_dropout` all of it.
"""

import math

import torch
from torch import Tensor

from veneer.edits import Site, Sites, Specs, Tensors, WeightMethod, hyper, kaiming, method, zeros

from ._lycoris import core_product, draws, drop, drop_rows


@method(
    "lokr",
    paper="arXiv:2309.14859",
    family="reparameterized/product",
    rates=(3e-3, 1e-1),
    kinds=("linear", "conv1d", "conv", "embedding", "recurrent", "experts", "parameter"),
)
class LoKr(WeightMethod):
    rank: int = hyper(8, "width of the factors of D", at_least=1, alias="r", size=True)
    alpha: float = hyper(8.0, "numerator of s", more_than=0)
    factor: int = hyper(-1, "size of C; -1: nearest to a square", alias="decompose_factor", at_least=-1)
    decompose_both: bool = hyper(False, "C has factors too")
    tucker: bool = hyper(False, "kernels by a core of their own", alias="use_effective_conv2d")
    init: str | bool = hyper(
        "default",
        "default, lycoris or none",
        alias="init_weights",
        choices=("default", "lycoris", "none", True, False),
    )
    rank_dropout: float = hyper(0.0, "share of rows of the update dropped in training", at_least=0, at_most=1)
    rank_dropout_scale: bool = hyper(False, "what is kept of them grows by as much")
    module_dropout: float = hyper(0.0, "how often the update is dropped in training", at_least=0, at_most=1)
    sites: Sites = "attention.{query,value}"

    def tensors(self, site: Site) -> Specs:
        n_out, n_in, *kernel = site.shape
        (m1, m2), (n1, n2), r = two_factors(n_out, self.factor), two_factors(n_in, self.factor), self.rank
        zero = {"none": "", "False": "", "lycoris": "D"}.get(str(self.init), "C")
        first = zeros if zero == "C" else kaiming
        last = zeros if zero == "D" else kaiming
        if self.decompose_both and r < max(m1, n1) / 2:
            found = {"C_B": first(m1, r), "C_A": kaiming(r, n1)}
        else:
            found = {"C": first(m1, n1)}
        if r >= max(m2, n2) / 2:
            found["D"] = last(m2, n2, *kernel)
        elif self.tucker and math.prod(kernel) > 1:
            found |= {"T": kaiming(r, r, *kernel), "B": kaiming(m2, r), "A": last(r, n2)}
        else:
            found |= {"B": kaiming(m2, r), "A": last(r, n2, *kernel)}
        return found | draws(self.rank_dropout, self.module_dropout, n_out)

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """(out, in) or (out, in, height, width) -> the same shape"""
        C, kernel = left(t), math.prod(W.shape[2:])
        if "T" in t:
            D = core_product(t.T, t.B, t.A, 2 - W.dim())
        else:
            D = t.D.flatten(1 - W.dim()) if "D" in t else t.B @ t.A.flatten(1 - W.dim())
        product = torch.einsum("...ab,...cdk->...acbdk", C, D.unflatten(-1, (-1, kernel)))
        product = self.scale * product.flatten(-3).flatten(-3, -2)
        return self._dropped(drop_rows, product, t).unflatten(-1, W.shape[1:])

    def branch(self, t: Tensors, x: Tensor) -> Tensor:
        """What delta adds to the output: (..., in) -> (..., out)"""
        C = left(t)
        X = x.unflatten(-1, (C.shape[-1], -1))
        X = times(X, t.D) if "D" in t else times(times(X, t.A), t.B)
        return self._dropped(drop, self.scale * times(X.mT, C).mT.flatten(-2), t)

    def _dropped(self, form, value: Tensor, t: Tensors) -> Tensor:
        return form(value, t, self.rank_dropout, self.module_dropout, self.rank_dropout_scale)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def left(t: Tensors) -> Tensor:
    """C: (m1, n1)"""
    return t.C if "C" in t else t.C_B @ t.C_A


def times(X: Tensor, M: Tensor) -> Tensor:
    """X M^T: X (..., a, in), M (out, in) or (rows, out, in) beside (rows, tokens, a, in) -> (..., a, out)"""
    if M.dim() == 2:
        return X @ M.mT
    return (X.flatten(1, 2) @ M.mT).unflatten(1, X.shape[1:3])


def two_factors(n: int, factor: int = -1) -> tuple[int, int]:
    """(a, b), a b = n: a = factor where that divides n, else the largest a <= b with a <= factor (-1: any)."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = math.isqrt(n) if factor <= 0 else min(factor, math.isqrt(n))
    a = max(d for d in range(1, most + 1) if n % d == 0)
    return a, n // a
