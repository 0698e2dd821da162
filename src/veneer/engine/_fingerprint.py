"""What tells one base from another: names and shapes of its parameters, and a sample of its values.

The one idea: reading a base's values costs more than loading an adapter, so what was read is kept while every parameter
is the same tensor at the same version.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

from torch import Tensor, nn

from veneer.anatomy import Anatomy

from ._kept import Stamp, facts_of
from ._plan import Plan

# base -> parameters left out -> (what it is made of, what holds that, what was read)
_READ: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, Stamp, dict[str, Any]]]] = (
    weakref.WeakKeyDictionary()
)


def fingerprint(found: Anatomy, root: nn.Module, plan: Plan | None = None) -> dict[str, Any]:
    """The base's class, and digests of shapes and of values.

    Values that the plan trains whole are left out: a head that no file filled is another one at every opening.
    """
    own = frozenset((s.site.module, s.site.parameter) for s in (plan.sites if plan else ()) if s.part < 0)
    kept = _READ.setdefault(root, {})
    names, tensors = _parts(root)
    now = _facts(tensors)
    known = kept.get(own)
    if known is not None and now is not None and known[0] == (names, now):
        return dict(known[2])
    made = {"class": type(root).__name__, **_digests(root, own)}
    if now is not None:
        kept[own] = (names, now), Stamp(tensors), made
    return dict(made)


def _parts(root: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Names within their modules, and parameters, of the base alone: adapters on it are not walked, however many."""
    names: list[str] = []
    tensors: list[Tensor] = []
    stack = [root]
    while stack:
        module = stack.pop()
        own, children = module.__dict__["_parameters"], module.__dict__["_modules"]
        names += own
        names += children
        tensors += [p for p in own.values() if p is not None]
        stack += [m for n, m in children.items() if m is not None and (n != "veneer" or module is not root)]
    return [n for n in names if n != "veneer"], tensors


def _facts(tensors: list[Tensor]) -> tuple[Any, ...] | None:
    """Storages, shapes and versions; None for tensors that have none of their own."""
    try:
        found = facts_of(tensors)
    except (NotImplementedError, RuntimeError):
        return None
    return None if found is None else (found, [p.shape for p in tensors])


def _digests(root: nn.Module, own: frozenset[tuple[str, str]]) -> dict[str, str]:
    shapes = hashlib.sha256()
    values = hashlib.sha256()
    for name, p in root.named_parameters():
        if name.startswith("veneer."):
            continue
        shapes.update(f"{name}:{tuple(p.shape)};".encode())
        if name.rpartition(".")[::2] in own:
            continue
        flat = p.detach().reshape(-1)
        step = max(1, flat.numel() // 8)
        values.update(flat[::step][:8].float().cpu().numpy().tobytes())
    return {"shapes": shapes.hexdigest()[:32], "values": values.hexdigest()[:32]}


__all__ = ["fingerprint"]
