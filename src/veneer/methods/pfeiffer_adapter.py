"""Pfeiffer adapter: one small network a block, behind the MLP. Pfeiffer et al., 2021, arXiv:2005.00247.

    y' = y + s f(h)        f(h) = U act(D h + b_D) + b_U        D: (m, width)   U: (width, m)
    h = LN(r + y)          where the block normalises the sum r + y (BERT): LN is that norm, frozen, used twice
    h = r + y              where it normalises what its sub-layers read (GPT-2, Llama, T5)
    h = y                  where attention and MLP are added side by side (GPT-J): there is no sum between them

y is what the MLP gives, r the stream that it is added to; the block then goes on as it was. Half the numbers
and half the time of a serial adapter, which has two a block: m = width // reduction. The edit depends on the
token, so it stays beside the model.

The paper found this place by search; its code takes the residual of the adapter before the norm, as here.
AdapterHub's other settings of that residual (`residual_before_ln=False`, "post_add") are not offered: they
add the stream twice. AdapterHub starts D and U at N(0, 0.02^2), near the base; the default here begins at it.
LN is the base's own: norms that another adapter trains do not enter h.
"""

from torch import Tensor

from veneer.edits import (
    ACTIVATIONS,
    BOTTLENECK_STARTS,
    At,
    OutputMethod,
    Site,
    Sites,
    Specs,
    Tensors,
    bottleneck,
    bottleneck_tensors,
    dropout,
    hyper,
    method,
)


@method("pfeiffer_adapter", paper="arXiv:2005.00247", family="additive/adapter", rates=(1e-4, 3e-3))
class PfeifferAdapter(OutputMethod):
    reduction: float = hyper(
        16.0,
        "width of the stream over width of the adapter",
        more_than=0,
        alias="reduction_factor",
        size=True,
    )
    activation: str = hyper("relu", "act, between D and U", choices=tuple(ACTIVATIONS), alias="non_linearity")
    scale: float = hyper(1.0, "s, the size of what is added", alias="scaling")
    init: str = hyper("identity", "start of D and U", choices=BOTTLENECK_STARTS, alias="init_weights")
    dropout: float = hyper(0.0, "share of f's output that is dropped in training", at_least=0, at_most=1)
    sites: Sites = "mlp"

    def tensors(self, site: Site) -> Specs:
        return bottleneck_tensors(site.width, max(1, int(site.width // self.reduction)), self.init)

    def output(self, t: Tensors, y: Tensor, residual: Tensor | None, at: At) -> Tensor:
        """(..., width) -> (..., width)"""
        h = y if residual is None else at.norm(residual + y)
        f = bottleneck(h, t.D, t.D_bias, t.U, t.U_bias, self.activation)
        return y + self.scale * dropout(f, self.dropout, at)
