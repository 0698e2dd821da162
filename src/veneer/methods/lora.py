"""LoRA: a low-rank update beside a frozen weight. Hu et al., 2021, arXiv:2106.09685.

    W' = W + s B A        A: (rank, in)   B: (out, rank)   s = alpha / rank

B starts at zero, so an adapted model begins as its base model, bit for bit. Rank-stabilized
LoRA (Kalajdzievski, 2023, arXiv:2312.03732) changes s alone: alpha / sqrt(rank).
"""

from torch import Tensor

from veneer.edits import At, Site, Sites, Specs, Tensors, WeightMethod, dropout, hyper, kaiming, method, zeros


@method("lora", paper="arXiv:2106.09685", family="reparameterized/low-rank", rates=(1e-4, 3e-3))
class LoRA(WeightMethod):
    rank: int = hyper(8, "width of the update", at_least=1, alias="r", size=True)
    alpha: float = hyper(16.0, "numerator of s", alias="lora_alpha")
    rank_stabilized: bool = hyper(False, "s = alpha / sqrt(rank)", alias="use_rslora")
    dropout: float = hyper(0.0, "share of the inputs of A that are dropped in training", alias="lora_dropout", at_least=0, at_most=1)
    sites: Sites = "attention.{query,value}"

    def tensors(self, site: Site) -> Specs:
        return {"A": kaiming(self.rank, site.n_in), "B": zeros(site.n_out, self.rank)}

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """(out, in) -> (out, in)"""
        return self.scale * (t.B @ t.A)

    def branch(self, t: Tensors, x: Tensor, at: At) -> Tensor:
        """What delta adds to the output, without forming B A: (..., in) -> (..., out)"""
        return self.scale * (dropout(x, self.dropout, at) @ t.A.mT) @ t.B.mT

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)
