"""GaLore: Adam in a low-rank space of the gradient. Zhao et al., 2024, arXiv:2403.03507.

    W: (m, n), its gradient G. Every `every` steps P <- the first `rank` singular vectors of G,
    m >= n:  R = G P^T, P: (rank, n)        m < n:  R = P^T G, P: (m, rank)
    W <- W - lr scale back(Adam(R))         back(N) = N P, or P N        then W <- (1 - lr decay) W

What is stored of a gradient is as small as R: 2 m rank + n rank in place of 2 m n. Moments stay when P
changes. W itself is trained dense, so the adapter must hold whole matrices (`full`): a factor of rank 8 has
nothing to project. Vectors, and matrices not larger than `rank`, get plain AdamW. As in the authors' code
the bias of both moments goes into the step size, which leaves eps (1e-6) unscaled. Gradients must be whole,
hence summed before the step; the singular vectors are found in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veneer.edits import hyper
from veneer.errors import Unsupported

from ._recipe import Group, Recipe, View, labels, recipe


@recipe("galore", paper="arXiv:2403.03507", rates=(1e-5, 1e-3))
class GaLore(Recipe):
    rank: int = hyper(128, "width of the projected gradient", at_least=1)
    every: int = hyper(200, "steps from projection to projection", alias="update_proj_gap", at_least=1)
    scale: float = hyper(0.25, "factor of the projected update", more_than=0)

    def optimizer(self, groups: list[Group], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        found = labels(groups)
        if not any(projects(shape, self.rank) for _, shape in found):
            matrices = [(min(shape), label, shape) for label, shape in found if len(shape) > 1]
            widest = max(matrices, default=None)
            raise Unsupported(
                f"galore projects dense trained matrices to rank={self.rank}, and here is none larger"
                + (f": the largest is {widest[1]}, {widest[2]}." if widest else ": it trains vectors alone."),
                next_step="use it with the method full, or with a smaller rank",
            )
        return GaLoreAdamW(groups, lr, rank=self.rank, every=self.every, scale=self.scale)


def projects(shape: tuple[int, ...], rank: int) -> bool:
    """Whether a tensor of this shape is projected: a matrix (a kernel flattened) larger than the rank."""
    return len(shape) > 1 and min(shape[0], _width(shape)) > rank


def _width(shape: tuple[int, ...]) -> int:
    width = 1
    for n in shape[1:]:
        width *= n
    return width


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW over shaped views of flat leaves, in a projected space where a view is a large matrix.

    State of a leaf: step, and for the i-th view "i.first", "i.second" (moments) and "i.basis".
    """

    def __init__(
        self, groups: list[Group], lr: float, *, rank: int, every: int, scale: float,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
    ) -> None:  # fmt: skip
        self.views: dict[Tensor, list[View]] = {
            group["params"][0]: group.get("views")
            or [("", tuple(group["params"][0].shape), 0, group["params"][0].numel())]
            for group in groups
        }
        bare = [{n: v for n, v in group.items() if n != "views"} for group in groups]
        super().__init__(bare, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.rank, self.every, self.scale = rank, every, scale

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for leaf in group["params"]:
                if leaf.grad is None:
                    continue
                state = self.state[leaf]
                state["step"] = int(state.get("step", 0)) + 1
                for i, (_, shape, start, stop) in enumerate(self.views[leaf]):
                    p, g = leaf[start:stop].view(shape), leaf.grad[start:stop].view(shape)
                    self._update(p, g, state, f"{i}.", group)
        return loss

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], at: str, group: dict[str, Any]) -> None:
        small = projects(tuple(p.shape), self.rank)
        if small:
            g = g.flatten(1)
            if at + "basis" not in state or (state["step"] - 1) % self.every == 0:
                state[at + "basis"] = basis(g, self.rank)
            g = down(g, state[at + "basis"])
        if at + "first" not in state:
            state[at + "first"], state[at + "second"] = torch.zeros_like(g), torch.zeros_like(g)
        (beta1, beta2), t = group["betas"], state["step"]
        first, second = state[at + "first"], state[at + "second"]
        first.mul_(beta1).add_(g, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        change = first / (second.sqrt() + group["eps"])
        if small:
            change = self.scale * up(change, state[at + "basis"], p.shape[0] >= _width(tuple(p.shape)))
        p.add_(change.view(p.shape), alpha=-group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t))
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])


def basis(G: Tensor, rank: int) -> Tensor:
    """The first singular vectors of the shorter side: (rank, n) where m >= n, else (m, rank)."""
    U, _, Vt = torch.linalg.svd(
        G.float() if G.dtype in (torch.bfloat16, torch.float16) else G, full_matrices=False
    )
    found = Vt[:rank] if G.shape[0] >= G.shape[1] else U[:, :rank]
    return found.to(G.dtype).contiguous()


def down(G: Tensor, P: Tensor) -> Tensor:
    """(m, n) -> (m, rank) or (rank, n)"""
    return G @ P.mT if G.shape[0] >= G.shape[1] else P.mT @ G


def up(N: Tensor, P: Tensor, tall: bool) -> Tensor:
    """(m, rank) or (rank, n) -> (m, n)"""
    return N @ P if tall else P @ N
