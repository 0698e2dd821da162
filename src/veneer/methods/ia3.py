"""(IA)^3: rescale keys, values and the MLP's inner activations. Liu et al., 2022, arXiv:2205.05638.

    k' = scale_k * k        v' = scale_v * v        h' = scale_h * h        MLP(x) = down(h')

k and v are outputs of their projections, h is what enters the MLP's last projection: (out,), (out,) and
(in,) numbers a block. All start at 1, so an adapted model begins as its base model. Each edit is a diagonal
matrix beside a weight and merges into it: rows of the key and value projection (and their bias), columns of
the MLP's last one.

The paper's code scales the MLP's up projection instead, which for a gated MLP is the same function.
AdapterHub does so for every MLP, where it acts before the activation: another function in a plain MLP. The
paper is followed here. Weight decay would pull the scales to 0 and the base with them: it is off. In an
encoder-decoder cross-attention is scaled as well, as in the paper.
"""

from torch import Tensor

from veneer.edits import Method, Site, Sites, Specs, Tensors, hyper, method, ones


@method("ia3", paper="arXiv:2205.05638", family="additive/rescaling", rates=(5e-4, 3e-2))
class IA3(Method):
    sites: Sites = hyper(
        {"output": "*attention.{key,value}", "input": "mlp.down"},
        "what is scaled: outputs of these sites, inputs of those",
    )

    def tensors(self, site: Site) -> Specs:
        return {"scale": ones(site.width, decay=False)}

    def output(self, t: Tensors, y: Tensor) -> Tensor:
        """(..., out) -> (..., out)"""
        return y * t.scale

    def input(self, t: Tensors, x: Tensor) -> Tensor:
        """(..., in) -> (..., in)"""
        return x * t.scale

    def affine(self, t: Tensors) -> tuple[Tensor, None]:
        return t.scale, None
