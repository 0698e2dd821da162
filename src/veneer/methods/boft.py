"""BOFT: turn the input space of W by a butterfly of orthogonal blocks. Liu et al., 2023, arXiv:2311.06243.

    W' = diag(s) W R^T        R = B_N .. B_2 B_1        B_i = P_i diag(R_i1 .. R_id) P_i^T
    R_ij = (I - Q) (I + Q)^-1        Q = (M - M^T) / 2        M: (factors, d, b, b)   s: (out,)

Each R_ij is an orthogonal (b, b) matrix, b d = in. Blocks of the first factor turn b neighbours (P_1 = I), those
of factor i > 1 two pieces of b / 2 that lie 2^(i-2) b apart, so that through all factors each input reaches
2^(factors-1) b others. Their order matters: turns do not commute. M starts at zero and s at one, so W' = W. s is
not decayed; decay of M pulls R to I. The bias is not scaled. M holds b^2 numbers for b (b - 1) / 2 that act, as in
the authors' code and HF PEFT, whose own layer falls back to one factor where its CUDA extension is missing.

A kernel is turned over (in, height, width) as one axis. `dropout` replaces int(dropout d) blocks of one factor,
drawn at each call in training, by I. `block_size=0` is 4, or the largest below that divides the width.
"""

import math

import torch
from torch import Tensor

from veneer.edits import Site, Sites, Specs, Tensors, WeightMethod, hyper, method, noise, ones, zeros
from veneer.errors import BadOption


@method(
    "boft",
    paper="arXiv:2311.06243",
    family="reparameterized/orthogonal",
    rates=(5e-4, 3e-2),
    kinds=("linear", "conv1d", "conv", "embedding", "recurrent", "experts", "parameter"),
)
class BOFT(WeightMethod):
    block_size: int = hyper(0, "width b of a block", alias="boft_block_size", at_least=0, size=True)
    blocks: int = hyper(0, "number d of blocks, in place of block_size", alias="boft_block_num", at_least=0)
    factors: int = hyper(1, "butterfly factors", alias="boft_n_butterfly_factor", at_least=1)
    dropout: float = hyper(
        0.0,
        "share of one factor's blocks that are I in training",
        alias="boft_dropout",
        at_least=0,
        at_most=1,
    )
    sites: Sites = "attention.{query,value}"

    def tensors(self, site: Site) -> Specs:
        size = self._size(site)
        blocks = math.prod(site.shape[1:]) // size
        found = {
            "M": zeros(self.factors, blocks, size, size, compute="float32"),
            "s": ones(site.shape[0], decay=False),
        }
        if self.dropout:
            found |= {"u": noise("uniform", blocks, 1, 1), "u_factor": noise("uniform")}
        return found

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """(out, in) or (out, in, height, width) -> the same shape"""
        flat = W.flatten(1).to(t.M.dtype)
        turned = flat
        for i, R in enumerate(self.rotations(t).unbind(-4)):
            places = butterfly(i, R.shape[-1], flat.shape[-1], W.device)
            inner = turned[..., places].unflatten(-1, R.shape[-3:-1]).transpose(-3, -2)  # (d, out, b)
            turned = (inner @ R.mT).transpose(-3, -2).flatten(-2)[..., places.argsort()]
        scaled = (turned.mT * t.s.to(t.M.dtype)).mT
        return (scaled - flat).unflatten(-1, W.shape[1:])

    def rotations(self, t: Tensors) -> Tensor:
        """M (..., b, b) -> the orthogonal blocks, like M"""
        Q = (t.M - t.M.mT) / 2
        one = torch.eye(Q.shape[-1]).to(Q)
        R = torch.linalg.solve(one + Q, one - Q, left=False)
        if "u" not in t:
            return R
        lowest = t.u.argsort(-3).argsort(-3) < int(self.dropout * R.shape[-3])
        factor = torch.arange(self.factors, device=R.device)[:, None, None, None]
        chosen = factor == (t.u_factor * self.factors).long().unsqueeze(-1)
        return torch.where(lowest.unsqueeze(-4) & chosen, one, R)

    def _size(self, site: Site) -> int:
        width = math.prod(site.shape[1:])
        fitting = [b for b in range(2, width + 1) if width % self._span(b) == 0 and self._is_even(b, width)]
        if self.blocks and self.block_size:
            raise BadOption(
                f"boft: block_size={self.block_size} and blocks={self.blocks} are both given.",
                next_step=f"give one of them: block_size={self.block_size}",
            )
        if self.blocks:
            size = width // self.blocks if width % self.blocks == 0 else 0
        else:
            size = self.block_size or max((b for b in fitting if b <= 4), default=0)
        if size not in fitting:
            given = f"blocks={self.blocks}" if self.blocks else f"block_size={self.block_size}"
            near = sorted(fitting, key=lambda b: abs(b - (size or self.block_size or 4)))
            raise BadOption(
                f"boft: {given}, factors={self.factors} does not cut the {width} inputs of '{site.name}' into equal "
                "spans of 2^(factors-1) blocks" + (", of even width." if self.factors > 1 else "."),
                nearest=[f"block_size={b}" for b in near[:3]],
                next_step=f"block_size={near[0]}" if near else "factors=1, or exclude this site",
            )
        return size

    def _span(self, size: int) -> int:
        return size * 2 ** (self.factors - 1)

    def _is_even(self, size: int, width: int) -> bool:
        return self.factors == 1 or (size % 2 == 0 and (width // size) % 2 == 0)


def butterfly(i: int, size: int, width: int, device: torch.device | None = None) -> Tensor:
    """The inputs that the blocks of factor i + 1 turn, block by block: (width,)"""
    places = torch.arange(width, device=device)
    if i == 0:
        return places
    pairs = places.view(-1, 2, 2**i, size // 2)  # spans of 2^i blocks, two halves of 2^i pieces
    return pairs.transpose(1, 2).flatten()
