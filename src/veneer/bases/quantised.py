"""Quantised linear layers in plain PyTorch: 4-bit NormalFloat with double quantisation, and 8-bit rows.

One idea: whatever has `dense_weight()` and `requantise_(W)` beside `in_features` and `out_features` is a
quantised linear layer; the rest of veneer asks for no more. The forward dequantises and multiplies, and so
does the backward, so that no dense copy outlives a call. That is the storage of QLoRA and LLM.int8 on any
device; the fused kernels, and LLM.int8's rounding of activations, are not here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import BadOption, ShapeDiffers

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own

# The 16 values of NormalFloat 4 (Dettmers et al., 2023, arXiv:2305.14314).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip


def normal_float(bits: int) -> list[float]:
    """The 2^bits values of NormalFloat: quantiles of a normal distribution and zero, scaled to [-1, 1]."""
    quantile = statistics.NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        return [quantile(0.9677083 + (0.5 - 0.9677083) * i / (count - 1)) for i in range(count - 1)]

    values = sorted([*side(2 ** (bits - 1) + 1), 0.0, *(-v for v in side(2 ** (bits - 1)))])
    return [value / values[-1] for value in values]


def dynamic_map() -> list[float]:
    """256 values for scales: seven decades, the larger the denser; with 0 and 1, without -1."""
    found = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)
        means = ((bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        found += [*means, *(-m for m in means)]
    return sorted(found)


class QuantisedLinear(nn.Module):
    """A linear layer whose weight is stored in few bits: x (..., in) -> x W^T + b (..., out).

    `weight` dequantises at every look, for code that asks for its dtype or shape. A layer made of
    transformers' Conv1D holds the transpose, so that `dense_weight()` is (out, in) always.
    """

    form: ClassVar[str]
    STATISTICS: ClassVar[tuple[str, ...]]  # buffers that stay float32 when the module changes its dtype
    like: Tensor

    def __init__(self, W: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.bias = bias
        # It carries the compute dtype and changes with `.to()`, as a weight would.
        self.register_buffer("like", torch.empty(0, dtype=W.dtype, device=W.device), persistent=False)

    def dense_weight(self) -> Tensor:
        """(out, in), in the dtype of computation."""
        raise NotImplementedError

    def requantise_(self, W: Tensor) -> None:
        """Stores another weight, (out, in), with the rounding that comes with it."""
        if tuple(W.shape) != (self.out_features, self.in_features):
            raise ShapeDiffers(
                f"a weight of shape {tuple(W.shape)} does not fit a layer of {self.out_features} outputs and "
                f"{self.in_features} inputs.",
                next_step="a weight of the layer's own shape",
            )
        stored = self._stored(W.detach())
        with torch.no_grad():
            for name, value in stored.items():
                getattr(self, name).copy_(value)

    def _stored(self, W: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        return self.dense_weight()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight: codes and scales, without the bias."""
        names = [n for n in self._buffers if n not in self._non_persistent_buffers_set]
        return sum(b.numel() * b.element_size() for b in (getattr(self, n) for n in names))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler decides itself what it recomputes
            return F.linear(x, self.dense_weight(), self.bias)
        return _FrozenProduct.apply(x, self.bias, self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        exact = {name: self._buffers[name] for name in self.STATISTICS}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = self._buffers[name]
            assert value is not None
            assert moved is not None
            self._buffers[name] = moved if moved.dtype == value.dtype else value.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, form={self.form}"
        )


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b with W dequantised again in the backward, where autograd would keep the dense W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, layer: QuantisedLinear) -> Tensor:
        return F.linear(x, layer.dense_weight(), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layer = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (g,) = gradients
        to_x = g @ ctx.layer.dense_weight() if ctx.needs_input_grad[0] else None
        to_bias = g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None


class NF4Linear(QuantisedLinear):
    """4 bits a weight, and 0.127 for scales: blocks of 64 in row-major order, their scales in 8 bits."""

    form = "nf4"
    STATISTICS = ("scale_of_scales", "offset", "pairs", "map")
    codes: Tensor
    scale_codes: Tensor
    scale_of_scales: Tensor
    offset: Tensor
    pairs: Tensor
    map: Tensor

    def __init__(self, W: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(W, bias)
        table = torch.tensor(NF4)
        # A byte holds two codes, the first in its high half; 256 pairs of values read both at once.
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
        self.register_buffer("pairs", pairs.to(W.device), persistent=False)
        self.register_buffer("map", torch.tensor(dynamic_map(), device=W.device), persistent=False)
        for name, value in self._stored(W.detach()).items():
            self.register_buffer(name, value)

    def _stored(self, W: Tensor) -> dict[str, Tensor]:
        flat = W.float().reshape(-1)
        blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(dim=1).clamp(min=1e-38)
        codes = _nearest((blocks / absmax[:, None]).clamp(-1, 1), self.pairs[:16, 1]).view(-1)[: flat.numel()]
        codes = F.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
        offset = absmax.mean()
        scales = F.pad(absmax - offset, (0, -absmax.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
        scale_of_scales = scales.abs().amax(dim=1).clamp(min=1e-38)
        scale_codes = _nearest(scales / scale_of_scales[:, None], self.map).view(-1)[: absmax.numel()]
        return {
            "codes": (codes[:, 0] << 4 | codes[:, 1])[:, None].contiguous(),
            "scale_codes": scale_codes.contiguous(),
            "scale_of_scales": scale_of_scales,
            "offset": offset,
        }

    def dense_weight(self) -> Tensor:
        count = self.out_features * self.in_features
        values = self.pairs[self.codes[:, 0].int()].view(-1)[:count]
        scales = self.map[self.scale_codes.int()]
        scales = F.pad(scales, (0, -scales.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
        absmax = (scales * self.scale_of_scales[:, None] + self.offset).view(-1)[: self.scale_codes.numel()]
        if count % BLOCK == 0:
            values = (values.view(-1, BLOCK) * absmax[:, None]).view(-1)
        else:
            values = values * absmax.repeat_interleave(BLOCK)[:count]
        return values.view(self.out_features, self.in_features).to(self.like.dtype)


class Int8Linear(QuantisedLinear):
    """8 bits a weight and one float32 scale a row: W[o] = codes[o] * row_max[o] / 127 (arXiv:2208.07339)."""

    form = "int8"
    STATISTICS = ("row_max",)
    codes: Tensor
    row_max: Tensor

    def __init__(self, W: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(W, bias)
        for name, value in self._stored(W.detach()).items():
            self.register_buffer(name, value)

    def _stored(self, W: Tensor) -> dict[str, Tensor]:
        W = W.float()
        row_max = W.abs().amax(dim=1)
        codes = torch.round(127 * W / row_max.clamp(min=1e-38)[:, None]).to(torch.int8)
        return {"codes": codes, "row_max": row_max}

    def dense_weight(self) -> Tensor:
        return (self.codes.float() * (self.row_max / 127)[:, None]).to(self.like.dtype)


FORMS: dict[str, type[QuantisedLinear]] = {"nf4": NF4Linear, "int8": Int8Linear}


def quantise_model(model: nn.Module, form: str = "nf4", skip: Iterable[str] = ()) -> list[str]:
    """Replaces the linear layers of `model` in place by their quantised form; returns their names.

    Left in full precision: modules in `skip` (a name, the last part of one, or all below it), the layer that
    gives the logits of a language model, layers whose weight other modules share, and subclasses of nn.Linear
    that compute something of their own. Raises BadOption.
    """
    if form not in FORMS:
        raise BadOption(
            f"{form!r} is not a quantised form that veneer knows.",
            nearest=list(FORMS),
            next_step="form='nf4' or form='int8'",
        )
    skip = set(skip)
    kept = {id(m) for m in (_output_layer(model),) if m is not None} | _with_shared_weights(model)
    made: dict[int, QuantisedLinear] = {}
    names: list[str] = []
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):  # named_children leaves out second names
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if child is None or id(child) in kept or not _is_linear(child) or _is_skipped(name, skip):
                continue
            if id(child) not in made:  # one module in two places becomes one module
                made[id(child)] = quantised_linear(child, form)
            setattr(parent, child_name, made[id(child)])
            names.append(name)
    if not names:
        raise BadOption(
            f"{type(model).__name__} has no linear layer to quantise (skip: {sorted(skip)}).",
            next_step="quantise=None: there is nothing that would get smaller",
        )
    return names


def quantised_linear(layer: nn.Module, form: str = "nf4") -> QuantisedLinear:
    """The quantised form of an nn.Linear, or of transformers' Conv1D, whose weight is (in, out)."""
    W, bias = layer.weight, layer.bias
    assert isinstance(W, Tensor)
    assert bias is None or isinstance(bias, nn.Parameter)
    made = FORMS[form](W.detach() if isinstance(layer, nn.Linear) else W.detach().T.contiguous(), bias)
    return made.train(layer.training)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module follows the protocol of a quantised linear layer."""
    return callable(getattr(module, "dense_weight", None)) and callable(getattr(module, "requantise_", None))


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """uint8 indexes of the nearest entries of a sorted table; a value on a midpoint takes the lower one."""
    midpoints = (table[1:] + table[:-1]) / 2
    return torch.bucketize(values, midpoints).to(torch.uint8)


def _is_linear(module: nn.Module) -> bool:
    of_attention = nn.modules.linear.NonDynamicallyQuantizableLinear  # the output of nn.MultiheadAttention
    plain = type(module) in (nn.Linear, of_attention)
    return plain or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _is_skipped(name: str, skip: set[str]) -> bool:
    parts = name.split(".")
    return parts[-1] in skip or any(".".join(parts[: i + 1]) in skip for i in range(len(parts)))


def _output_layer(model: nn.Module) -> nn.Module | None:
    try:
        found = getattr(model, "get_output_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _with_shared_weights(model: nn.Module) -> set[int]:
    """Modules whose weight is a parameter of another module too."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    return {module for several in owners.values() if len(several) > 1 for module in several}
