"""The frozen matmul as a form of the base: plain float32, prepacked float32, bfloat16 or int8 products.

One idea: an adapter's own products are small, and those of the frozen weights are nearly all of a step. So the frozen
linear layers are told how to multiply, forward and back to the input, and every method inherits it. `weight` stays what
it was, in float32: what merges, saves, or takes a norm of it reads the true one. `plain` is exact, and is what to
compare bits with; of the others the error is measured (`matmul_errors`) on the batch that it is used for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.bases._matmul_layers import Copies, Formed, formed_class, plain_of
from veneer.bases._matmul_products import FORMS, product_for, why_plain
from veneer.bases._spared import into_file, into_memory
from veneer.engine import plain_class, rebase
from veneer.errors import BadOption, nearest

LOGITS_BY = {"int8": "bf16"}  # the layer that gives logits: rounding them costs words, and it is one layer


@dataclass
class Matmul:
    """What runs: the form asked for, and by product the number of layers. Prints as the line that says so.

    copies: bytes kept beside the weights, for inference and, with the transposed copies, for training.
    """

    form: str
    layers: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    copies: int = 0
    copies_in_training: int = 0
    on_disk: int = 0  # bytes of weights that lie in a mapped file

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.form == "plain":
            return "matmul: plain float32"
        parts = [f"{count} linear layers {words}" for words, count in self.layers.items()]
        kept = f"; {self.copies / 2**20:.1f} MiB beside the weights, {self.copies_in_training / 2**20:.1f} in training"
        return f"matmul={self.form}: {', '.join(parts)}" + (
            f" ({self.reason})" if self.reason else kept if self.copies else ""
        )


@dataclass
class MatmulErrors:
    """How far a form is from plain float32 on a batch: norm of the difference over the norm, each."""

    form: str
    output: float
    gradient: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        gradient = "" if self.gradient is None else f", the gradient of what trains by {self.gradient:.1e}"
        return f"on the first batch matmul={self.form} changes the output by {self.output:.1e} of its size{gradient}"


def check_form(form: str | None) -> str:
    """The form by its name; None is plain. Raises BadOption."""
    form = "plain" if form is None else form
    if form not in FORMS:
        raise BadOption(
            f"matmul={form!r} is not a form of the frozen matmul.",
            nearest=nearest(str(form), FORMS) or FORMS,
            next_step=f"one of {', '.join(FORMS)}",
        )
    return form


def set_matmul(model: nn.Module, form: str | None, *, weights: str = "memory") -> Matmul:
    """Tell the linear layers of an open base, with or without adapters, how they multiply; in place.

    Taken are nn.Linear and transformers' Conv1D with float32 weights; a weight that trains, or that an adapter puts in
    place of the frozen one, is multiplied plainly at each call. Where a form cannot run, the plain one does, and the
    result says why. weights="disk": on the CPU, the float32 weights of these layers lie in a mapped file from now on:
    whoever reads one (a merge, a norm, a file) reads it from there, and memory holds the form's copies alone;
    "memory" brings them back. Raises BadOption for a name that there is not, and for a base whose linear layers are
    quantised.
    """
    form = check_form(form)
    if weights not in ("memory", "disk"):
        raise BadOption(
            f"set_matmul: weights={weights!r} is no place for weights.",
            nearest=("memory", "disk"),
            next_step="weights='disk', or leave it out",
        )
    _refuse_quantised(model, form)
    logits = _logits_layer(model)
    for module in dict.fromkeys(model.modules()):
        plain = plain_of(plain_class(module))
        made = formed_class(plain)
        if made is None:
            continue
        module.__dict__.pop("matmul_copies", None)
        W: Any = module.weight
        runs = form != "plain" and W.dtype == torch.float32 and product_for(form, W.device) is not None
        spared = weights == "disk" and runs and into_file(W)
        if not spared:
            into_memory(W)
        if form == "plain":
            if plain_class(module) is not plain:
                rebase(module, plain)
            continue
        module.__dict__["matmul_copies"] = Copies(
            LOGITS_BY.get(form, form) if module is logits else form, spared
        )
        if plain_class(module) is not made:
            rebase(module, made)
    return matmul_of(model, form)


def matmul_of(model: nn.Module, form: str | None = None) -> Matmul:
    """What the linear layers of a model multiply by now."""
    found = Matmul(form or "plain")
    layers: list[Any] = [m for m in dict.fromkeys(model.modules()) if isinstance(m, Formed)]
    if not layers:
        if form not in (None, "plain"):
            found.layers, found.reason = (
                {"plain": 0},
                f"{type(model).__name__} has no linear layer of its own",
            )
        return found
    found.form = form or next(iter(_forms_of(layers)))
    for layer in layers:
        W: Tensor = layer.weight
        copies: Copies = layer.__dict__["matmul_copies"]
        product = product_for(copies.form, W.device) if W.dtype == torch.float32 else None
        words = "plain" if product is None else product.words
        found.layers[words] = found.layers.get(words, 0) + 1
        if product is None:
            found.reason = (
                why_plain(copies.form, W.device) or f"weights of {_short(W.dtype)} multiply as they are"
            )
            continue
        rows, columns = layer._matrix().shape
        found.on_disk += W.nbytes if copies.spared else 0
        found.copies += product.bytes_of(W.numel(), rows)
        found.copies_in_training += product.bytes_of(W.numel(), rows) + product.bytes_of(W.numel(), columns)
    return found


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Inside of the block every layer multiplies in plain float32; the copies of a form stay."""
    held = [(m, m.__dict__.pop("matmul_copies")) for m in model.modules() if "matmul_copies" in m.__dict__]
    try:
        yield
    finally:
        for module, copies in held:
            module.__dict__["matmul_copies"] = copies


def matmul_errors(
    model: nn.Module, run: Callable[[], Any], trained: Sequence[Tensor] | None = None
) -> MatmulErrors:
    """The error of the form that `model` has, against plain float32, on what `run` computes.

    run: a forward on the user's own batch: what it returns is compared (a tensor, or an output that has `logits`,
    `last_hidden_state` or `loss`). trained: tensors whose gradients of a scalar output, or of an output's `loss`, are
    compared too; `.grad` is left as it was. Random draws are the same in both.
    """
    with plainly(model):
        expected, expected_slopes = _computed(run, trained)
    got, slopes = _computed(run, trained)
    gradient = None if slopes is None or expected_slopes is None else _apart(slopes, expected_slopes)
    return MatmulErrors(matmul_of(model).form, _apart([got], [expected]), gradient)


def _computed(run: Callable[[], Any], trained: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor] | None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.set_grad_enabled(trained is not None):
        output = run()
        shown = shown_of(output)
        loss = output if isinstance(output, Tensor) and output.dim() == 0 else getattr(output, "loss", None)
        if trained is None or loss is None:
            return shown.detach(), None
        slopes = torch.autograd.grad(loss, list(trained), allow_unused=True)
    return shown.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(trained, slopes)]


def shown_of(output: Any) -> Tensor:
    """The tensor of a model's output that a person would compare: logits, else the last hidden state, else the loss."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "loss"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    return output[0]


def _apart(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The norm of all differences over the norm of what was expected."""
    apart = sum(float((a.double() - b.double()).pow(2).sum()) for a, b in zip(got, expected))
    size = sum(float(b.double().pow(2).sum()) for b in expected)
    return (apart / size) ** 0.5 if size > 0 else float(apart > 0)


def _refuse_quantised(model: nn.Module, form: str) -> None:
    if form != "plain" and any(callable(getattr(m, "requantise_", None)) for m in model.modules()):
        raise BadOption(
            f"matmul={form!r} is about float32 weights, and this base is quantised.",
            next_step="quantise= or matmul=, one of them",
        )


def _logits_layer(model: nn.Module) -> nn.Module | None:
    try:
        return getattr(model, "get_output_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):
        return None


def _forms_of(layers: Sequence[Any]) -> list[str]:
    """Forms of some layers, the commonest first."""
    forms = [layer.__dict__["matmul_copies"].form for layer in layers]
    return sorted(set(forms), key=lambda f: -forms.count(f))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = [
    "FORMS",
    "Matmul",
    "MatmulErrors",
    "check_form",
    "matmul_errors",
    "matmul_of",
    "plainly",
    "set_matmul",
    "shown_of",
]
