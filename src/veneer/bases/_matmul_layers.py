"""Linear layers that multiply by a form: their class changes, their weight stays where and what it was.

One idea: the copies that a form multiplies with belong to one weight at one version. Another weight in its place (an
adapter's W', a merge, a loaded file, another dtype) is seen at the next call: a parameter is copied anew, anything else
is multiplied plainly. So whatever reads `weight` reads the truth, and no copy is in a state_dict, a deepcopy, a pickle.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.bases._matmul_products import Product, product_for
from veneer.bases._spared import let_go
from veneer.errors import VeneerError


class Copies:
    """What one layer keeps for its form: a copy for the forward, one for the gradient, each made at first need."""

    def __init__(self, form: str, spared: bool = False) -> None:
        self.form = form
        self.spared = spared  # the weight lies in a mapped file, and is read from there
        # (what it was copied from, the weight, the copies): one value, so that threads see all of it or none.
        self._state: tuple[Any, Any, dict[bool, Any]] = (None, None, {})

    def multiply(self, x: Tensor, W: Tensor, bias: Tensor | None, product: Product, back: bool) -> Tensor:
        """x (..., k) times W^T, or, `back`, times W: (..., n). W is (out, in) as the layer means it."""
        return product.product(x, self._copy(W, product, back), bias)

    def _copy(self, W: Tensor, product: Product, back: bool) -> Any:
        key = (W.data_ptr(), W._version, W.device, W.shape)
        of, weight, kept = self._state
        if key != of or weight() is not _owner(W):
            kept = {}
            self._state = key, weakref.ref(_owner(W)), kept
        if back not in kept:
            with torch.no_grad():
                kept[back] = product.copy(W.detach().mT if back else W.detach())
            if self.spared:
                let_go(_owner(W))
        return kept[back]

    def drop(self) -> None:
        self._state = None, None, {}

    @property
    def made(self) -> tuple[bool, ...]:
        """Which copies there are now: False for the forward's, True for the gradient's."""
        return tuple(self._state[2])

    def __deepcopy__(self, memo: Any) -> Copies:
        return Copies(self.form)  # a copied weight lies in memory

    def __reduce__(self) -> Any:
        return Copies, (self.form,)


def _owner(W: Tensor) -> Tensor:
    """The parameter itself: a transposed view is another object at each call."""
    return W._base if W._base is not None else W


class Formed:
    """What a layer with a form adds to its class. `matmul_copies` is set by `set_matmul`."""

    forms_its_product = True
    weight: Any
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        copies: Copies | None = None if torch.compiler.is_compiling() else self.__dict__.get("matmul_copies")
        product = None if copies is None else _product(copies.form, x, self.weight)
        if product is None or (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)  # type: ignore[misc]
        assert copies is not None
        W, bias = self._matrix(), self.bias
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _FrozenProduct.apply(x, bias, W, copies, product, False)
        return copies.multiply(x, W, bias, product, False)

    def frozen_product(self, x: Tensor) -> Callable[[Tensor, bool], Tensor] | None:
        """(x, False) -> x W^T + b and (g, True) -> g W by this form, without a graph; None where it stands back."""
        copies: Copies | None = self.__dict__.get("matmul_copies")
        product = None if copies is None else _product(copies.form, x, self.weight)
        if copies is None or product is None:
            return None
        W, bias = self._matrix(), self.bias

        def multiply(x: Tensor, back: bool) -> Tensor:
            return copies.multiply(x, W, None if back else bias, product, back)

        return multiply

    def _matrix(self) -> Tensor:
        """The weight as (out, in)."""
        return self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.__dict__["matmul_copies"].drop()  # `.data` may be set, which no version tells
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, matmul={self.__dict__['matmul_copies'].form}"  # type: ignore[misc]


class FormedLinear(Formed, nn.Linear):
    """nn.Linear, multiplied by a form."""


def _product(form: str, x: Tensor, W: Any) -> Product | None:
    """The form's product where it may run for this call, else None.

    Not under a tape, a counter or a transform of torch, which would not see into it; not under autocast, which chooses
    by itself; not for a weight that an adapter made, which is no parameter.
    """
    if not isinstance(W, nn.Parameter) or W.dtype != torch.float32 or x.dtype != torch.float32:
        return None
    if W.is_inference():  # it has no version to tell a change by
        return None
    if type(x) not in (Tensor, nn.Parameter) or x.numel() == 0 or x.device != W.device or W.numel() == 0:
        return None
    watched = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
    if watched or torch._C._functorch.maybe_current_level() is not None:
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    return product_for(form, x.device)


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b, whose gradient to x is the same kind of product with W^T; W has none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, W: Tensor, copies: Copies, product: Product, back: bool
    ) -> Tensor:
        ctx.by = W, W._version, copies, product, back
        return copies.multiply(x, W, bias, product, back)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        W, version, copies, product, back = ctx.by
        if W._version != version:
            raise VeneerError(
                "a frozen weight was changed between a forward and its backward, whose gradient would be another's.",
                next_step="merge, load or write weights before the forward, or after its backward",
            )
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = _FrozenProduct.apply(g, None, W, copies, product, not back)
        if ctx.needs_input_grad[1]:
            to_bias = g.reshape(-1, g.shape[-1]).sum(0)
        return to_x, to_bias, None, None, None, None


_FORMED: dict[type, type] = {nn.Linear: FormedLinear}


def formed_class(plain: type) -> type | None:
    """The class of a layer that multiplies by a form; None for layers that have none."""
    if plain in _FORMED:
        return _FORMED[plain]
    return __getattr__("FormedConv1D") if plain.__name__ == "Conv1D" and _conv1d() is plain else None


def plain_of(formed: type) -> type:
    return next((plain for plain, made in _FORMED.items() if made is formed), formed)


def _conv1d() -> type | None:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        return None
    return Conv1D


def __getattr__(name: str) -> Any:
    """`FormedConv1D` is made when it is first named (by a pickle too): transformers is not needed before."""
    plain = _conv1d() if name == "FormedConv1D" else None
    if plain is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if plain not in _FORMED:

        def matrix(self: Any) -> Tensor:
            return self.weight.t()

        made = type("FormedConv1D", (Formed, plain), {"_matrix": matrix, "__module__": __name__})
        _FORMED[plain] = made
    return _FORMED[plain]
