"""Losses of labels whose logits are never whole: the gradient is made while a piece of them is there.

The loss of a label depends on one hidden state alone, so its gradient with respect to that state is known as soon as
its logits are: softmax minus the label, times the output layer. Kept is that gradient, (labels, width), in place of
the logits, (labels, vocabulary). This needs an output layer that is not trained; for one that is, the backward makes
each piece again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 1 << 24  # of float32 logits that are held at a time


def losses_in_chunks(
    head: nn.Module, hidden: Tensor, targets: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """(labels,) negative log likelihoods. head: a linear layer; hidden: (labels, width); targets: (labels,)."""
    size = max(1, chunk_bytes // (4 * int(head.out_features)))  # type: ignore[arg-type]
    if not len(targets):
        return _wide(hidden.new_zeros(0)) + 0 * hidden.sum()  # in the graph, as every loss is
    trained = any(p.requires_grad for p in head.parameters())
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not (trained or hidden.requires_grad):
        return torch.cat([_piece(head, h, y) for h, y in zip(hidden.split(size), targets.split(size))])
    if not trained:
        return _GradientInForward.apply(hidden, targets, head, size)
    if len(targets) <= size:
        return _piece(head, hidden, targets)
    again = (
        checkpoint(_piece, head, h, y, use_reentrant=False, preserve_rng_state=False)
        for h, y in zip(hidden.split(size), targets.split(size))
    )
    return torch.cat(list(again))


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """(labels, vocabulary), (labels,) -> (labels,), in float32 at least."""
    return F.cross_entropy(_wide(logits), targets, reduction="none")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _piece(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return losses_of(head(hidden), targets)


class _GradientInForward(torch.autograd.Function):
    """Losses of a frozen output layer; what is saved for the backward is the gradient itself."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, size: int) -> Tensor:
        losses, gradient = [], torch.empty_like(hidden)
        for at in range(0, len(targets), size):
            y = targets[at : at + size, None]
            logits = head(hidden[at : at + size])
            log_p = F.log_softmax(_wide(logits), -1)
            losses.append(-log_p.gather(1, y)[:, 0])
            slope = log_p.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=log_p.dtype))
            gradient[at : at + size] = slope.to(logits.dtype) @ head.weight.to(logits.dtype)  # type: ignore[operator]
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream[:, None].to(gradient.dtype) * gradient), None, None, None
