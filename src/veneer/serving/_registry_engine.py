"""What a registry tells an engine: which versions there are. Telling it twice is no mistake."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from veneer.errors import UnknownAdapter


class Adapters(Protocol):
    """What is needed of an engine."""

    @property
    def versions(self) -> Collection[str]:
        """The versions that it takes requests for."""

    def add(self, version: str, folder: Path) -> Any: ...

    def remove(self, version: str, *, drain: bool = True) -> Any: ...


class Engines:
    """Two engines behind one door: an adapter goes to the one that answers its task.

    generating: answers prompts. reading: answers texts with a head. Embeddings are read with adapters of either, so
    that the reading engine knows all of them.
    """

    def __init__(self, generating: Adapters, reading: Adapters) -> None:
        self.generating, self.reading = generating, reading

    @property
    def versions(self) -> Collection[str]:
        return self.reading.versions

    def add(self, version: str, folder: Path) -> None:
        if not reads(folder) and version not in self.generating.versions:
            self.generating.add(version, folder)
        self.reading.add(version, folder)

    def remove(self, version: str, *, drain: bool = True) -> None:
        for each in (self.generating, self.reading):
            if version in each.versions:
                each.remove(version, drain=drain)


def reads(folder: Path) -> bool:
    """Whether an adapter's folder says that it answers a text with a head, and no prompt."""
    from ._reading_shells import READ
    from ._reading_tasks import task_of

    task = task_of(folder)
    return task is not None and task.name in READ


def ready_on(engine: Adapters) -> Callable[[str, Path], None]:
    """The `ready` of a registry: the engine knows a version when it returns."""

    def ready(digest: str, folder: Path) -> None:
        if digest not in engine.versions:
            engine.add(digest, folder)

    return ready


def gone_from(engine: Adapters) -> Callable[[str], None]:
    """The `gone` of a registry: the engine takes no new request for a version; those that run end with it."""

    def gone(digest: str) -> None:
        with contextlib.suppress(UnknownAdapter):
            engine.remove(digest, drain=True)

    return gone
