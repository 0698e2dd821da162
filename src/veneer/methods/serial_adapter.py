"""Serial adapter: a small network behind each sub-layer. Houlsby et al., 2019, arXiv:1902.00751.

    y' = y + s f(y)        f(y) = U act(D y + b_D) + b_U        D: (m, width)   U: (width, m)

y is what attention, or the MLP, gives after its own output projection and before the residual is added, so
each block gets two adapters (in a decoder a third behind cross-attention: add "cross_attention" to
`sites`). The block then goes on as it was. m = width // reduction. The adapter depends on the token, so it
stays beside the model; it costs two small products in sequence per sub-layer.

The paper starts D and U near zero (normal, 0.01, cut at two deviations), AdapterHub at N(0, 0.02^2): both
begin near the base. The default here begins at it: U = 0 and D as in nn.Linear, which trains from the first
step. The paper trains the norms too and counts them; AdapterHub does not, nor does the default here
(`train_norms`).
"""

from collections.abc import Sequence

from torch import Tensor

from veneer.edits import (
    ACTIVATIONS,
    BOTTLENECK_STARTS,
    At,
    Method,
    OutputMethod,
    Site,
    Sites,
    Specs,
    Tensors,
    TrainedCopy,
    bottleneck,
    bottleneck_tensors,
    dropout,
    hyper,
    method,
)


@method("serial_adapter", paper="arXiv:1902.00751", family="additive/adapter", rates=(1e-4, 3e-3))
class SerialAdapter(OutputMethod):
    reduction: float = hyper(
        16.0,
        "width of the stream over width of the adapter",
        more_than=0,
        alias="reduction_factor",
        size=True,
    )
    activation: str = hyper(
        "swish", "act, between D and U", choices=tuple(ACTIVATIONS), alias="non_linearity"
    )
    scale: float = hyper(1.0, "s, the size of what is added", alias="scaling")
    init: str = hyper("identity", "start of D and U", choices=BOTTLENECK_STARTS, alias="init_weights")
    dropout: float = hyper(0.0, "share of f's output that is dropped in training", at_least=0, at_most=1)
    train_norms: bool = hyper(False, "train the base's norms as well, as the paper does")
    sites: Sites = "{attention,mlp}"

    def tensors(self, site: Site) -> Specs:
        return bottleneck_tensors(site.width, max(1, int(site.width // self.reduction)), self.init)

    def output(self, t: Tensors, y: Tensor, at: At) -> Tensor:
        """(..., width) -> (..., width)"""
        f = bottleneck(y, t.D, t.D_bias, t.U, t.U_bias, self.activation)
        return y + self.scale * dropout(f, self.dropout, at)

    def also(self) -> Sequence[Method]:
        return (TrainedCopy(sites="norm"),) if self.train_norms else ()
