"""Diff pruning: a change of every entry, and gates that learn which to drop. Guo et al., 2020,
arXiv:2012.07463.

    W' = W + z_group z w        w: as W, from zero        z: as W, z_group: one number, both in [0, 1]
    z = clamp(sigmoid(log u - log(1 - u) + alpha) (high - low) + low, 0, 1)        low = -1.5, high = 1.5

The hard-concrete gate at temperature 1: u is uniform in (1e-4, 1 - 1e-4), drawn for each call in training,
and 0.5, the median, outside of it. z_group is the same with alpha_group, one for each parameter tensor
("structured"). Both alphas start at 5, where nearly all gates are open. The loss gets the expected number of
open gates,

    penalty * [ sum_i sigmoid(alpha_i - log(-low / high)) + sigmoid(alpha_group - log(-low / high)) ]

Training has three phases: train w and alpha; fix the gates at their median, where only the entries of largest
|z_group z w| over all sites stay open; train those entries on. The second happens between two steps, before
the last `settle` of them (0: at the end), wherever a loop says how many there will be; a run that is stopped
before has its gates still in motion. The first phase costs more memory than full fine-tuning, the change that
comes out has `keep_ratio` of the entries and is zero in all others. The alphas learn at `gate_rate` times the
rate of w: the authors' script has 1e-5 for w and 0.1 for the alphas.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from veneer.edits import Site, Sites, Specs, Tensors, WeightMethod, constant, hyper, method, noise, zeros
from veneer.errors import BadOption

from ._masks import largest

FIXED = 1e3  # an alpha so far from zero that its gate no longer moves


@method("diff_pruning", paper="arXiv:2012.07463", family="selective/mask", rates=(1e-6, 1e-4))
class DiffPruning(WeightMethod):
    penalised = ("alpha", "alpha_group")  # the penalty moves the gates even where the loss does not
    penalty_weight: float = hyper(1.25e-7, "weight of the expected number of open gates", at_least=0)
    keep_ratio: float = hyper(0.005, "share of all entries that `finish` keeps", more_than=0, at_most=1)
    structured: bool = hyper(True, "one more gate for each parameter tensor")
    low: float = hyper(-1.5, "where the stretched gate begins", at_most=-1e-6)
    high: float = hyper(1.5, "where it ends", more_than=1)
    alpha_start: float = hyper(5.0, "start of the alphas")
    gate_rate: float = hyper(1e4, "rate of the alphas over that of w", more_than=0)
    settle: float = hyper(
        0.25, "share of the steps, the last ones, that train the kept entries alone", at_least=0, at_most=0.9
    )
    sites: Sites = "parameter"

    def tensors(self, site: Site) -> Specs:
        gate = {"decay": False, "rate": self.gate_rate, "group": "gates"}
        found = {
            "w": zeros(*site.shape),
            "alpha": constant(self.alpha_start, *site.shape, **gate),
            "u": noise("uniform", *site.shape),
        }
        if self.structured:
            found |= {"alpha_group": constant(self.alpha_start, **gate), "u_group": noise("uniform")}
        return found

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """Any shape -> the same shape"""
        change = self.gate(t.alpha, t.u if "u" in t else None) * t.w
        if "alpha_group" not in t:
            return change
        whole = self.gate(t.alpha_group, t.u_group if "u_group" in t else None)
        return whole.reshape(whole.shape[:1] + (1,) * (change.dim() - 1)) * change

    def gate(self, alpha: Tensor, u: Tensor | None) -> Tensor:
        """z for noise u in (0, 1); its median without: any shape -> the same shape"""
        if u is not None:
            u = u * (1 - 2e-4) + 1e-4
            alpha = alpha + (u.log() - (1 - u).log())
        return (alpha.sigmoid() * (self.high - self.low) + self.low).clamp(0, 1)

    def penalty(self, t: Tensors) -> Tensor:
        """The expected number of open gates of one site, weighted: ()"""
        ratio = math.log(-self.low / self.high)
        count = (t.alpha - ratio).sigmoid().sum()
        if "alpha_group" in t:
            count = count + (t.alpha_group - ratio).sigmoid().sum()
        return self.penalty_weight * count

    def between_steps(self, run: Any) -> None:
        """The gates are fixed once: those of kept entries at one, all others at zero, for good."""
        sites = {name: t for name, t in run.t.items() if "alpha" in t}
        if run.step == 1:
            self._count(sum(t.w.numel() for t in sites.values()))  # a run should not fail at its end
        if not run.total_steps or run.step != run.total_steps - round(self.settle * run.total_steps):
            return
        for name, kept in self.finish(sites).items():
            t = sites[name]
            t.w.zero_().view(-1)[kept["index"]] = kept["values"].to(t.w.dtype)
            # So far out no noise reaches the slope: the gate is 0 or 1 and its gradient zero.
            t.alpha.fill_(-FIXED).view(-1)[kept["index"]] = FIXED
            if "alpha_group" in t:
                t.alpha_group.fill_(FIXED)
            for tensor in ("alpha", "alpha_group"):
                if tensor in t:
                    run.forget(name, tensor)
            run.forget(name, "w", t.alpha < 0)

    def _count(self, entries: int) -> int:
        k = int(self.keep_ratio * entries)
        if k <= 0:
            raise BadOption(
                f"diff_pruning: keep_ratio={self.keep_ratio} keeps none of the {entries} entries.",
                next_step=f"keep_ratio={1.01 / max(entries, 1):.1e} keeps one",
            )
        return k

    def finish(self, sites: Mapping[str, Tensors]) -> dict[str, dict[str, Tensor]]:
        """What is left of a trained adapter: {site: {"index": (k,), "values": (k,)}}, flat and rising.

        sites: {site name: its tensors}. Of all changes, gates at their median, the int(keep_ratio * entries)
        largest stay, of equal ones the first. This is the form of `fish_mask`, in which the values are
        trained on with the mask fixed.
        """
        medians = {
            n: Tensors({k: v for k, v in t.items() if not k.startswith("u")}) for n, t in sites.items()
        }
        changes = [self.delta(t, t.w).detach().flatten() for t in medians.values()]
        k = self._count(sum(c.numel() for c in changes))
        kept = largest([c.abs() for c in changes], k)
        return {n: {"index": i, "values": c[i]} for n, i, c in zip(medians, kept, changes)}
