"""FISH mask: train the entries that the data's Fisher information picks. Sung et al., 2021, arXiv:2111.09839.

    F_i = sum over examples of g_i^2        g: the gradient of one example's loss
    W' = W + scatter(index, values)         index: the k largest F_i of all sites, values: (k,) from zero

k = int(keep_ratio * entries of all sites); of equal scores the lowest index wins, in the order of the sites.
F needs data, one example at a time, since a batch's gradient squares the sum; the paper takes 1024 examples
and keep_ratio 0.005. The mask stays as it is chosen. Only k values and k indices are stored and trained, so
the optimiser's state has size k too, and weight decay pulls to W and not away from it. A site may get no
entry at all.

Heads that are new to the task are trained whole, and compete for nothing. The paper's code counts their size
into k, which is left out here.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from veneer.edits import Site, Sites, Specs, Tensors, WeightMethod, from_base, hyper, method, zeros
from veneer.errors import BadOption

from ._masks import largest, scatter


@method(
    "fish_mask",
    paper="arXiv:2111.09839",
    family="selective/mask",
    rates=(1e-5, 1e-2),
    data="squared_gradients",
)
class FishMask(WeightMethod):
    keep_ratio: float = hyper(
        0.005, "share of all entries that is trained", more_than=0, at_most=1, size=True
    )
    sites: Sites = "parameter"

    may_be_unreached = True  # a site may have no entry in the mask

    def tensors(self, site: Site) -> Specs:
        """The expected share of a site; the real one is known when the mask is chosen."""
        k = int(self.keep_ratio * math.prod(site.shape))
        return {"index": from_base(k, trained=False), "values": zeros(k)}

    def prepare(self, sites: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        scores = [site.stats.flatten() for site in sites.values()]
        total = sum(score.numel() for score in scores)
        k = int(self.keep_ratio * total)
        if k <= 0:
            raise BadOption(
                f"fish_mask: keep_ratio={self.keep_ratio} of {total} entries is none.",
                next_step=f"keep_ratio={1.0 / total:.1e} keeps one",
            )
        found = {}
        for (name, site), index in zip(sites.items(), largest(scores, k)):
            found[name] = {"index": index, "values": site.stats.new_zeros(len(index))}
        return found

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """Any shape -> the same shape"""
        return scatter(t.index, t.values, W)
