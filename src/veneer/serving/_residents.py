"""Adapters in memory: which versions are known, which are attached, and which make room for others.

Files are read on a side thread; attaching and taking off happen between two steps, on the thread that owns the model.
A version in use stays; of the others the one that was used longest ago goes first, where the budget of bytes asks for
it. A folder that cannot be used fails the requests for it, and nothing else.
"""

from __future__ import annotations

import itertools
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from veneer.engine import Host, Read, check_folder, host_of, load, read_adapter
from veneer.errors import BadOption, Unsupported, nearest

from ._request import UnknownVersion
from ._traits import Traits, traits_of

_ticks = itertools.count(1)


@dataclass(eq=False)
class Version:
    """One adapter, by the name that it never shares. state: known, reading, read, attached, failed."""

    name: str
    folder: Path
    record: dict[str, Any]
    state: str = "known"
    users: int = 0  # requests that began with it and have not ended
    running: int = 0  # those of them that have a row
    used: int = 0
    bytes: int = 0
    leaving: bool = False
    warm: bool = False  # to be attached as soon as it has been read, asked for or not
    reading: Future[Read] | None = None
    error: Exception | None = None
    traits: Traits = field(default_factory=Traits)
    load_seconds: float = 0.0


class Residents:
    """budget: bytes that attached adapters may take; None for no bound. wake: called when a file has been read."""

    def __init__(
        self, model: nn.Module, budget: int | None, wake: Callable[[], None], same_base: bool = True
    ) -> None:
        self.model, self.budget, self.wake, self.same_base = model, budget, wake, same_base
        self.host: Host = host_of(model, make=True)
        self.versions: dict[str, Version] = {}
        self.lock = threading.RLock()
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="veneer-reader")
        self.loads = self.evictions = 0

    # -- on any thread --------------------------------------------------------------------------------------------

    def add(self, name: str, folder: Path) -> None:
        """Make a version known; raise what can be told without reading its tensors."""
        record = check_folder(self.model, folder)
        if record.get("of"):
            raise Unsupported(
                f"version '{name}' combines other adapters ({', '.join(record['of'])}), which this engine cannot put "
                "beside it.",
                next_step="merge or combine them into one adapter first",
            )
        if self.same_base and record.get("same_base") is False:
            raise BadOption(
                f"version '{name}' was trained on a base with other weights than the one that is served.",
                next_step="serve the base that its veneer.json names",
            )
        with self.lock:
            there = self.versions.get(name)
            if there is not None and not there.leaving:
                raise BadOption(
                    f"version '{name}' is known already; a version never changes.",
                    next_step="give another content another version",
                )
            if there is not None:  # added again before it was gone
                there.leaving = False
                return
            self.versions[name] = Version(name, Path(folder), record)

    def get(self, name: str) -> Version:
        with self.lock:
            found = self.versions.get(name)
            if found is None or found.leaving:
                raise UnknownVersion(
                    f"there is no adapter of version '{name}'.",
                    nearest=nearest(name, self.versions) or tuple(self.versions)[:5],
                    next_step="engine.add(version, folder) makes it known",
                )
            return found

    def read(self, name: str) -> Future[Read] | None:
        """Begin to read its files, if they are not in memory."""
        with self.lock:
            version = self.get(name)
            version.warm = True
            self._read(version)
            return version.reading

    def begin(self, name: str) -> None:
        """A request for it was taken on; start reading it, if it is not in memory."""
        with self.lock:
            version = self.get(name)
            version.users += 1
            self._read(version)

    def end(self, name: str) -> None:
        with self.lock:
            self.versions[name].users -= 1

    def leave(self, name: str) -> None:
        """It takes no new requests, and goes when the last one is done."""
        with self.lock:
            self.get(name).leaving = True
        self.wake()

    def gone(self, name: str) -> bool:
        with self.lock:
            return name not in self.versions

    def close(self) -> None:
        self.reader.shutdown(wait=True, cancel_futures=True)

    # -- on the model's thread ------------------------------------------------------------------------------------

    def ready(self, name: str) -> bool | None:
        """Whether `attach` can be called for it now. None: it could, were there room."""
        with self.lock:
            version = self.versions[name]
            if version.state == "known":
                self._read(version)
            if version.state == "reading" and version.reading is not None and version.reading.done():
                version.state = "read"
            if version.state == "read":
                return True if self._fits(version) else None
            return version.state == "attached"

    def attach(self, name: str) -> Exception | None:
        """Put a version that is `ready` on the base, if it is not there; the failure, where it cannot be."""
        with self.lock:
            version = self.versions[name]
            version.used = next(_ticks)
            if version.state != "read":
                return version.error
            assert version.reading is not None
            reading, version.reading, version.state = version.reading, None, "attaching"
            version.warm = False
        began = time.perf_counter()
        try:
            read = reading.result()
            self._make_room(version, _size(read))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapter = load(self.model, read, name=name, activate=False)
            adapter.eval()
            traits = traits_of(self.model, name)
        except Exception as e:
            self._drop(name)
            with self.lock:
                version.state, version.error = "failed", e
            return e
        with self.lock:
            version.bytes = sum(
                x.numel() * x.element_size() for x in (*adapter.parameters(), *adapter.buffers())
            )
            version.traits, version.state = traits, "attached"
            version.load_seconds = time.perf_counter() - began
            self.loads += 1
        return None

    def failure(self, name: str) -> Exception | None:
        with self.lock:
            return self.versions[name].error

    def sweep(self) -> list[str]:
        """Take off what is leaving and used by nobody, and forget failures that nobody waits for; the names gone."""
        with self.lock:
            done = [v for v in self.versions.values() if v.leaving and not v.users]
            for version in done:
                self._take_off(version)
                if version.reading is not None:
                    version.reading.cancel()
                del self.versions[version.name]
            for version in self.versions.values():
                if version.users:
                    continue
                if version.state == "failed":
                    version.state, version.error = "known", None  # its folder may have been mended
                elif version.reading is not None and version.reading.done() and not version.warm:
                    version.state, version.reading = "known", None  # nobody waits for it any more
            return [v.name for v in done]

    def stats(self) -> dict[str, Any]:
        with self.lock:
            return {
                v.name: {
                    "tier": "memory" if v.state == "attached" else v.state if v.state == "failed" else "disk",
                    "state": "draining" if v.leaving else v.state,
                    "bytes": v.bytes if v.state == "attached" else 0,
                    "method": v.record.get("method", ""),
                    "users": v.users,
                    "load_seconds": v.load_seconds,
                }
                for v in self.versions.values()
            }

    @property
    def bytes(self) -> int:
        return sum(v.bytes for v in self.versions.values() if v.state == "attached")

    def _read(self, version: Version) -> None:
        if version.state == "known":
            version.state = "reading"
            version.reading = self.reader.submit(read_adapter, version.folder)
            # Every caller holds the engine's lock, or `wake` would take the two in the other order.
            version.reading.add_done_callback(lambda _: self.wake())

    def _fits(self, version: Version) -> bool:
        """Whether there is room, once idle ones have gone; a failure to come is no want of room."""
        reading = version.reading
        if self.budget is None or reading is None or reading.exception() is not None:
            return True
        in_use = sum(v.bytes for v in self.versions.values() if v.state == "attached" and v.running)
        wanted = _size(reading.result())
        return wanted > self.budget or in_use + wanted <= self.budget

    def _make_room(self, version: Version, wanted: int) -> None:
        if self.budget is None:
            return
        if wanted > self.budget:
            raise Unsupported(
                f"adapter '{version.name}' takes {wanted:,} bytes, and {self.budget:,} are set aside for all of them.",
                next_step="a larger memory_budget",
            )
        with self.lock:
            while self.bytes + wanted > self.budget:
                idle = [v for v in self.versions.values() if v.state == "attached" and not v.running]
                self._take_off(min(idle, key=lambda v: v.used))
                self.evictions += 1

    def _take_off(self, version: Version) -> None:
        if version.state == "attached":
            self._drop(version.name)
            version.state = "known"

    def _drop(self, name: str) -> None:
        """The host stays, so that the next adapter finds the base read already."""
        if name in self.host.names:
            self.host.drop(name)


def _size(read: Read) -> int:
    return sum(v.numel() * v.element_size() for v in read.values.values())


def free(model: nn.Module) -> None:
    """Give the base its classes back, if nothing is on it."""
    host = model._modules.get("veneer")
    if isinstance(host, Host) and not host.names and not host.merged:
        host.leave()


__all__ = ["Residents", "Version", "free"]
