"""OFT: turn the input space of W by orthogonal blocks. Qiu et al., 2023, arXiv:2306.07280; OFTv2,
arXiv:2506.19847.

    W' = W R^T        R = diag(R_1 .. R_blocks), each (b, b) and orthogonal
    S = U - U^T       U: upper triangle filled row by row from Q[k]      Q: (blocks, b (b - 1) / 2)

    cayley="exact"       R_k = (I - S) (I + S)^-1, orthogonal to rounding
    cayley="neumann"     R_k = I + 2 S + 2 S^2 + .. + S^(terms - 1), a cut series, near orthogonal for small S

Q starts at zero, so W' = W. The two forms turn in *opposite* directions: HF PEFT reads "exact" as above and
its default "neumann" as a series of (I + S) (I - S)^-1, and both are followed here, so the form is part of
what a file means. Constrained OFT (`coft`) keeps |S| within eps / sqrt(blocks) after each step. Weight decay
pulls Q to zero, W' to W. A kernel is turned over (in, height, width) as one axis, an embedding over its
width.

`module_dropout` replaces int(module_dropout * blocks) blocks by I, others at each call in training (HF PEFT
0.21.2 has the option too, and does not use it).

`block_size=0` takes the largest divisor of the width up to 32. A size that does not divide it is an error,
where HF PEFT moves to the nearest that does.
"""

import functools
import math

import torch
from torch import Tensor

from veneer.edits import Site, Sites, Specs, Tensors, WeightMethod, hyper, method, noise, skew, zeros
from veneer.errors import BadOption


@method(
    "oft",
    paper="arXiv:2306.07280",
    family="reparameterized/orthogonal",
    rates=(1e-4, 1e-2),
    kinds=("linear", "conv1d", "conv", "embedding", "recurrent", "experts", "parameter"),
)
class OFT(WeightMethod):
    block_size: int = hyper(0, "width b of a block", alias="oft_block_size", at_least=0, size=True)
    blocks: int = hyper(0, "number of blocks, in place of block_size", alias="r", at_least=0)
    block_share: bool = hyper(False, "one block, repeated")
    cayley: str | bool = hyper("exact", "exact or neumann", alias="use_cayley_neumann")
    terms: int = hyper(5, "terms of the series", alias="num_cayley_neumann_terms", at_least=1)
    coft: bool = hyper(False, "keep the turn small")
    eps: float = hyper(6e-5, "bound of |S| times sqrt(blocks), with coft", more_than=0)
    module_dropout: float = hyper(0.0, "share of the blocks that stay I in training", at_least=0, at_most=1)
    sites: Sites = "attention.{query,value}"

    def __post_init__(self) -> None:
        if self.cayley not in ("exact", "neumann", True, False):
            raise BadOption(
                f"oft: cayley={self.cayley!r} is neither 'exact' nor 'neumann'.",
                next_step="cayley='exact', or cayley='neumann' for HF PEFT's default",
            )
        if self.blocks and self.block_size:
            raise BadOption(
                f"oft: block_size={self.block_size} and blocks={self.blocks} are both given; give one.",
                next_step=f"block_size={self.block_size} alone",
            )

    def tensors(self, site: Site) -> Specs:
        size = self._size(site)
        blocks = 1 if self.block_share else math.prod(site.shape[1:]) // size
        keep = functools.partial(within, bound=self.eps / blocks**0.5) if self.coft else None
        found = {"Q": zeros(blocks, size * (size - 1) // 2, keep=keep, compute="float32")}
        if self.module_dropout and blocks > 1:
            found["u"] = noise("uniform", blocks, 1, 1)
        return found

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """(out, in) or (out, in, height, width) -> the same shape"""
        R = self.rotation(t.Q)
        if "u" in t:  # the lowest draws
            dropped = int(self.module_dropout * R.shape[0])
            kept = t.u.argsort(0).argsort(0) >= dropped
            R = torch.where(kept, R, torch.eye(R.shape[-1]).to(R))
        parts = W.flatten(1).to(R.dtype).unflatten(-1, (-1, R.shape[-1])).transpose(0, 1)  # (blocks, out, b)
        turned = (parts @ R.mT - parts).transpose(-3, -2).flatten(-2)
        return turned.unflatten(-1, W.shape[1:])

    def rotation(self, Q: Tensor) -> Tensor:
        """(..., b (b - 1) / 2) -> (..., b, b)"""
        size = (1 + math.isqrt(1 + 8 * Q.shape[-1])) // 2
        S = skew(Q, size)
        one = torch.eye(size).to(Q)
        if self.cayley in ("exact", False):
            return torch.linalg.solve(one + S, one - S, left=False)
        R, power = one + (2 * S if self.terms > 1 else 0 * S), S
        for k in range(2, max(self.terms, 4) if self.terms > 2 else 0):
            power = power @ S
            R = R + (1 if k == max(self.terms, 4) - 1 else 2) * power
        return R

    def _size(self, site: Site) -> int:
        width = math.prod(site.shape[1:])
        divisors = [n for n in range(2, width + 1) if width % n == 0]
        if not self.block_size and not self.blocks:
            size = max((n for n in divisors if n <= 32), default=0)
        else:
            size = self.block_size or (width // self.blocks if width % self.blocks == 0 else 0)
        if size not in divisors:
            near = sorted(divisors, key=lambda n: abs(n - (self.block_size or 32)))
            given = f"blocks={self.blocks}" if self.blocks else f"block_size={self.block_size}"
            raise BadOption(
                f"oft: {given} does not cut the {width} inputs of '{site.name}' "
                "into equal blocks, two wide or more.",
                nearest=[f"block_size={n}" for n in near[:3]],
                next_step=f"block_size={near[0]}, or block_size=0 for the largest that fits"
                if near
                else f"exclude={site.name!r}",
            )
        return size


def within(Q: Tensor, bound: float) -> Tensor:
    """Q with |S| = sqrt(2) |Q[k]| cut to `bound` for each block: (blocks, n) -> (blocks, n)"""
    norm = 2**0.5 * Q.norm(dim=-1, keepdim=True)
    return torch.where(norm > bound, Q * (bound / norm.clamp(min=1e-30)), Q)
