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
