"""AdapterFusion: attention over the outputs of trained adapters. Pfeiffer et al., 2021, arXiv:2005.00247.

    p = softmax over i of (Q h + b_Q) . (K z_i + b_K)      y' = y + V sum_i p_i z_i      Q, K, V: square

z_i is what adapter i adds at this site; h is the state there before any adapter. The adapters are frozen
and named when the fusion is attached (`of=["a", "b"]`); they must edit outputs at the fusion's own sites.
Two stages: train the adapters alone, then the fusion. It costs three square matrices a site and runs every
adapter: nothing is merged.

Scores are not divided by sqrt(width), as published. V starts at the identity with 1e-6 beside its diagonal,
and is held near it by a penalty of 0.01 |I - V|^2 a site, part of the loss here (the published code steps
on it afterwards); `variant="static"` has no V. K's bias adds the same to every score, so its gradient is
zero. h is the sum of the sub-layer's input and output, normalised; the published one also has the gains and
shifts of the block's own norm, which Q and b_Q take up.
"""

import torch
from torch import Tensor

from veneer.edits import (
    At,
    OutputMethod,
    Site,
    Sites,
    Spec,
    Specs,
    Tensors,
    hyper,
    layer_norm,
    method,
    normal,
    zeros,
)


def _near_identity(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.full(shape, 1e-6).fill_diagonal_(1.0)


@method(
    "adapter_fusion",
    paper="arXiv:2005.00247",
    family="mixture/adapters",
    starts_as_identity=False,
    reason="it starts as a mean of its adapters",
    mergeable=False,
    kinds=("attention", "mlp", "block"),
    rates=(1e-5, 1e-3),
)
class AdapterFusion(OutputMethod):
    variant: str = hyper("dynamic", "with V, or without", choices=("dynamic", "static"))
    temperature: float = hyper(1.0, "scores are divided by it before the softmax", more_than=0)
    penalty_weight: float = hyper(0.01, "size of |I - V|^2 in the loss", at_least=0)
    sites: Sites = "{attention,mlp}"
    needs_members = True

    def tensors(self, site: Site) -> Specs:
        d = site.width
        shift = "a shift of every score leaves the softmax alone"
        specs: Specs = {
            "Q": normal(0.02, d, d),
            "Q_bias": zeros(d, decay=False),
            "K": normal(0.02, d, d),
            "K_bias": zeros(d, decay=False, null_gradient=shift),
        }
        return (
            specs if self.variant == "static" else {**specs, "V": Spec((d, d), _near_identity, decay=False)}
        )

    def output(self, t: Tensors, x: Tensor, y: Tensor, at: At) -> Tensor:
        """(..., width) -> (..., width)"""
        if not at.members:
            return y
        z = torch.stack([member(x, y) - y for member in at.members])
        return y + self.fused(t, layer_norm(x + y), z)

    def fused(self, t: Tensors, h: Tensor, z: Tensor) -> Tensor:
        """h: (..., width), z: (adapters, ..., width) -> (..., width)"""
        scores = ((h @ t.Q.mT + t.Q_bias) * (z @ t.K.mT + t.K_bias)).sum(-1, keepdim=True)
        mixed = ((scores / self.temperature).softmax(0) * z).sum(0)
        return mixed @ t.V.mT if "V" in t else mixed

    def penalty(self, t: Tensors) -> Tensor:
        """0.01 |I - V|^2 of one site"""
        if "V" not in t:
            return t.Q.new_zeros(())
        return self.penalty_weight * (torch.eye(t.V.shape[-1]).to(t.V) - t.V).square().sum()
