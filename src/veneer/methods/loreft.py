"""LoReFT and its ablations: move a hidden state inside a learned subspace. Wu et al., 2024, arXiv:2404.03592.

    loreft     h' = h + R^T (W h + b - R h)        R, W: (rank, width)   b: (rank,)   R R^T = I
    noreft     the same with R unconstrained       direft     h + R^T (W h + b), R unconstrained
    consreft   h + R^T (b - R h)                   lobireft   h + R^T b, both with R R^T = I

h is a block's output, the residual stream, at chosen positions of the prompt only: R spans the subspace, W
h + b is where the state should be inside it, and what is orthogonal to R stays as it was. Tokens that are
generated are never edited: they read the edited prompt from the cache. On a prompt of n tokens each end
takes at most n // 2, none is edited twice, and padding does not count. `tied=False` gives the last
positions tensors of their own. In an encoder-decoder the prompt is what the encoder reads: its decoder
stays bare.

W and b start at random, so the model does not begin as its base. The edit depends on the token: it cannot
be merged. R is projected onto orthonormal rows after each step, and saved as such; pyreft keeps an
unconstrained matrix behind R instead. Its DireftIntervention keeps R orthonormal, its NodireftIntervention
is the paper's DiReFT, which `direft` is. Dropout falls on the whole of h', as in the published code, not on
the update alone.
"""

import torch
from torch import Tensor

from veneer.edits import (
    At,
    OutputMethod,
    Site,
    Sites,
    Specs,
    Tensors,
    dropout,
    hyper,
    kaiming,
    method,
    orthogonal,
    orthonormal_rows,
    parse_positions,
    uniform,
)

CONSTRAINED = ("loreft", "consreft", "lobireft")
SUBTRACTING = ("loreft", "noreft", "consreft")


@method(
    "loreft",
    paper="arXiv:2404.03592",
    family="additive/representation",
    starts_as_identity=False,
    reason="W and b start at random, as in the paper",
    mergeable=False,
    rates=(1e-4, 1e-2),
)
class LoReFT(OutputMethod):
    rank: int = hyper(4, "dimensions of the subspace", at_least=1, alias="r", size=True)
    variant: str = hyper(
        "loreft",
        "which of the paper's equations",
        choices=("loreft", "noreft", "direft", "consreft", "lobireft"),
    )
    positions: str = hyper("prompt[:4] + prompt[-4:]", "tokens that are edited")
    tied: bool = hyper(True, "one set of tensors for first and last positions", alias="tied_weights")
    dropout: float = hyper(0.0, "share of h' that is dropped in training", at_least=0, at_most=1)
    sites: Sites = "block"

    def __post_init__(self) -> None:
        parse_positions(self.positions)

    def tensors(self, site: Site) -> Specs:
        if site.stack == "decoder" and self.positions != "all":
            return {}  # the prompt is what the encoder reads
        return {name + end: spec for end in self.ends for name, spec in self._one(site.width).items()}

    def _one(self, width: int) -> Specs:
        if self.variant in CONSTRAINED:
            made: Specs = {"R": orthogonal(self.rank, width, keep=orthonormal_rows, decay=False)}
        else:
            made = {"R": kaiming(self.rank, width)}
        if self.variant not in ("consreft", "lobireft"):
            made["W"] = kaiming(self.rank, width)
        return {**made, "b": uniform(width**-0.5, self.rank, decay=False)}

    def output(self, t: Tensors, y: Tensor, at: At) -> Tensor:
        """(..., tokens, width) -> (..., tokens, width)"""
        if "b" not in t or at.nowhere(self.positions):
            return y
        new = self.moved(t, y)
        if "_last" in self.ends:
            new = torch.where(self.from_the_start(y, at), new, self.moved(t, y, "_last"))
        return at.where(self.positions, dropout(new, self.dropout, at), y)

    def moved(self, t: Tensors, h: Tensor, end: str = "") -> Tensor:
        """(..., width) -> (..., width)"""
        R, change = getattr(t, "R" + end), getattr(t, "b" + end)
        if "W" + end in t:
            change = h @ getattr(t, "W" + end).mT + change
        if self.variant in SUBTRACTING:
            # Project back with R itself, not a pseudo-inverse: its rows are kept orthonormal.
            change = change - h @ R.mT
        return h + change @ R

    def from_the_start(self, y: Tensor, at: At) -> Tensor:
        """(rows or 1, tokens, 1) bool: of the edited tokens, those counted from the start of their prompt."""
        first, last, _ = parse_positions(self.positions)
        texts = ("prompt", f"prompt[:{first}]", f"prompt[-{last}:]")
        prompt, start, end = (at.positions(text, y.shape[-2], y.device) for text in texts)
        order = prompt.long().cumsum(-1)
        return (start & ~(end & (2 * order > order[..., -1:])))[..., None]

    @property
    def ends(self) -> tuple[str, ...]:
        first, last, _ = parse_positions(self.positions)
        return ("", "_last") if first and last and not self.tied else ("",)
