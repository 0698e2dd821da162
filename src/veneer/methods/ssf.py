"""SSF: scale and shift the features behind every operation. Lian et al., 2022, arXiv:2210.08823.

    y' = scale * y + shift        scale, shift: (width,)

y is what an operation gives: the patch embedding, each linear layer, each norm, the last one included; the
head is trained anew beside it and is not edited. Behind a linear layer or a convolution the edit is affine
in its rows, so it merges into weight and bias and costs nothing afterwards. What it merges into a norm, or a
shift into a layer without a bias (Llama), there is no place for: `sites="linear"` with `shift=False` merges
everywhere.

The paper starts scale at N(1, 0.02^2) and shift at N(0, 0.02^2), near the base (`init="normal"`); the
default begins at it. Weight decay would pull the scales to 0 and the base with them: it is off, where the
published runs have some.
"""

from torch import Tensor

from veneer.edits import (
    OutputMethod,
    Site,
    Sites,
    Specs,
    Tensors,
    hyper,
    method,
    normal,
    normal_around,
    ones,
    zeros,
)


@method("ssf", paper="arXiv:2210.08823", family="additive/rescaling", rates=(5e-4, 3e-2))
class SSF(OutputMethod):
    shift: bool = hyper(True, "add a shift as well")
    init: str = hyper("identity", "start of scale and shift", choices=("identity", "normal"))
    sites: Sites = ("linear", "norm", "convolution")
    shifts = ("shift",)

    def tensors(self, site: Site) -> Specs:
        d, drawn = site.width, self.init == "normal"
        specs = {"scale": normal_around(1.0, 0.02, d, decay=False) if drawn else ones(d, decay=False)}
        if self.shift:
            specs["shift"] = normal(0.02, d, decay=False) if drawn else zeros(d, decay=False)
        return specs

    def output(self, t: Tensors, y: Tensor) -> Tensor:
        """(..., width) -> (..., width)"""
        return y * t.scale + t.shift if self.shift else y * t.scale

    def affine(self, t: Tensors) -> tuple[Tensor, Tensor | None]:
        return t.scale, t.shift if self.shift else None
