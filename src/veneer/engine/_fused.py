"""A frozen linear layer and the low-rank edit beside it as one node of autograd.

One idea: of y = x W^T + b + (x D^T) U^T autograd needs x and the narrow product alone, and the gradient of x is one
sum. As separate operations there are a second output, a second gradient of x, and passes over both. And where x is what
an activation or a norm made, whose own input is kept anyway, x itself is not kept: the backward makes it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from veneer.errors import VeneerError

from ._low_rank import factors
from ._swap import plain_class

if TYPE_CHECKING:
    from ._frame import Frame
    from ._program import Op

SMALL = 1 << 15  # numbers: an input below this is kept as it is
Product = Callable[[Tensor, bool], Tensor]  # (x, False) -> x W^T + b; (g, True) -> g W


def beside(module: nn.Module, ops: Sequence[Op], frame: Frame, x: Any) -> Tensor | None:
    """The layer's output with one low-rank edit of the whole batch added, in one node; None where that is not so."""
    op = ops[0]
    if len(ops) > 1 or "low_rank" not in op.method.arguments or not may_fuse(x):
        return None
    if op.rows is not None or op.rowed or op.live is not None or op.low is not None or op.site.ranges:
        return None
    if getattr(op.method, "dropout", 0.0):  # what is dropped is drawn between the two products
        return None
    pair = op.method.low_rank(op.t) if factors(op.plan, op.t) else None  # type: ignore[attr-defined]
    if pair is None or any(f.dtype != x.dtype for f in pair):
        return None
    down, up = pair
    if not down.requires_grad:  # as separate operations nothing keeps x (LoRA-FA)
        return None
    multiply = product_of(module, x)
    return None if multiply is None else fused(x, down, up, multiply)


def product_of(module: nn.Module, x: Tensor) -> Product | None:
    """How a frozen linear layer multiplies, both ways; None where something else than the layer decides that.

    A class with a product of its own has `frozen_product(x)`. Raises VeneerError in a backward behind whose forward the
    weight was changed.
    """
    plain: Any = plain_class(module)
    W, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if W is None or W.requires_grad or W.is_inference() or (bias is not None and bias.requires_grad):
        return None
    multiply: Product | None
    if hasattr(plain, "frozen_product"):
        multiply = plain.frozen_product(module, x)
    elif plain.forward is nn.Linear.forward and W.dtype == x.dtype:
        multiply = functools.partial(_plainly, W, bias)
    else:
        return None
    return None if multiply is None else functools.partial(_unchanged, W, W._version, multiply)


def _plainly(W: Tensor, bias: Tensor | None, x: Tensor, back: bool) -> Tensor:
    return x @ W if back else nn.functional.linear(x, W, bias)


def _unchanged(W: Tensor, version: int, multiply: Product, x: Tensor, back: bool) -> Tensor:
    if W._version != version:
        raise VeneerError(
            "a frozen weight was changed between a forward and its backward, whose gradient would be another's.",
            next_step="merge, load or write weights before the forward, or after its backward",
        )
    return multiply(x, back)


def may_fuse(x: Any) -> bool:
    """Whether a node of our own gives here what separate operations give: in plain eager autograd."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return False
    if x.dim() < 2 or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return False
    watched = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
    lifted = torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
    return not watched and not lifted


def fused(x: Tensor, down: Tensor, up: Tensor, multiply: Product) -> Tensor:
    """x W^T + b + (x down^T) up^T. x: (..., in), down: (rank, in), up: (out, rank) -> (..., out)"""
    return _Fused.apply(x, down, up, multiply)


class _Fused(torch.autograd.Function):
    """Differentiable twice: the backward is written in operations that autograd knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, multiply: Product) -> Tensor:
        y = multiply(x, False)
        narrow = x.reshape(-1, x.shape[-1]) @ down.mT
        y.view(-1, y.shape[-1]).addmm_(narrow, up.mT)
        ctx.multiply, ctx.again = multiply, source_of(x)
        ctx.save_for_backward(x if ctx.again is None else None, down, up, narrow)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        kept, down, up, narrow = ctx.saved_tensors
        wide = g.reshape(-1, g.shape[-1])
        to_x = to_down = to_up = None
        slope = wide @ up
        if ctx.needs_input_grad[1] or torch.is_grad_enabled():
            x = kept if ctx.again is None else ctx.again()
            x = x.reshape(-1, x.shape[-1])
            to_down = slope.mT @ x
        if ctx.needs_input_grad[2]:
            if torch.is_grad_enabled():  # the gradient itself is differentiated: from what has a graph
                narrow = x @ down.mT
            to_up = wide.mT @ narrow
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled():
                to_x = _again(g, ctx.multiply) + (slope @ down).view(*g.shape[:-1], -1)
            else:
                to_x = ctx.multiply(g, True)
                to_x.view(-1, to_x.shape[-1]).addmm_(slope, down)
        return to_x, to_down, to_up, None


def _again(g: Tensor, multiply: Product) -> Tensor:
    """g W with a graph, for a form that has none of its own."""
    return _Back.apply(g, multiply)


class _Back(torch.autograd.Function):
    """g -> g W, whose gradient is that of a product with W^T."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, multiply: Product) -> Tensor:
        ctx.multiply = multiply
        return multiply(g, True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gg,) = gradients
        zero = gg.new_zeros(*gg.shape)
        return ctx.multiply(gg, False) - ctx.multiply(zero, False), None


# -- what is made again -----------------------------------------------------------------------------------------------

Make = Callable[[], Tensor]
DEEPEST = 3  # operations in a row


def source_of(x: Tensor) -> Make | None:
    """How to make x again from what the operations that made it keep for their own backward; None where they keep
    nothing that would do. A node gives up what it keeps behind those that read its output, so it is still there."""
    if x.numel() < SMALL or x.output_nr != 0:
        return None
    return _value(x.grad_fn, DEEPEST)


def _value(node: Any, deepest: int) -> Make | None:
    """What makes a node's (first) output, in a few operations that cost a pass over it."""
    kind = type(node).__name__
    if kind == "GeluBackward0":
        return lambda: nn.functional.gelu(node._saved_self, approximate=node._saved_approximate)
    if kind == "SiluBackward0":
        return lambda: nn.functional.silu(node._saved_self)
    if kind == "NativeLayerNormBackward0":
        return lambda: _normed(node)
    if kind == "MulBackward0" and deepest:
        one, two = (_factor(node, i, deepest) for i in (0, 1))
        return None if one is None or two is None else lambda: one() * two()
    return None


def _factor(node: Any, at: int, deepest: int) -> Make | None:
    name = ("_saved_self", "_saved_other")[at]
    if getattr(node, name) is not None:
        return lambda: getattr(node, name)
    producer, output = node.next_functions[at]
    return _value(producer, deepest - 1) if producer is not None and output == 0 else None


def _normed(node: Any) -> Tensor:
    """A layer norm's output from its input and the two numbers a row that it keeps: equal but for rounding."""
    x, mean, scale = node._saved_input, node._saved_result1, node._saved_result2
    if torch.is_grad_enabled():  # to be differentiated again: both are functions of x, and have no graph here
        axes = list(range(-len(node._saved_normalized_shape), 0))
        room = scale.pow(-2) - x.detach().var(
            axes, correction=0, keepdim=True
        )  # what the norm adds to a variance
        mean, scale = x.mean(axes, keepdim=True), (x.var(axes, correction=0, keepdim=True) + room).rsqrt()
    y = (x - mean) * scale
    W, b = node._saved_weight, node._saved_bias
    y = y if W is None else y * W
    return y if b is None else y + b
