"""Adapters beyond a budget of bytes leave the model's device, those used longest ago first, and come back when used.

Below the device lies CPU memory, and below that a memory-mapped safetensors file. The one idea: an adapter's tensors
keep their identity and only their data moves, so that whoever reads an adapter that is out (to save it, say) reads
right values all the same, and a call that is under way keeps the data that it began with.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._adapter import Adapter

DEVICE, CPU, DISK = "device", "cpu", "disk"


class Pages:
    """Where the tensors of each adapter are. `limit`: bytes on the device, None for no limit; `cpu_limit`: of those
    that left it, before the rest goes to files under `folder`."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.limit: int | None = None
        self.cpu_limit: int | None = 0
        self.folder: Path | None = None
        self._own_folder: tempfile.TemporaryDirectory[str] | None = None
        self._order: OrderedDict[str, int] = OrderedDict()  # name -> bytes; used longest ago first
        self._pins: Counter[str] = Counter()
        self._out: dict[str, tuple[str, tuple[int, ...]]] = {}  # name -> where, and the addresses put there
        self._files: dict[str, Path] = {}
        weakref.finalize(self, _unlink, self._files, os.getpid())

    # -- what is where ------------------------------------------------------------------------------------------

    def where(self, name: str) -> str:
        """Where an adapter's tensors are: on the device, in CPU memory, or in a file."""
        found = self._out.get(name)
        if found is None:
            return DEVICE
        if found[1] != _addresses(self.host.adapter(name)):  # someone gave it other data since
            del self._out[name]
            return DEVICE
        return found[0]

    def bytes_at(self, where: str) -> int:
        return sum(size for n, size in self._order.items() if self.where(n) == where)

    def track(self, adapter: Adapter) -> None:
        """Know a new adapter, as the one used last."""
        self._order.pop(adapter.name, None)
        self._order[adapter.name] = sum(t.numel() * t.element_size() for _, t in _tensors(adapter))
        if self.limit is not None:
            self.shrink({adapter.name})

    def forget(self, name: str) -> None:
        """An adapter left: so does its file."""
        self._order.pop(name, None)
        self._out.pop(name, None)
        path = self._files.pop(name, None)
        if path is not None:
            path.unlink(missing_ok=True)  # a mapping that still reads it keeps its pages

    # -- moving -------------------------------------------------------------------------------------------------

    def use(self, adapters: Iterable[Adapter]) -> None:
        """Bring these to the device, and send others away for them."""
        if self.limit is None:
            return
        present = self.host.adapters()
        mine = [a for a in adapters if present.get(a.name) is a]
        missing = [a for a in mine if self.where(a.name) != DEVICE]
        if missing:
            self.shrink({a.name for a in mine}, sum(self._order[a.name] for a in missing))
        for adapter in missing:
            self._bring(adapter)
        for adapter in mine:
            self._order.move_to_end(adapter.name)

    def pin(self, names: Iterable[str]) -> None:
        """Keep these where they are while a call runs."""
        self._pins.update(names)

    def unpin(self, names: Iterable[str]) -> None:
        for name in names:
            self._pins[name] -= 1
            if not self._pins[name]:
                del self._pins[name]

    def shrink(self, spare: Iterable[str] = (), more: int = 0) -> None:
        """Send away what exceeds the budget once `more` bytes have come, used longest ago first.

        Those in use stay, whatever the budget says: a call needs all of its adapters at once.
        """
        spared = set(spare)
        if self.limit is not None:
            here = self.bytes_at(DEVICE) + more
            for name in list(self._order) if here > self.limit else ():
                if here <= self.limit:
                    break
                adapter = self.host.adapter(name)
                if name not in spared and self.where(name) == DEVICE and self._may_leave(adapter):
                    self._send(adapter, CPU if self._has_cpu_below() else DISK)
                    here -= self._order[name]
        if self.cpu_limit is not None and self._has_cpu_below():
            below = self.bytes_at(CPU)
            for name in list(self._order) if below > self.cpu_limit else ():
                if below > self.cpu_limit and self.where(name) == CPU:
                    self._send(self.host.adapter(name), DISK)
                    below -= self._order[name]

    def all_back(self) -> None:
        """Every adapter on the device, and no files."""
        for name in list(self._order):
            if self.where(name) != DEVICE:
                self._bring(self.host.adapter(name))
        for path in self._files.values():
            path.unlink(missing_ok=True)
        self._files.clear()

    def _has_cpu_below(self) -> bool:
        return self.host.device.type != "cpu" and self.cpu_limit != 0

    def _may_leave(self, adapter: Adapter) -> bool:
        """Whether nobody uses or trains it, and no other tensor shares its memory."""
        if self._pins[adapter.name] or adapter.name in self.host.active:
            return False
        if any(self._pins[n] for n in self.host.combiners_of(adapter.name)):
            return False
        if any(leaf.requires_grad or leaf.grad is not None for leaf in adapter.leaves()):
            return False
        return all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for _, t in _tensors(adapter))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _send(self, adapter: Adapter, where: str) -> None:
        if where == CPU:
            moved = {n: t.detach().to("cpu", copy=True) for n, t in _tensors(adapter)}
        else:
            moved = self._mapped(adapter)
        _put(adapter, moved)
        self._out[adapter.name] = (where, _addresses(adapter))
        self.host.forget_made(adapter.name)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _bring(self, adapter: Adapter) -> None:
        device = self.host.device
        _put(adapter, {n: t.detach().to(device, copy=True) for n, t in _tensors(adapter)})
        self._out.pop(adapter.name, None)

    def _mapped(self, adapter: Adapter) -> dict[str, Tensor]:
        """The adapter's tensors as a map of its file, which is written unless it holds these very bits."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        def read(path: Path) -> dict[str, Tensor]:
            with safe_open(str(path), "pt") as opened:
                return {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118  (no dict)

        now = {n: t.detach().cpu().contiguous() for n, t in _tensors(adapter)}
        path = self._files.get(adapter.name)
        there = read(path) if path is not None and path.exists() else {}
        if there.keys() == now.keys() and all(_same_bits(there[n], now[n]) for n in now):
            return there
        del there
        fresh = self._new_path()
        save_file(now, str(fresh))
        if path is not None:
            path.unlink(missing_ok=True)
        self._files[adapter.name] = fresh
        return read(fresh)

    def _new_path(self) -> Path:
        if self.folder is None and self._own_folder is None:
            self._own_folder = tempfile.TemporaryDirectory(prefix="veneer-pages-")
        folder = self.folder or Path(self._own_folder.name)  # type: ignore[union-attr]
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".safetensors", prefix=f"page-{os.getpid()}-", dir=folder)
        os.close(handle)
        return Path(name)


def _unlink(files: dict[str, Path], process: int) -> None:
    if process == os.getpid():  # a fork's copy owns no file
        for path in files.values():
            path.unlink(missing_ok=True)


def _tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """What moves: the leaves and the adapter's own frozen tensors."""
    for i, leaf in enumerate(adapter.leaves()):
        yield f"leaf_{i}", leaf
    for name in adapter.frozen_own.values():
        yield name, getattr(adapter, name)


def _put(adapter: Adapter, moved: dict[str, Tensor]) -> None:
    for i, leaf in enumerate(adapter.leaves()):
        leaf.data = moved[f"leaf_{i}"]
    for name in adapter.frozen_own.values():
        adapter._buffers[name] = moved[name]
    adapter._refresh()


def _addresses(adapter: Adapter) -> tuple[int, ...]:
    return tuple(t.data_ptr() for _, t in _tensors(adapter))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
