"""LoRA-FA: of a low-rank pair B A only B is trained. Zhang et al., 2023, arXiv:2308.03303.

    g_B <- g_B (A A^T + 1e-8 I)^-1 / s^2        then AdamW on B        A: (rank, in), as it was drawn

A stays, so the backward needs A x (rank numbers a token) in place of x (`in` numbers). Among all changes of B
the corrected one is the nearest to what the gradient of W asks for: to first order W moves by G P, P the
projector onto the rows of A. `correct=False` is the plain form, which only freezes A. The factor 1 / s^2
matters beside AdamW's eps alone, which does not see a gradient's scale; s is 1 here unless it is given.
HF PEFT's optimiser does the same with eps 1e-6, and in bfloat16 where the machine has it.

Other tensors (magnitudes, heads, biases) are trained as ever. A stays frozen in the adapter at hand until
another recipe trains it (`adamw` is one), or until it is loaded again; its file is that of any pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veneer.anatomy import Site
from veneer.edits import Spec, hyper
from veneer.errors import Unsupported

from ._recipe import Group, Recipe, View, labels, recipe

RIDGE = 1e-8


@recipe("lora_fa", paper="arXiv:2308.03303", rates=(3e-4, 2e-2))
class LoRAFA(Recipe):
    correct: bool = hyper(True, "the gradient of B is corrected by A, and not only A frozen")
    scale: float = hyper(1.0, "s, alpha / rank of the pair", more_than=0)

    def regroup(self, site: Site, name: str, spec: Spec) -> tuple[str, float] | None:
        return (f"{spec.group}{name}", spec.rate) if name in ("A", "B") else None

    def optimizer(self, groups: list[Group], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        names = {label.rpartition("/")[2] for label, _ in labels(groups)}
        if not {"A", "B"} <= names:
            raise Unsupported(
                "lora_fa freezes the A and trains the B of a low-rank pair B A, and this adapter trains "
                f"{', '.join(sorted(names)) or 'nothing'}.",
                next_step="use it with a method that trains A and B, such as lora or dora",
            )
        return FrozenAAdamW(groups, lr, correct=self.correct, scale=self.scale)


class FrozenAAdamW(torch.optim.AdamW):
    """torch's AdamW over flat leaves, the tensors called A left out and the gradients of B corrected by them."""

    def __init__(self, groups: list[Group], lr: float, *, correct: bool = True, scale: float = 1.0) -> None:
        self.correct, self.scale = correct, scale
        # (site, leaf, view): a leaf holds tensors of one name, since `regroup` sorts them so.
        self.pairs: dict[str, dict[str, tuple[Tensor, View]]] = {"A": {}, "B": {}}
        self.frozen: list[Tensor] = []
        for group in groups:
            (leaf,) = group["params"]
            for view in group.get("views", ()):
                site, _, name = view[0].rpartition("/")
                if name in self.pairs:
                    self.pairs[name][site] = (leaf, view)
                if name == "A" and not any(leaf is other for other in self.frozen):
                    self.frozen.append(leaf)
        for leaf in self.frozen:
            leaf.requires_grad_(False)
        bare = [{name: value for name, value in group.items() if name != "views"} for group in groups]
        super().__init__(bare, lr=lr)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for leaf in self.frozen:
            leaf.grad = None  # a cohort may make one: neither the step nor decay moves A
        if self.correct:
            self._correct()
        super().step()
        return loss

    def _correct(self) -> None:
        """Pairs of one rank together: their inverses are one call."""
        by_rank: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for site, (leaf, (_, shape, start, stop)) in self.pairs["B"].items():
            if leaf.grad is None or site not in self.pairs["A"]:
                continue
            held, (_, other, first, last) = self.pairs["A"][site]
            axis = len(shape) - 1  # a kernel is flattened; stacks of experts have an axis in front
            A, g = held[first:last].view(other).flatten(axis), leaf.grad[start:stop].view(shape)
            if len(shape) == 2:
                by_rank.setdefault(shape[-1], []).append((A, g))
            else:
                by_rank.setdefault(shape[-1], []).extend(zip(A, g))
        for pairs in by_rank.values():
            inverses = inverse(torch.stack([A @ A.mT for A, _ in pairs]))
            for (_, g), own in zip(pairs, inverses):
                g.copy_(g @ own.to(g.dtype) / self.scale**2)


def inverse(gram: Tensor) -> Tensor:
    """(A A^T + 1e-8 I)^-1 of stacked symmetric matrices: (n, rank, rank) -> the same shape, float32 at least"""
    gram = gram if gram.dtype == torch.float64 else gram.float()
    return torch.linalg.pinv(gram + RIDGE * torch.eye(gram.shape[-1]).to(gram), hermitian=True)
