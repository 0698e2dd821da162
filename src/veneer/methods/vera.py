"""VeRA: one frozen random pair for all sites, two trained vectors a site. Kopiczko et al., 2023,
arXiv:2310.11454.

    W' = W + diag(b) B diag(d) A      A: (rank, in), B: (out, rank) frozen   d: (rank,)   b: (out,)

A and B are drawn once for the whole adapter, uniformly by Kaiming's rule for ReLU, at the largest width in
use, and cut to each site's: A[:, :in], B[:out]. The bound of the draw is that of the large tensor. d starts
at 0.1 and b at zero, so W' = W, and in the first step b alone has a gradient. There is no alpha. The pair is
known by `seed`; HF PEFT draws A and B from one generator, so files that leave the pair out must say whose
draw it is.
"""

import dataclasses

import torch
from torch import Tensor

from veneer.edits import (
    At,
    Site,
    Sites,
    Spec,
    Specs,
    Tensors,
    WeightMethod,
    constant,
    dropout,
    hyper,
    kaiming,
    method,
    zeros,
)


@method(
    "vera",
    paper="arXiv:2310.11454",
    family="reparameterized/shared",
    rates=(1e-3, 3e-2),
    kinds=("linear", "conv1d", "embedding", "recurrent", "experts", "parameter"),
)
class VeRA(WeightMethod):
    rank: int = hyper(256, "width of the frozen pair", at_least=1, alias="r", size=True)
    d_start: float = hyper(0.1, "start of d", alias="d_initial")
    dropout: float = hyper(
        0.0,
        "share of A's inputs dropped in training",
        alias="vera_dropout",
        at_least=0,
        at_most=1,
    )
    seed: int = hyper(0, "which frozen pair is drawn", alias="projection_prng_key")
    save_projection: bool = hyper(False, "keep the frozen pair in the file, beside its seed")
    sites: Sites = "attention.{query,value}"

    def tensors(self, site: Site) -> Specs:
        n_out, n_in = site.shape
        return {
            "A": self._frozen(1, self.rank, n_in),
            "B": self._frozen(2, n_out, self.rank),
            "d": constant(self.d_start, self.rank, decay=False),
            "b": zeros(n_out, decay=False),
        }

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """(out, in) -> (out, in)"""
        return (((t.B * t.d) @ t.A).mT * t.b).mT

    def branch(self, t: Tensors, x: Tensor, at: At) -> Tensor:
        """(..., in) -> (..., out)"""
        return t.b * ((t.d * (dropout(x, self.dropout, at) @ t.A.mT)) @ t.B.mT)

    def _frozen(self, number: int, *shape: int) -> Spec:
        """Drawn from this method's seed alone, so that adapters of one seed and size share it."""
        drawn = kaiming(
            *shape, gain="relu", trained=False, scope="adapter", saved=self.save_projection or None
        )

        def start(largest: tuple[int, ...], _: torch.Generator) -> Tensor:
            return drawn.start(largest, torch.Generator().manual_seed(2 * self.seed + number))

        return dataclasses.replace(drawn, start=start)
