"""Law 13: half precision, moving, copying, pickling and checkpointing change nothing that they should not."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import engine
from veneer.errors import Unsupported

from .._law import EXACT, Broken, agree, differ, law, same_bits
from .._subject import Subject, clear, gradients, randomise

SMALL = 0.05  # spread of the tensors, so that rounding of the base and of the adapter are of one size
FACTOR = 6.0  # times the base's own rounding error


@law(13, "precision")
def precision(s: Subject) -> str:
    """Half-precision bases, `.to()`, deepcopy, pickle and gradient checkpointing change only rounding."""
    parts: list[Any] = [
        functools.partial(_half, s, torch.bfloat16),
        functools.partial(_half, s, torch.float16),
    ]
    parts += [functools.partial(part, s) for part in (_moved, _copied, _pickled)]
    if s.base.checkpoints:
        parts.append(functools.partial(_checkpointed, s))
    notes, broken = [], []
    for part in parts:  # one that fails hides no other
        try:
            notes.append(part() or "")
        except Exception as e:
            said = (
                e if isinstance(e, Broken) else Broken(f"{part.func.__name__[1:]}: {type(e).__name__}: {e}")
            )
            broken.append(said)
    if broken:
        raise Broken("; ".join(str(e) for e in broken), broken[0].value)
    return ", ".join(n for n in notes if n)


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    a, b = torch.cat(found).double(), torch.cat(exact).double()
    return float((a - b).norm() / b.norm())


def _half(s: Subject, dtype: torch.dtype) -> str:
    """The adapter's rounding error is of the order of the bare base's own."""
    contents = s.base.contents(3)
    exact, half = s.model(), s.model(dtype)
    own = _error(s.evaluated(half, contents, dtype=dtype), s.evaluated(exact, contents))
    # The same adapter, since starts that read W or data differ by the base's rounding.
    adapter = s.attach(half, like=s.attach(exact, spread=SMALL))
    if any(p.dtype != torch.float32 for p in adapter.leaves()):
        raise Broken(f"on a {dtype} base the adapter's leaves are {adapter.leaves()[0].dtype}")
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
    contents = s.base.contents(4)
    model, names = _pair(s)
    expected, mixed = _whole_and_rows(s, model, names, contents)
    other = copy.deepcopy(model)
    found, rows = _whole_and_rows(s, other, names, contents)
    same_bits(found, expected, "a deepcopy's output")
    same_bits(rows, mixed, "a deepcopy's output for a mixed batch")
    randomise(engine.adapters(other)["a"], seed=9)
    differ(
        _whole_and_rows(s, other, names, contents)[0], expected, "new tensors change nothing in a deepcopy"
    )
    same_bits(
        _whole_and_rows(s, model, names, contents)[0], expected, "the output, after its deepcopy was changed"
    )
    _strip(other)
    same_bits(
        _whole_and_rows(s, model, names, contents)[1], mixed, "the output, after its deepcopy was stripped"
    )


def _pickled(s: Subject) -> None:
    contents = s.base.contents(4)
    model, names = _pair(s)
    expected, mixed = _whole_and_rows(s, model, names, contents)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.pt"
        torch.save(model, path)
        other = torch.load(path, weights_only=False)
    if type(other).__name__ != type(model).__name__:
        raise Broken(f"after pickling the class is {type(other).__name__}")
    found, rows = _whole_and_rows(s, other, names, contents)
    same_bits(found, expected, "the output after torch.save(model) and torch.load")
    same_bits(rows, mixed, "the output for a mixed batch after torch.save(model) and torch.load")
    _strip(other)


def _pair(s: Subject) -> tuple[nn.Module, list[Any]]:
    model = s.model()
    s.attach(model, "b", 2)
    s.attach(model, "a", 1)
    return model, ["a", None, "b", "a"]


def _whole_and_rows(s: Subject, model: nn.Module, names: list[Any], contents: Any) -> tuple[Any, Any]:
    """Outputs of 'a' for the whole batch, and of a name a row, logits alone: states set hooks on some bases,
    which no pickle holds."""
    engine.activate(model, "a")
    whole = s.evaluated(model, contents, states=False)
    try:
        with engine.rows(model, names):
            return whole, s.evaluated(model, contents, states=False)
    except Unsupported:  # some of its sites have no rows to tell apart; the law of rows says so
        return whole, []


def _strip(model: nn.Module) -> None:
    """Take all adapters off, those that combine others first."""
    for name in list(engine.adapters(model))[::-1]:
        engine.detach(model, name)


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
            try:
                with s.training(model), engine.rows(model, names if names else "a"):
                    torch.stack(s.losses(model, contents)).sum().backward()
            except Unsupported:
                if names:
                    return
                raise
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
