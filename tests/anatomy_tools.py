"""Tools of the anatomy tests: a renamer of modules, and an oracle that asks the model itself what a site
does."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from veneer.anatomy import Anatomy, Site


def rename(model: nn.Module, seed: int = 0) -> dict[str, str]:
    """Gives every module a random name, and every class; returns new name -> old name.

    The forward still works: a generated subclass finds a child under its old name. Numbers of lists stay.
    Instances of one class get the same new names, as if the source had been rewritten.
    """
    rng = random.Random(seed)
    before = [name for name, _ in model.named_modules()]
    tables: dict[type, dict[str, str]] = {}

    def word() -> str:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(8))

    modules = [
        m
        for m in model.modules()
        if m._modules and not isinstance(m, nn.ModuleList | nn.Sequential | nn.ModuleDict)
    ]
    for module in modules:
        table = tables.setdefault(type(module), {})
        for key in module._modules:
            table.setdefault(key, word())
    classes = {
        cls: type(word(), (cls,), {k: _alias(k, n) for k, n in table.items()})
        for cls, table in tables.items()
    }
    for module in modules:
        table = tables[type(module)]
        children = {table[key]: child for key, child in module._modules.items()}
        module._modules.clear()
        module._modules.update(children)
        module.__class__ = classes[type(module)]
    return dict(zip([name for name, _ in model.named_modules()], before, strict=True))


def _alias(old: str, new: str) -> property:
    def get(self: nn.Module) -> Any:
        return self._modules[new] if new in self._modules else self.__dict__[old]

    return property(get)


def parameter_of(model: nn.Module, site: Site, which: str = "parameter") -> torch.Tensor | None:
    name = getattr(site, which)
    if not name:
        return None
    module, _, leaf = f"{site.module}.{name}".strip(".").rpartition(".")
    return getattr(model.get_submodule(module), leaf)


def rows(model: nn.Module, site: Site, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes the output rows of a site, and its bias there, in place."""
    weight, bias = parameter_of(model, site), parameter_of(model, site, "bias")
    axis = 0 if site.kind == "conv" else (-1 if site.transposed else -2)
    for start, stop in site.ranges or ((0, site.n_out),):
        part = weight.data.narrow(axis, start, stop - start)
        part.copy_(change(part))
        if bias is not None:
            part = bias.data.narrow(-1, start, stop - start)
            part.copy_(change(part))


def seen_by(model: nn.Module, module: str, arguments: dict[str, Any]) -> torch.Tensor:
    """The first input of a module during a forward."""
    caught: list[torch.Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(
        lambda m, args: caught.append(args[0].detach().clone())
    )
    try:
        with torch.no_grad():
            model(**arguments)
    finally:
        handle.remove()
    return caught[0]


def output(model: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**arguments)
    first = next(iter(out.values())) if isinstance(out, dict) else out
    return first.detach().clone()


def randomise(model: nn.Module) -> None:
    """Weights far from the starting values: biases and norms of ones and zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))


def projections(anatomy: Anatomy, core: str) -> dict[str, Site]:
    """role's last word -> site, of the attention whose core this is."""
    return {
        s.role.rpartition(".")[2]: s
        for s in anatomy.sites
        if dict(s.options).get("core") == core and s.parameter
    }
