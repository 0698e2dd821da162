"""FourierFT: a few frequencies of the update of W. Gao et al., 2024, arXiv:2405.03003.

    W' = W + s Re(F^-1(S))        S: (out, in), c at `frequencies` random places, zero elsewhere
    dW[p, q] = s / (out in) sum_j c_j cos(2 pi (p k_j / out + q l_j / in))        (k_j, l_j): place j

F^-1 is the inverse discrete transform of both axes. The places are the first of a random order of all entries,
drawn from `seed` alone, so all sites of one shape share them; frequencies is what one site trains. c starts at
zero, so W' = W, and has a gradient from the first step (`init="normal"`: N(0, 1), as in the paper's code and
by default in HF PEFT, is no identity). One step moves all of W by s / (out in) only: the learning rates are
far larger than LoRA's, and grow with the width.

The update is formed once a call, a dense matrix for each adapter and site in use; merging saves it.
"""

import math

import torch
from torch import Tensor

from veneer.edits import Site, Sites, Specs, Tensors, WeightMethod, hyper, method, normal, zeros
from veneer.errors import BadOption

from ._masks import drawn_places


@method(
    "fourierft",
    paper="arXiv:2405.03003",
    family="reparameterized/spectral",
    rates=(3e-3, 3e-1),
    kinds=("linear", "conv1d", "embedding", "recurrent", "experts", "parameter"),
)
class FourierFT(WeightMethod):
    frequencies: int = hyper(
        1000, "entries of S trained at each site", at_least=1, alias="n_frequency", size=True
    )
    scale: float = hyper(150.0, "s", alias="scaling", more_than=0)
    seed: int = hyper(777, "which places", alias="random_loc_seed")
    init: str | bool = hyper(
        "zero", "zero or normal", alias="init_weights", choices=("zero", "normal", True, False)
    )
    sites: Sites = "attention.{query,value}"

    def tensors(self, site: Site) -> Specs:
        entries = math.prod(site.shape)
        if self.frequencies > entries:
            raise BadOption(
                f"fourierft: frequencies={self.frequencies}, and '{site.name}' has {entries} entries.",
                next_step=f"frequencies={max(1, entries // 10)}",
            )
        start = zeros if self.init in ("zero", True) else lambda n: normal(1.0, n)
        return {"c": start(self.frequencies), "index": drawn_places(self.frequencies, entries, self.seed)}

    def derive(self, t: Tensors, W: Tensor) -> dict[str, Tensor]:
        """D: like W"""
        c = t.c if t.c.dtype == torch.float64 else t.c.float()  # no transform of half-precision numbers
        S = c.new_zeros(*c.shape[:-1], math.prod(W.shape[-2:])).scatter(-1, t.index, c)
        return {"D": (self.scale * torch.fft.ifft2(S.unflatten(-1, W.shape[-2:])).real).to(t.c.dtype)}

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """Like W"""
        return t.D if "D" in t else self.derive(t, W)["D"]

    def branch(self, t: Tensors, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return x @ t.D.mT
