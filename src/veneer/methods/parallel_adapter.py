"""Parallel adapter: a small network beside the MLP, not behind it. He et al., 2022, arXiv:2110.04366.

    y' = y + s (U act(D r + b_D) + b_U)        D: (m, width)   U: (width, m)

y is what the MLP gives and r what the MLP starts from, so both can be computed at once; there is no inner
residual. U starts at zero: an adapted model begins as its base. m = width // reduction; s is a constant, or
trained from that value on (`learn_scale`: AdapterHub's `scaled_par_bn`, which starts it at 1). The edit
depends on the token, so it stays beside the model.

Where the block normalises what its sub-layers read (GPT-2, Llama, T5), r can be the stream itself, as in
AdapterHub and by default, or what the MLP reads, after the norm (`reads="normed"`). Where it normalises its
sums (BERT), and where attention and MLP share one norm (GPT-J), r is what the MLP reads. "Parallel" here is
beside a whole sub-layer; the parallel adapter of arXiv:2304.01933 stands beside single linear layers.

The paper's best runs have m = 512, s = 4; AdapterHub's reduction of 2 is the default here. Its variant beside
attention is sites="attention".
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
    constant,
    dropout,
    hyper,
    method,
)
from veneer.errors import Unsupported


@method("parallel_adapter", paper="arXiv:2110.04366", family="additive/adapter", rates=(3e-5, 1e-3))
class ParallelAdapter(OutputMethod):
    reduction: float = hyper(
        2.0,
        "width of the stream over width of the adapter",
        more_than=0,
        alias="reduction_factor",
        size=True,
    )
    activation: str = hyper("relu", "act, between D and U", choices=tuple(ACTIVATIONS), alias="non_linearity")
    scale: float = hyper(4.0, "s, the size of what is added", alias="scaling")
    learn_scale: bool = hyper(False, "train s")
    reads: str = hyper(
        "residual", "r: the stream, or what the MLP reads of it", choices=("residual", "normed")
    )
    init: str = hyper("identity", "start of D and U", choices=BOTTLENECK_STARTS, alias="init_weights")
    dropout: float = hyper(0.0, "share of what is added that is dropped in training", at_least=0, at_most=1)
    sites: Sites = "mlp"

    def tensors(self, site: Site) -> Specs:
        if site.n_in != site.width:
            raise Unsupported(
                f"{self.key} reads what enters '{site.name}': {site.n_in} features, and its output has {site.width}.",
                next_step="sites='mlp' or 'attention'; serial_adapter stands behind any layer",
            )
        specs = bottleneck_tensors(site.width, max(1, int(site.width // self.reduction)), self.init)
        return {**specs, "s": constant(self.scale, 1, decay=False)} if self.learn_scale else specs

    def output(self, t: Tensors, x: Tensor, y: Tensor, residual: Tensor | None, at: At) -> Tensor:
        """(..., width) -> (..., width)"""
        r = x if residual is None or self.reads == "normed" else residual
        f = bottleneck(r, t.D, t.D_bias, t.U, t.U_bias, self.activation)
        return y + (t.s if self.learn_scale else self.scale) * dropout(f, self.dropout, at)
