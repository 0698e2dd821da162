"""SHiRA: train a few entries of W at places chosen beforehand. Bhardwaj et al., 2024, arXiv:2406.13175.

    W' = W + scatter(index, values)        index, values: (k,), k = rank (in + out), the numbers of LoRA

values starts at zero, so W' = W; decay pulls to W. The mask of a site is `mask="random"`, drawn from `seed`
alone (sites of one shape share it; give adapters that are to be added up other seeds, so that they rarely
meet), or "magnitude", the entries of W that are largest by their size. The paper's masks of gradients need
data: that is `fish_mask`. A mask that comes from W is kept in the file; a drawn one is known by its seed
(HF PEFT's own draws may have no seed, so that its folders hold the places, and `save_index` keeps them).
"""

import dataclasses
import math

from torch import Tensor

from veneer.edits import Site, Sites, Specs, Tensors, WeightMethod, from_base, hyper, method, zeros
from veneer.errors import BadOption

from ._masks import drawn_places, largest, scatter


@method(
    "shira",
    paper="arXiv:2406.13175",
    family="selective/mask",
    rates=(5e-4, 2e-2),
    kinds=("linear", "conv1d", "conv", "embedding", "recurrent", "parameter"),
)
class SHiRA(WeightMethod):
    rank: int = hyper(32, "k is that of a low-rank update of this width", at_least=1, alias="r", size=True)
    mask: str = hyper("random", "which entries", alias="mask_type", choices=("random", "magnitude"))
    seed: int = hyper(0, "which random mask", alias="random_seed")
    save_index: bool = hyper(False, "keep a drawn mask in the file, beside its seed")
    sites: Sites = "attention.{query,value}"

    def tensors(self, site: Site) -> Specs:
        n_out, entries = site.shape[0], math.prod(site.shape)
        k = self.rank * (n_out + entries // n_out)
        if k > entries:
            most = entries // (n_out + entries // n_out)
            raise BadOption(
                f"shira: rank={self.rank} is {k} entries of '{site.name}', which has {entries}.",
                next_step=f"rank={max(1, most // 4)}; {most} would train all of them",
            )
        index = from_base(k, trained=False)
        if self.mask == "random":
            drawn = drawn_places(k, entries, self.seed, rising=True)
            index = dataclasses.replace(drawn, saved=self.save_index or None)
        return {"index": index, "values": zeros(k)}

    def start(self, site: Site, W: Tensor, t: Tensors) -> dict[str, Tensor]:
        if self.mask == "random":
            return {}
        return {"index": largest([W.abs().flatten()], t.values.shape[-1])[0]}

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """Any shape -> the same shape"""
        return scatter(t.index, t.values, W)
