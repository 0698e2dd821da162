"""What settled edits made, kept: the W' (or the change of W) of an adapter that nobody trains.

The one idea: a value is a pure function of the adapter's tensors and of the base's weight, so it holds as long as
those are the very same tensors at the same version. Values are let go of when a tensor changes, when training begins,
when their adapter leaves, and beyond a budget of bytes, those used longest ago first.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Key = tuple[str, int, str]  # the adapter's name, the site plan, what is kept of it


class Stamp:
    """Which tensors a value was made of, and their versions.

    Weak references to the storages keep an address from being used again by others while the stamp lives.
    """

    __slots__ = ("facts", "held")

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.facts = facts_of(tensors)
        self.held = [StorageWeakRef(t.untyped_storage()) for t in tensors]


def facts_of(tensors: Iterable[Tensor]) -> tuple[Any, ...] | None:
    """(storage, place in it, version) of each; None where torch counts no versions (inference tensors)."""
    found = []
    for t in tensors:
        if t.is_inference():
            return None
        found.append((t.untyped_storage()._cdata, t.data_ptr(), t._version))
    return tuple(found)


@dataclass
class _Entry:
    t: Any  # a weak reference to the tensors as the edit received them
    stamp: Stamp
    value: Tensor
    size: int


class Kept:
    """Values by key, under a budget of bytes. `limit` None: as many bytes as the base's own tensors have."""

    def __init__(self, base_bytes: Callable[[], int], limit: int | None = None) -> None:
        self._base_bytes, self._limit = base_bytes, limit
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    @property
    def limit(self) -> int:
        if self._limit is None:
            self._limit = self._base_bytes()
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._limit = limit
        with self._lock:
            while self._entries and self.bytes > self.limit:
                self._remove(next(iter(self._entries)))

    def get(self, key: Key, t: Any, sources: list[Tensor]) -> Tensor | None:
        """The kept value, if `t` and the tensors that it was made of are what they were."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            if entry.t() is not t or entry.stamp.facts != facts_of(sources):
                self._remove(key)
                return None
            self._entries.move_to_end(key)
            return entry.value

    def put(self, key: Key, t: Any, sources: list[Tensor], value: Tensor, using: set[str]) -> None:
        """Keep `value`, where it fits. What adapters of this very call made is not let go of for it: one pass
        that needs more than the budget would otherwise keep nothing for the next."""
        stamp, size = Stamp(sources), value.numel() * value.element_size()
        made_of = {t.untyped_storage()._cdata for t in sources}
        if stamp.facts is None or value.untyped_storage()._cdata in made_of or size > self.limit:
            return
        with self._lock:
            if key in self._entries:
                self._remove(key)
            others = [k for k in self._entries if k[0] not in using]
            while self.bytes + size > self.limit and others:
                self._remove(others.pop(0))
            if self.bytes + size <= self.limit:
                self._entries[key] = _Entry(weakref.ref(t), stamp, value, size)
                self.bytes += size

    def drop(self, name: str | None = None) -> None:
        """Let go of what one adapter's edits made, or of everything."""
        with self._lock:
            for key in [k for k in self._entries if name is None or k[0] == name]:
                self._remove(key)

    def _remove(self, key: Key) -> None:
        self.bytes -= self._entries.pop(key).size

    def __len__(self) -> int:
        return len(self._entries)


def sources_of(module: nn.Module, parameter: str) -> list[Tensor]:
    """The stored tensors that a parameter is read from: itself, or those that it is computed from."""
    owner: Any = module
    *path, last = parameter.split(".")
    for step in path:
        owner = getattr(owner, step)
    own = owner._parameters.get(last)
    if own is None:
        own = owner._buffers.get(last)
    return [own] if own is not None else [*owner.parameters(), *owner.buffers()]


def may_keep(op: Any) -> bool:
    """Whether nothing is being trained, drawn or traced, and the edit depends on no row."""
    if torch.is_grad_enabled() or not op.still or op.rowed or op.live is not None or op.adapter.training:
        return False
    if "at" in op.method.arguments.get("derive", ()):
        return False
    level = getattr(torch._C._functorch, "maybe_current_level", None)
    return level is None or level() is None
