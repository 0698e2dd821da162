"""MeZO: training with two forward passes and no gradient. Malladi et al., 2023, arXiv:2305.17333.

    z ~ N(0, I) from the step's seed
    g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps)
    theta <- theta - lr (g z + decay theta)

z is never stored: it is drawn again from its seed, tensor by tensor in a fixed order, for each of its four
uses, so that the memory is that of inference and of the largest single tensor. A whole run is its start and
one pair (seed, g) a step, `record`; `replay` makes the end of it. Both losses must see the same batch and
the same dropout. The loss need not be differentiable. Rates are far below those of Adam, and many steps are
needed. theta is put back by adding what was taken away: the rounding of that is as small as one float32
step, and larger in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.edits import hyper

from ._recipe import Group, Recipe, View, recipe


@recipe("mezo", paper="arXiv:2305.17333", backward=False, rates=(1e-7, 1e-3))
class MeZO(Recipe):
    eps: float = hyper(1e-3, "length of the trial steps along z", more_than=0)
    seed: int = hyper(0, "of the directions")

    def optimizer(self, groups: list[Group], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return ZerothOrder(groups, lr, eps=self.eps, seed=self.seed)


class ZerothOrder(torch.optim.Optimizer):
    """MeZO's update of flat leaves. `step(closure)`: the closure gives the loss and makes no gradient."""

    def __init__(self, groups: list[Group], lr: float, *, eps: float = 1e-3, seed: int = 0) -> None:
        self.views: dict[Tensor, list[View]] = {g["params"][0]: g.get("views") or [] for g in groups}
        bare = [{n: v for n, v in group.items() if n != "views"} for group in groups]
        super().__init__(bare, {"lr": lr, "weight_decay": 0.0})
        self.eps, self.seed = eps, seed
        self.record: list[tuple[int, float]] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Tensor:  # type: ignore[override]
        """One update; returns the mean of the two losses."""
        seed = self._seed_of(len(self.record))
        self._move(seed, self.eps)
        above = torch.as_tensor(closure())
        self._move(seed, -2 * self.eps)
        below = torch.as_tensor(closure())
        self._move(seed, self.eps)
        slope = float(above - below) / (2 * self.eps)
        self._descend(seed, slope)
        self.record.append((seed, slope))
        return (above + below) / 2

    @torch.no_grad()
    def replay(self, record: Sequence[tuple[int, float]]) -> None:
        """Take the steps of a record, at the groups' present rates."""
        for seed, slope in record:
            self._descend(seed, slope)
            self.record.append((seed, slope))

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {**super().state_dict(), "record": [list(pair) for pair in self.record]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rest = {n: v for n, v in state_dict.items() if n != "record"}
        super().load_state_dict(rest)
        self.record = [(int(seed), float(slope)) for seed, slope in state_dict["record"]]

    def _seed_of(self, step: int) -> int:
        """Seeds of neighbouring steps and runs have no draws in common."""
        mixed = (self.seed * 0x9E3779B97F4A7C15 + step + 1) * 0xBF58476D1CE4E5B9
        return (mixed ^ (mixed >> 31)) % 2**63

    def _move(self, seed: int, length: float) -> None:
        for p, z, _ in self._directions(seed):
            p.add_(z, alpha=length)

    def _descend(self, seed: int, slope: float) -> None:
        for p, z, group in self._directions(seed):
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(z, alpha=-group["lr"] * slope)

    def _directions(self, seed: int) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """(part of a leaf, its z, its group), tensor by tensor, from one generator a device."""
        generators: dict[Any, torch.Generator] = {}
        for group in self.param_groups:
            for leaf in group["params"]:
                if not leaf.requires_grad:
                    continue
                if leaf.device not in generators:
                    generators[leaf.device] = torch.Generator(leaf.device).manual_seed(seed)
                views = self.views.get(leaf) or [("", (leaf.numel(),), 0, leaf.numel())]
                for _, _, start, stop in views:
                    p = leaf.view(-1)[start:stop]
                    z = torch.randn(
                        p.shape, generator=generators[leaf.device], device=p.device, dtype=p.dtype
                    )
                    yield p, z, group
