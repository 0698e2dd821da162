"""Law 13: half precision, moving, copying, pickling and checkpointing change nothing that they should not."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import engine

from .._law import EXACT, Broken, agree, differ, law, same_bits
from .._subject import Subject, clear, gradients

SMALL = 0.05  # spread of the tensors, so that rounding of the base and of the adapter are of one size
FACTOR = 6.0  # times the base's own rounding error


@law(13, "precision")
def precision(s: Subject) -> str:
    """Half-precision bases, `.to()`, deepcopy, pickle and gradient checkpointing change only rounding."""
    notes = [_half(s, dtype) for dtype in (torch.bfloat16, torch.float16)]
    _moved(s)
    _copied(s)
    _pickled(s)
    if s.base.checkpoints:
        _checkpointed(s)
    return ", ".join(notes)


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    a, b = torch.cat(found).double(), torch.cat(exact).double()
    return float((a - b).norm() / b.norm())


def _half(s: Subject, dtype: torch.dtype) -> str:
    """The adapter's rounding error is of the order of the bare base's own."""
    contents = s.base.contents(3)
    exact, half = s.model(), s.model(dtype)
    own = _error(s.evaluated(half, contents, dtype=dtype), s.evaluated(exact, contents))
    s.attach(exact, spread=SMALL)
    adapter = s.attach(half, spread=SMALL)
    if any(p.dtype != torch.float32 for p in adapter.leaves()):
        raise Broken(f"on a {dtype} base the adapter's leaves are {adapter.leaves()[0].dtype}")
    with torch.no_grad():  # the same adapter: starts that read W differ by its rounding
        values = engine.adapters(exact)["a"].named()
        for key, view in adapter.named().items():
            view.copy_(values[key])
    adapter._cached.clear()
    engine.host_of(half)._programs.clear()
    found = s.evaluated(half, contents, dtype=dtype)
    if found[0].dtype != dtype:
        raise Broken(f"on a {dtype} base the output is {found[0].dtype}")
    error = _error(found, s.evaluated(exact, contents))
    if not error <= FACTOR * own:
        raise Broken(
            f"on a {dtype} base the error is {error:.3g}, {error / own:.1f} times the bare base's",
            error,
        )
    with s.training(half):
        torch.stack(s.losses(half, contents, dtype=dtype)).sum().backward()
    if any(p.grad is not None and not p.grad.isfinite().all() for p in adapter.leaves()):
        raise Broken(f"gradients on a {dtype} base are not finite")
    return f"{str(dtype).removeprefix('torch.')} {error / own:.1f}x"


def _moved(s: Subject) -> None:
    """`.to(dtype)` moves the base; the adapter keeps its precision, and comes back as it was."""
    contents = s.base.contents(3)
    model = s.model(torch.float32)
    adapter = s.attach(model, spread=SMALL)
    before = {k: v.clone() for k, v in adapter.named().items()}
    expected = s.evaluated(model, contents, dtype=torch.float32)
    model.to(torch.bfloat16)
    for key, value in adapter.named().items():
        same_bits(value, before[key], f"'{key}' after model.to(bfloat16)")
    s.evaluated(model, contents, dtype=torch.bfloat16)
    model.to(torch.float32)
    error = _error(s.evaluated(model, contents, dtype=torch.float32), expected)
    if not error < 0.2:
        raise Broken(f"after .to(bfloat16) and back the output differs by {error:.3g}", error)


def _copied(s: Subject) -> None:
    contents = s.base.contents(3)
    model = s.model()
    s.attach(model)
    expected = s.evaluated(model, contents)
    other = copy.deepcopy(model)
    same_bits(s.evaluated(other, contents), expected, "a deepcopy's output")
    with torch.no_grad():
        for leaf in engine.adapters(other)["a"].leaves():
            leaf.add_(0.1)
    differ(s.evaluated(other, contents), expected, "changing the tensors of a deepcopy changes nothing in it")
    same_bits(s.evaluated(model, contents), expected, "the output, after its deepcopy was changed")
    engine.detach(other, "a")
    same_bits(s.evaluated(model, contents), expected, "the output, after its deepcopy was stripped")


def _pickled(s: Subject) -> None:
    contents = s.base.contents(3)
    model = s.model()
    s.attach(model)
    expected = s.evaluated(model, contents)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.pt"
        torch.save(model, path)
        other = torch.load(path, weights_only=False)
    if type(other).__name__ != type(model).__name__:
        raise Broken(f"after pickling the class is {type(other).__name__}")
    same_bits(s.evaluated(other, contents), expected, "the output after torch.save(model) and torch.load")
    for name in list(engine.adapters(other)):
        if name != "a":
            continue
        engine.detach(other, name)


def _checkpointed(s: Subject) -> None:
    """Gradients with checkpointing, reentrant or not, equal the plain ones, also in a mixed batch."""
    contents = s.base.contents(4)
    for names in (None, ["a", None, "b", "a"]):
        results = {}
        for variant in ("plain", False, True):
            model = s.model()
            members = [s.attach(model, "a", 1), s.attach(model, "b", 2)]
            engine.activate(model, ["a", "b"] if names else "a")
            if isinstance(variant, bool):
                _switch_on(model, variant)
            for m in members:
                m.generator.manual_seed(5)
                clear(m)
            with s.training(model), engine.rows(model, names if names else "a"):
                torch.stack(s.losses(model, contents)).sum().backward()
            results[variant] = {
                f"{m.name}:{k}": v for m in members[: 2 if names else 1] for k, v in gradients(m).items()
            }
        for variant in (False, True):
            agree(
                results[variant],
                results["plain"],
                f"gradients with checkpointing (use_reentrant={variant}), rows {names}",
                EXACT,
            )


def _switch_on(model: nn.Module, reentrant: bool) -> None:
    m: Any = model
    m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:  # it sees gradients only where an input has one
        m.enable_input_require_grads()
