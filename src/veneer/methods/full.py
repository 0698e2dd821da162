"""Full fine-tuning: every parameter of the base is trained.

    W' = V        V starts at W

The reference that every other method is measured against. It learns the most and forgets the most, costs a
gradient and the optimiser's state for each parameter of the base, and a file as large as the base. Vectors
(biases, gains of norms) are not decayed, as is usual.
"""

from torch import Tensor

from veneer.edits import Site, Sites, Specs, Tensors, WeightMethod, from_base, method


@method("full", paper="", family="selective/full", rates=(1e-6, 1e-4))
class Full(WeightMethod):
    sites: Sites = "parameter"

    def tensors(self, site: Site) -> Specs:
        return {"W": from_base(*site.shape, decay=len(site.shape) > 1)}

    def start(self, site: Site, W: Tensor, t: Tensors) -> dict[str, Tensor]:
        return {"W": W}

    def weight(self, t: Tensors, W: Tensor) -> Tensor:
        """Any shape -> the same shape"""
        return t.W
