"""Invertible adapter: a learned change of embeddings, undone before the output head. arXiv:2005.00052.

    o1 = e1 + F(e2)     o2 = e2 + G(o1)         F, G: (.., d/2) -> (.., d/2), down to d/4 and up again
    e2 = o2 - G(o1)     e1 = o1 - F(e2)         the inverse, with the same tensors

e = [e1 ; e2] is what the embedding gives. A language has its own tokens, hence its own change of them
(Pfeiffer et al., 2020: MAD-X), and a head that scores tokens needs the states changed back. The inverse is
exact, and stands before a head with more outputs than inputs only: a classifier reads the states as they
are. F_up and G_up start at zero, so an adapted model begins as its base model (the paper's N(0, 0.02^2)
begins near it: `init="normal"`).

`coupling="glow"` scales as well: o1 = c(s) e1 + t with [s ; t] = F(e2), c(s) = exp(5 * 0.636 atan(s / 5)),
o2 alike. It is derived anew: the GLOW block of AdapterHub leaves its second network out and is no inverse
pair.
"""

import torch
from torch import Tensor

from veneer.edits import (
    ACTIVATIONS,
    Method,
    Site,
    Sites,
    Specs,
    Tensors,
    bottleneck,
    hyper,
    kaiming,
    method,
    normal,
    zeros,
)

PARTS = ("down", "down_bias", "up", "up_bias")
SHARED = {"scope": "adapter"}  # one set of tensors for both ends


@method("invertible_adapter", paper="arXiv:2005.00052", family="additive/adapter", mergeable=False)
class InvertibleAdapter(Method):
    reduction: float = hyper(
        2.0,
        "half the width over width of F and G",
        more_than=0,
        alias="inv_adapter_reduction_factor",
        size=True,
    )
    coupling: str = hyper("nice", "shift, or scale and shift", choices=("nice", "glow"), alias="inv_adapter")
    activation: str = hyper("relu", "act in F and G", choices=tuple(ACTIVATIONS), alias="non_linearity")
    init: str = hyper("identity", "start of F and G", choices=("identity", "normal"))
    sites: Sites = hyper(
        {"output": "embedding", "input": "head"}, "where e is changed, and where changed back"
    )

    def tensors(self, site: Site) -> Specs:
        if site.port == "input" and not self.inverts(site):
            return {}
        half = site.width // 2
        m, out = max(1, int(half // self.reduction)), half if self.coupling == "nice" else 2 * half
        specs: Specs = {}
        for net in "FG":
            identity = self.init == "identity"
            specs[net + "_down"] = kaiming(m, half, **SHARED) if identity else normal(0.02, m, half, **SHARED)
            specs[net + "_down_bias"] = zeros(m, decay=False, **SHARED)
            specs[net + "_up"] = zeros(out, m, **SHARED) if identity else normal(0.02, out, m, **SHARED)
            specs[net + "_up_bias"] = zeros(out, decay=False, **SHARED)
        return specs

    def inverts(self, site: Site) -> bool:
        return site.n_out > site.n_in

    def output(self, t: Tensors, y: Tensor) -> Tensor:
        """e -> o: (..., width) -> (..., width)"""
        e1, e2 = y.chunk(2, -1)
        c, shift = self.net(t, "F", e2)
        o1 = c * e1 + shift
        c, shift = self.net(t, "G", o1)
        return torch.cat([o1, c * e2 + shift], -1)

    def input(self, t: Tensors, x: Tensor) -> Tensor:
        """o -> e: (..., width) -> (..., width)"""
        if "F_up" not in t:
            return x
        o1, o2 = x.chunk(2, -1)
        c, shift = self.net(t, "G", o1)
        e2 = (o2 - shift) / c
        c, shift = self.net(t, "F", e2)
        return torch.cat([(o1 - shift) / c, e2], -1)

    def net(self, t: Tensors, name: str, v: Tensor) -> tuple[Tensor | float, Tensor]:
        """(factor, shift) from F or G: (..., width / 2)"""
        down, down_bias, up, up_bias = (getattr(t, f"{name}_{part}") for part in PARTS)
        made = bottleneck(v, down, down_bias, up, up_bias, self.activation)
        if self.coupling == "nice":
            return 1.0, made
        s, shift = made.chunk(2, -1)
        return torch.exp(5 * 0.636 * torch.atan(s / 5)), shift
