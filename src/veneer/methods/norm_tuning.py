"""Norm tuning: train the gains and shifts of the norms alone. Zhao et al., 2023, arXiv:2312.11420; Basu et al.
(LN-TUNE), 2022, arXiv:2211.08682.

    gain' = gain + v        shift' = shift + v        v: (width,), one for every norm's vector

v starts at zero, so an adapted model begins as its base; decay is off. Every norm of the base is tuned, the last
one included; `sites` names fewer. An RMS norm has a gain alone. Batch norms keep their running statistics. As
changes of the base's vectors several adapters add up and merge, where HF PEFT keeps whole copies of the norms,
one in use at a time.
"""

from torch import Tensor

from veneer.edits import Site, Sites, Specs, Tensors, WeightMethod, hyper, method, zeros


@method("norm_tuning", paper="arXiv:2312.11420", family="selective", rates=(1e-3, 5e-2))
class NormTuning(WeightMethod):
    sites: Sites = hyper("norm", "norms that are trained")

    with_bias = True  # the shift beside each gain is trained too

    def tensors(self, site: Site) -> Specs:
        return {"v": zeros(*site.shape, decay=False)}

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """(width,) -> (width,)"""
        return t.v
