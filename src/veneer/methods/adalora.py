"""AdaLoRA: singular triplets, and fewer of them as training goes on. Zhang et al., 2023, arXiv:2303.10512.

    W' = W + alpha / (rank + 1e-5) B diag(E) A        A: (rank, in)   B: (out, rank)   E: (rank,)

The paper's P Lambda Q. E starts at zero, A and B at N(0, 0.02^2); rank is the initial one and stays in the
scale while triplets are dropped (the authors' code and HF PEFT, 1e-5 included; the paper has no such
factor). The loss gets orthogonality * mean over all A and B of |A A^T - I|_F and |B^T B - I|_F, not squared,
as in both codes.

After each step t = 1, 2, ..  (before gradients are dropped; i = |p gradient| for each entry p)

    I <- beta1 I + (1 - beta1) i        U <- beta2 U + (1 - beta2) |i - I|        until t = total - tfinal
    score of triplet k = (I U)(E_k) + mean_j (I U)(A_kj) + mean_j (I U)(B_jk)
    b(t) = b0 for t <= tinit, then int((b0 - b1) (1 - (t - tinit) / (total - tfinal - tinit))^3 + b1)

b0 counts all triplets, b1 = target_rank a site; every `every` steps E of the b0 - b(t) lowest scores over
*all* sites is set to zero. A dropped triplet can return, since its E still gets gradients, until t = total -
tfinal: then the last choice is made and held. The schedule needs the number of steps.

`bias` and `trainable_tokens` train biases of the base and rows of its table beside the triplets, as for `lora`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.edits import (
    At,
    Method,
    Site,
    Sites,
    Specs,
    Tensors,
    WeightMethod,
    dropout,
    hyper,
    method,
    normal,
    zeros,
)
from veneer.errors import BadOption

from . import _beside


@method(
    "adalora",
    paper="arXiv:2303.10512",
    family="reparameterized/adaptive-rank",
    rates=(2e-4, 5e-3),
    kinds=("linear", "conv1d", "conv", "recurrent", "experts", "parameter"),
)
class AdaLoRA(WeightMethod):
    rank: int = hyper(12, "triplets a site at the start", alias="init_r", at_least=1, size=True)
    target_rank: int = hyper(8, "triplets a site at the end, on average", alias="target_r", at_least=1)
    alpha: float = hyper(16.0, "numerator of the scale", alias="lora_alpha", more_than=0)
    dropout: float = hyper(
        0.0, "share of A's inputs dropped in training", alias="lora_dropout", at_least=0, at_most=1
    )
    tinit: int = hyper(0, "steps before the first triplet is dropped", at_least=0)
    tfinal: int = hyper(0, "steps after the last choice", at_least=0)
    every: int = hyper(1, "steps from choice to choice", alias="deltaT", at_least=1)
    beta1: float = hyper(0.85, "memory of the importance", more_than=0, at_most=1)
    beta2: float = hyper(0.85, "memory of its uncertainty", more_than=0, at_most=1)
    orthogonality: float = hyper(0.5, "weight of the penalty", alias="orth_reg_weight", at_least=0)
    bias: str = hyper("none", "biases of the base that are trained too", choices=_beside.BIASES)
    trainable_tokens: Sequence[int] | Mapping[str, Sequence[int]] = hyper(
        (), "token ids whose rows of the embedding are trained too", alias="trainable_token_indices"
    )
    sites: Sites = "attention.{query,value}"

    needs_total_steps = True
    penalty_over_sites = "mean"  # how the penalties of sites make one number

    def __post_init__(self) -> None:
        if self.target_rank > self.rank:
            raise BadOption(
                f"adalora: target_rank={self.target_rank} is above the initial rank={self.rank}.",
                next_step=f"rank={self.target_rank} or more, or target_rank={self.rank}",
            )

    def tensors(self, site: Site) -> Specs:
        return {
            "A": normal(0.02, self.rank, *site.shape[1:]),
            "B": normal(0.02, site.shape[0], self.rank),
            "E": zeros(self.rank, decay=False),
            **_beside.own_bias(self, site),
        }

    def also(self) -> tuple[Method, ...]:
        return _beside.parts(self)

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """(out, in) or (out, in, height, width) -> the same shape"""
        axis = t.B.dim() - 1  # the first axis of a kernel
        product = (t.B * t.E) @ t.A.flatten(axis)
        return self.scale * product.unflatten(-1, t.A.shape[axis:])

    def branch(self, t: Tensors, x: Tensor, at: At) -> Tensor:
        """(..., in) -> (..., out)"""
        y = self.scale * (dropout(x, self.dropout, at) @ t.A.mT * t.E) @ t.B.mT
        return y + t.base_bias if "base_bias" in t else y

    def bias_delta(self, t: Tensors) -> Tensor | None:
        """What is added to the base's bias: (out,), or None where it is not trained."""
        return t.base_bias if "base_bias" in t else None

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank + 1e-5)

    def penalty(self, t: Tensors) -> Tensor:
        """How far A's rows and B's columns are from orthonormal, at one site: ()"""
        A, B = t.A.flatten(t.B.dim() - 1), t.B
        one = torch.eye(B.shape[-1]).to(B)
        gaps = [(M - one).square().sum((-2, -1)).sqrt().mean() for M in (A @ A.mT, B.mT @ B)]
        return self.orthogonality * (gaps[0] + gaps[1]) / 2

    # ---- the schedule

    def budget(self, step: int, total_steps: int, first: int, last: int) -> int:
        """Triplets of all sites that live after `step`, on the way from `first` to `last`."""
        end = total_steps - self.tfinal
        if step <= self.tinit:
            return first
        if step > end:
            return last
        left = 1 - (step - self.tinit) / (end - self.tinit)
        return int((first - last) * left**3 + last)

    def between_steps(self, run: Any) -> None:
        """Scores, and now and then a choice: after the optimiser's step, while gradients are there."""
        step, end = run.step, run.total_steps - self.tfinal
        if end <= self.tinit:
            raise BadOption(
                f"adalora: tinit={self.tinit} and tfinal={self.tfinal} leave no step of {run.total_steps} "
                "in which triplets are dropped.",
                next_step="fewer of both, or more steps than their sum",
            )
        sites = {name: t for name, t in run.t.items() if "E" in t}
        if step < end:
            self._remember(run, sites)
        if self.tinit < step <= end and (step % self.every == 0 or step == end):
            self._choose(run, sites)
        if step > end:
            for name, t in sites.items():
                t.E.mul_(run.state[f"{name}/kept"])

    def _remember(self, run: Any, sites: dict[str, Tensors]) -> None:
        """Moving means of importance and of its uncertainty, entry by entry."""
        for site, t in sites.items():
            for name in ("A", "B", "E"):
                if name not in run.grad[site]:
                    continue
                now = (getattr(t, name) * getattr(run.grad[site], name)).abs()
                I_ = run.state.setdefault(f"{site}/{name}.importance", torch.zeros_like(now))
                U = run.state.setdefault(f"{site}/{name}.uncertainty", torch.zeros_like(now))
                I_.mul_(self.beta1).add_((1 - self.beta1) * now)
                U.mul_(self.beta2).add_((1 - self.beta2) * (now - I_).abs())

    def _choose(self, run: Any, sites: dict[str, Tensors]) -> None:
        """E to zero for the lowest scores of all sites together."""
        scores = {name: self._scores(run.state, name, t) for name, t in sites.items()}
        first = sum(score.numel() for score in scores.values())
        last = self.target_rank * sum(score.numel() // score.shape[-1] for score in scores.values())
        drop = first - self.budget(run.step, run.total_steps, first, last)
        ranked = torch.cat([score.flatten() for score in scores.values()])
        highest_dropped = ranked.kthvalue(drop).values if drop > 0 else -torch.ones_like(ranked[0])
        for name, t in sites.items():
            kept = (scores[name] > highest_dropped).to(t.E.dtype)
            t.E.mul_(kept)
            run.state[f"{name}/kept"] = kept

    def _scores(self, state: dict[str, Tensor], site: str, t: Tensors) -> Tensor:
        """Of each triplet: (rank,)"""

        def entries(name: str) -> Tensor:
            key = f"{site}/{name}"
            if f"{key}.importance" not in state:  # no gradient so far
                return torch.zeros_like(getattr(t, name))
            return state[f"{key}.importance"] * state[f"{key}.uncertainty"]

        A = entries("A").flatten(t.B.dim() - 1)
        return entries("E") + A.mean(-1) + entries("B").mean(-2)
