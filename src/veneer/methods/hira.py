"""HiRA: a low-rank matrix times W, entry by entry. Huang et al., 2025, ICLR, OpenReview TwJrTz9cRS.

    W' = W + W * (B A)        A: (rank, in)   B: (out, rank)

W has full rank, and so has the update, for the numbers of LoRA. There is no scale. B starts at zero, so W' =
W. An entry of W that is zero stays zero. The update is relative to W: weights of about 1 / sqrt(in) make it
that much smaller than LoRA's, and the paper's learning rates are larger than LoRA's.

W * (B A) has no factors: it is formed once a call, a dense matrix for each adapter and site in use. Merging
saves it. Of two adapters each takes its product with the bare W, and the two add up. Over a quantised base W
is the dequantised one, forward and merged. Dropout acts on what the update reads.

`init="gaussian"` draws A from N(0, 1 / rank^2), in place of He's rule. The table of an embedding has B: (rows,
rank), A: (rank, width) from N(0, 1), as for `lora`.
"""

from torch import Tensor

from veneer.edits import At, Site, Sites, Specs, Tensors, WeightMethod, dropout, hyper, method

from . import _starts


@method(
    "hira",
    paper="openreview:TwJrTz9cRS",
    family="reparameterized/product",
    rates=(3e-3, 1e-1),
    kinds=("linear", "conv1d", "conv", "embedding", "recurrent", "experts", "parameter"),
)
class HiRA(WeightMethod):
    rank: int = hyper(32, "width of the factor of W", at_least=1, alias="r", size=True)
    dropout: float = hyper(
        0.0, "share of A's inputs dropped in training", alias="hira_dropout", at_least=0, at_most=1
    )
    init: str | bool = hyper(
        "default",
        "default, gaussian or none",
        alias="init_weights",
        choices=("default", "gaussian", "none", True, False),
    )
    sites: Sites = "attention.{query,value}"

    def tensors(self, site: Site) -> Specs:
        return _starts.pair(self.init, self.rank, site)

    def derive(self, t: Tensors, W: Tensor) -> dict[str, Tensor]:
        """D = W * (B A): like W"""
        axis = t.B.dim() - 1  # the first axis of a kernel
        return {"D": W * (t.B @ t.A.flatten(axis)).unflatten(-1, t.A.shape[axis:])}

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """Like W"""
        return t.D if "D" in t else self.derive(t, W)["D"]

    def branch(self, t: Tensors, x: Tensor, at: At) -> Tensor:
        """(..., in) -> (..., out)"""
        return dropout(x, self.dropout, at) @ t.D.mT
