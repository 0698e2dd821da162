"""BitFit: train the bias vectors alone. Ben Zaken et al., 2021, arXiv:2106.10199.

    bias' = bias + b        b: (out,), one for every bias vector of the base

b starts at zero. `sites` names bias vectors, or matrices whose bias is meant: ["attention.query", "mlp.up"]
is the paper's smaller form, about half the count at nearly the same scores (its table 3). A base without
bias vectors (Llama and its kin) has nothing that this method could train. Where keys are not rotated, the
bias of a key gets no gradient by mathematics: a softmax does not see a shift of all its scores.

So few numbers need a high rate: the paper takes 1e-4 to 1e-3 over many epochs; runs of a hundred steps do not
leave chance below 1e-3, and some fall back to it at 1e-2, in a plain loop over the same biases too.
"""

import torch
from torch import Tensor

from veneer.edits import Site, Sites, Specs, Tensors, WeightMethod, hyper, method, zeros
from veneer.errors import NoSiteFound


@method("bitfit", paper="arXiv:2106.10199", family="selective", rates=(1e-3, 1e-2))
class BitFit(WeightMethod):
    sites: Sites = hyper("bias", "bias vectors, or matrices whose bias is trained")

    def tensors(self, site: Site) -> Specs:
        if len(site.shape) == 1:
            return {"b": zeros(*site.shape, decay=False)}
        if not site.bias:
            raise NoSiteFound(
                f"bitfit trains biases, and '{site.name}' has none.",
                next_step="sites='bias' takes every bias vector that there is",
            )
        return {"bias": zeros(site.n_out, decay=False)}

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """A bias vector (out,) -> (out,). A matrix stays as it is: see `bias_delta`."""
        return t.b if "b" in t else torch.zeros_like(W)

    def branch(self, t: Tensors, x: Tensor) -> Tensor:
        """At a matrix: (..., in) -> (..., out)"""
        return t.bias.expand(*x.shape[:-1], t.bias.shape[-1])

    def bias_delta(self, t: Tensors) -> Tensor | None:
        """What merging adds to the bias of a matrix: (out,)"""
        return t.bias if "bias" in t else None
