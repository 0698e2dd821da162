"""The products of a frozen matrix: what each form keeps of it, and how it multiplies with that.

One idea: a form is a copy of a matrix M (n, k) beside the weight, and a product x -> x M^T with that copy. Forward
takes M = W, the gradient of the input M = W^T; the weight itself gets no gradient, so no third product is needed.

Some of the operators are private to torch. Each form is tried once on a small matrix of the device and compared with
`F.linear`; one that fails there, or gives other numbers, is not used, and why is kept for whoever asks.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("plain", "packed", "bf16", "int8")


class Product:
    """One way to multiply with a frozen matrix. words: what runs. tolerance: relative error that the trial allows."""

    words: str
    tolerance: float

    def copy(self, matrix: Tensor) -> Any:
        """What is kept of M (n, k), any strides."""
        raise NotImplementedError

    def product(self, x: Tensor, kept: Any, bias: Tensor | None) -> Tensor:
        """x (..., k) float32 -> x M^T + b, (..., n) float32: a new tensor, no view, which an adapter may add to."""
        raise NotImplementedError

    def bytes_of(self, entries: int, outputs: int) -> int:
        """Bytes of one copy of a matrix with so many entries and output features."""
        raise NotImplementedError


class Packed(Product):
    """float32, laid out once as oneDNN's kernel reads it, where the plain call lays it out each time."""

    words, tolerance = "float32, prepacked by oneDNN", 1e-5

    def copy(self, matrix: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), None)

    def product(self, x: Tensor, kept: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x, kept, bias, "none", [], "")
        return torch.ops.aten._unsafe_view(y, y.shape)  # the operator returns a view of what it made

    def bytes_of(self, entries: int, outputs: int) -> int:
        return 4 * entries


class PackedBfloat16(Product):
    """bfloat16 products summed in float32, in a float32 stream: the input is rounded, the bias is not."""

    words, tolerance = "bfloat16, prepacked by oneDNN, in a float32 stream", 2e-2

    def copy(self, matrix: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(matrix.to(torch.bfloat16).contiguous(), None)

    def product(self, x: Tensor, kept: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise(ROUNDED.of(x, _to_bfloat16), kept, None, "none", [], "")
        return y.float() if bias is None else y + bias  # the sum is float32, as the bias is

    def bytes_of(self, entries: int, outputs: int) -> int:
        return 2 * entries


class Bfloat16(PackedBfloat16):
    """The same without packing: on CUDA, and where torch has lost the private operators."""

    words = "bfloat16, in a float32 stream"

    def copy(self, matrix: Tensor) -> Tensor:
        return matrix.to(torch.bfloat16).contiguous()

    def product(self, x: Tensor, kept: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(ROUNDED.of(x, _to_bfloat16), kept)
        return y.float() if bias is None else y + bias


class Int8(Product):
    """Integers of 8 bits with a scale a row of x and a scale a row of M, summed in 32 bits.

    The scale of x is its row's largest entry in this call. One outlier in a row coarsens that row alone.
    """

    words, tolerance = "int8 by row and channel", 3e-2

    def copy(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = _rounded(matrix.float())
        return codes.contiguous().t(), scale.squeeze(-1)

    def product(self, x: Tensor, kept: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        weight, weight_scale = kept
        codes, scale = ROUNDED.of(x, _rounded)
        y = _int_mm(codes.reshape(-1, codes.shape[-1]), weight).to(torch.float32)
        y = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])).mul_(scale)
        if bias is None:
            return y.mul_(weight_scale)
        with torch.no_grad():  # a bias that trains has its gradient from the node around this
            return torch.addcmul(bias, y, weight_scale, out=y)

    def bytes_of(self, entries: int, outputs: int) -> int:
        return entries + 4 * outputs


class Rounded(threading.local):
    """The last input as it was rounded, while it lives: query, key and value read one, and so do gate and up."""

    def __init__(self) -> None:
        self.kept: tuple[Any, int, Any, Any] = (None, 0, None, None)

    def of(self, x: Tensor, how: Callable[[Tensor], Any]) -> Any:
        if x.is_inference():  # it has no version to tell a change by
            return how(x)
        owner, version, by, value = self.kept
        if owner is not None and owner() is x and version == x._version and by is how:
            return value
        with torch.no_grad():
            value = how(x)
        self.kept = weakref.ref(x, self._forget), x._version, how, value
        return value

    def _forget(self, owner: Any) -> None:
        if self.kept[0] is owner:
            self.kept = (None, 0, None, None)


ROUNDED = Rounded()


def _to_bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 codes, scale a row): symmetric, so that zero stays zero. What is not finite stays so in the scale."""
    room = x.abs()
    scale = room.amax(-1, keepdim=True).div_(127)
    torch.div(x, scale.clamp(min=1e-30), out=room)
    return room.round_().to(torch.int8), scale


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """(rows, k) x (k, n) -> (rows, n) int32. CUDA's kernel takes no fewer than 17 rows."""
    rows = x.shape[0]
    if x.is_cuda and rows < 17:
        return torch._int_mm(F.pad(x, (0, 0, 0, 17 - rows)), weight)[:rows]
    return torch._int_mm(x, weight)


CHOICES: dict[str, tuple[Product, ...]] = {
    "packed": (Packed(),),
    "bf16": (PackedBfloat16(), Bfloat16()),
    "int8": (Int8(),),
}


def product_for(form: str, device: torch.device) -> Product | None:
    """The first product of a form that works on the device; None: the plain one."""
    return _found(form, device.type)[0]


def why_plain(form: str, device: torch.device) -> str:
    """Why the plain product runs in place of a form's; empty where it does not."""
    return _found(form, device.type)[1]


@functools.cache
def _found(form: str, device: str) -> tuple[Product | None, str]:
    if device not in ("cpu", "cuda"):
        return None, f"there is no {form} product for the device {device}"
    if form == "packed" and device == "cuda":
        return None, "CUDA's libraries need no packing"
    reason = ""
    for product in CHOICES[form]:
        reason = _refused(product, device)
        if not reason:
            return product, ""
    return None, reason


def _refused(product: Product, device: str) -> str:
    """Why a product cannot be used on a device; empty where its numbers are right."""
    if device == "cpu" and isinstance(product, PackedBfloat16) and not _has_bfloat16():
        return "this processor has no bfloat16 products, and without them the form would be slower"
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(rows, 64, generator=generator).to(device) for rows in (24, 32))
    bias = torch.randn(32, generator=generator).to(device)
    expected = F.linear(x, W, bias)
    try:
        with torch.no_grad():
            for part, wanted in ((x.view(4, 6, -1), expected.view(4, 6, -1)), (x[:1], expected[:1])):
                got = product.product(part, product.copy(W), bias)
                error = float((got - wanted).norm() / wanted.norm()) if got.shape == wanted.shape else 1.0
                if got.dtype != torch.float32 or not error <= product.tolerance:
                    return f"the product of this torch ({torch.__version__}) is off by {error:.1e}"
    except (AttributeError, RuntimeError, NotImplementedError, TypeError) as error:
        return f"this torch ({torch.__version__}) does not compute it: {str(error).splitlines()[0][:120]}"
    return ""


def _has_bfloat16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False
