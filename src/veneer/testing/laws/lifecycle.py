"""Laws 5 and 7: taking an adapter off leaves no trace; saving and loading lose no bit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer import engine

from .._law import Broken, differ, law, same_bits
from .._subject import Subject


@law(5, "detach")
def detach(s: Subject) -> str:
    """Afterwards outputs, `state_dict`, classes, hooks and flags are those of the untouched base."""
    model, contents = s.model(), s.base.contents(3)
    next(iter(model.parameters())).requires_grad_(False)  # flags differ, so that all of them must come back
    bare, before, chance = s.evaluated(model, contents), _photograph(model), torch.get_rng_state()
    s.attach(model, "a", 1)
    s.attach(model, "b", 2)
    differ(s.evaluated(model, contents), bare, "the randomised adapter changes nothing")
    if not torch.equal(torch.get_rng_state(), chance):
        raise Broken("attaching moved torch's global random state")
    same_bits(
        [p for n, p in model.state_dict().items() if not n.startswith("veneer.")],
        list(before["state"].values()),
        "the base's state_dict under adapters",
    )
    with s.training(model):
        torch.stack(s.losses(model, contents)).sum().backward()
    for name in list(engine.adapters(model))[::-1]:
        engine.detach(model, name)
    for part, value in _photograph(model).items():
        _same(part, before[part], value)
    same_bits(s.evaluated(model, contents), bare, "the output after detach")
    return ""


def _photograph(model: nn.Module) -> dict[str, Any]:
    modules = dict(model.named_modules())
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
    )
    return {
        "classes": {n: type(m) for n, m in modules.items()},
        "attributes": {n: sorted(m.__dict__) for n, m in modules.items()},
        "hooks": {n: [len(getattr(m, h, ())) for h in hooks] for n, m in modules.items()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": {n: p.grad is None for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in modules.items()},
        "state": {n: v.clone() for n, v in model.state_dict().items()},
    }


def _same(part: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    if list(before) != list(after):
        raise Broken(f"{part}: names differ after detach: {sorted(set(before) ^ set(after))[:3]}")
    for name, value in before.items():
        now = after[name]
        if not (torch.equal(value, now) if isinstance(value, torch.Tensor) else value == now):
            raise Broken(f"{part} of '{name}' after detach: {_short(now)}, before it was {_short(value)}")


def _short(value: Any) -> str:
    return repr(value)[:80]


@law(7, "save")
def save(s: Subject) -> str:
    """Loading gives the same outputs bit for bit; the folder holds the adapter alone, and its metadata."""
    contents = s.base.contents(3)
    model = s.model()
    s.attach(model, "a", 1)
    expected = s.evaluated(model, contents)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        engine.save(model, "a", folder)
        size = _look(folder, model)
        other = s.model()
        bare = s.evaluated(other, contents)
        if getattr(s.method, "needs_members", False):
            s._members(other, s.method)
        engine.load(other, folder, name="loaded")
        found = s.evaluated(other, contents)
        differ(found, bare, "the loaded adapter changes nothing")
        same_bits(found, expected, "outputs after loading")
        again = Path(place) / "again"
        engine.save(other, "loaded", again)
        files = [(f / "adapter.safetensors").read_bytes() for f in (folder, again)]
        if files[0] != files[1]:
            raise Broken("saving what was loaded gives another file")
    return f"{size} bytes"


def _look(folder: Path, model: nn.Module) -> int:
    """Files, tensors and metadata are those of the adapter."""
    import safetensors.torch

    files = sorted(p.name for p in folder.iterdir())
    if files != ["adapter.safetensors", "veneer.json"]:
        raise Broken(f"the folder holds {files}")
    record = json.loads((folder / "veneer.json").read_text())
    missing = [k for k in ("method", "options", "base", "versions", "seed") if k not in record]
    if missing:
        raise Broken(f"veneer.json does not tell {', '.join(missing)}")
    tensors = safetensors.torch.load_file(str(folder / "adapter.safetensors"))
    adapter = engine.adapters(model)["a"]
    allowed = {e.key for e in adapter.plan.entries}
    if set(tensors) - allowed:
        raise Broken(f"the file holds what no adapter declares: {sorted(set(tensors) - allowed)[:3]}")
    lost = {e.key for e in adapter.plan.entries if e.spec.trained} - set(tensors)
    if lost:
        raise Broken(f"trained tensors are not in the file: {sorted(lost)[:3]}")
    return (folder / "adapter.safetensors").stat().st_size
