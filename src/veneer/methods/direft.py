"""DiReFT: a low-rank edit of hidden states at the prompt's ends. Wu et al., 2024, arXiv:2404.03592.

    h' = h + R^T (W h + b)        R, W: (rank, width)   b: (rank,)

LoReFT without its constraint and without its difference: R is free, and nothing is taken away. That leaves no
projection after a step, and trains faster at slightly lower scores (the paper's ablation). h, positions, untied
ends and dropout are LoReFT's: the residual stream behind each block, on tokens of the prompt alone.

R and W start at random, so the model does not begin as its base. The names differ by code: pyreft calls this
NodireftIntervention, and its DireftIntervention keeps R orthonormal; AdapterHub's DiReFT is this one. The paper
writes W2 for R and W1 for W.
"""

from typing import ClassVar

from veneer.edits import method

from .loreft import LoReFT


@method(
    "direft",
    paper="arXiv:2404.03592",
    family="additive/representation",
    starts_as_identity=False,
    reason="R, W and b start at random, as in the paper",
    mergeable=False,
    rates=(1e-4, 1e-2),
)
class DiReFT(LoReFT):
    variant: ClassVar[str] = "direft"  # type: ignore[misc]  # no option here
