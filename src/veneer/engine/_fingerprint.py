"""What tells one base from another: names and shapes of its parameters, and a sample of its values.

The one idea: names and shapes are written down once, but values are read at every call. Fused optimisers and writes to
`.data` change them without a trace in torch's version counters, so that nothing says when a sample is stale; all of the
samples are a single tensor, which costs little beside loading an adapter.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from veneer.anatomy import Anatomy

from ._plan import Plan

SAMPLE = 8  # values of a parameter, evenly spaced
# base -> (names within their modules, shapes) -> digest of them
_SHAPES: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def fingerprint(found: Anatomy, root: nn.Module, plan: Plan | None = None) -> dict[str, Any]:
    """The base's class, and digests of shapes and of values.

    Values that the plan trains whole are left out: a head that no file filled is another one at every opening.
    """
    names, tensors = _parts(root)
    now = names, [p.shape for p in tensors]
    known = _SHAPES.get(root)
    if known is None or known[0] != now:
        known = _SHAPES[root] = now, _shapes(root)
    whole = [s.site for s in plan.sites if s.part < 0] if plan is not None else []
    left_out = {id(root.get_submodule(s.module)._parameters.get(s.parameter)) for s in whole}
    values = hashlib.sha256(_sampled([p for p in tensors if id(p) not in left_out]))
    return {"class": type(root).__name__, "shapes": known[1], "values": values.hexdigest()[:32]}


def _parts(root: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Names within their modules, and parameters in the order of `named_parameters`, of the base alone: adapters on it
    are not walked, however many."""
    names: list[str] = []
    tensors: dict[int, Tensor] = {}
    seen: set[int] = set()

    def walk(module: nn.Module) -> None:
        seen.add(id(module))
        own, children = module.__dict__["_parameters"], module.__dict__["_modules"]
        names.extend(own)
        names.extend(children)
        tensors.update((id(p), p) for p in own.values() if p is not None and id(p) not in tensors)
        for name, child in children.items():
            if child is not None and id(child) not in seen and (name != "veneer" or module is not root):
                walk(child)

    walk(root)
    return [n for n in names if n != "veneer"], list(tensors.values())


def _shapes(root: nn.Module) -> str:
    found = hashlib.sha256()
    for name, p in root.named_parameters():
        if not name.startswith("veneer."):
            found.update(f"{name}:{tuple(p.shape)};".encode())
    return found.hexdigest()[:32]


@torch.no_grad()
def _sampled(tensors: list[Tensor]) -> bytes:
    """The samples of all parameters, float32, one after the other."""
    pieces: list[Tensor] = []
    for p in tensors:
        size = p.numel()
        step = max(1, size // SAMPLE)
        count = min(SAMPLE, -(-size // step))
        if type(p) is nn.Parameter and p.is_contiguous():
            piece = p.as_strided((count,), (step,), p.storage_offset())
        else:
            piece = p.detach().reshape(-1)[::step][:SAMPLE]
        pieces.append(piece)
    if len({(p.device, p.dtype) for p in pieces}) == 1:
        return torch.cat(pieces).float().cpu().numpy().tobytes()
    return b"".join(p.float().cpu().numpy().tobytes() for p in pieces)


__all__ = ["fingerprint"]
