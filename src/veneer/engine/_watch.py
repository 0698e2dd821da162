"""Watching which facts of its rows a method reads: whether a token's answer depends on more than what came before.

A method that reads where the prompt ends cannot be given a prompt in parts, one that keeps a history needs a cache of
its own. Neither is declared; both show when it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from veneer.edits import At

from ._frame import local

OF_ROWS = ("past", "mask", "mask_all", "prompt", "added", "tasks", "ids", "memory", "conditions", "inputs")


@contextmanager
def facts_read() -> Iterator[set[str]]:
    """The names of the facts of rows (`OF_ROWS`, and "history") that methods read in calls inside of the block."""
    before, local.read = local.read, set()
    try:
        yield local.read
    finally:
        local.read = before


@functools.lru_cache(maxsize=1)
def _class() -> type[At]:
    class Watched(At):
        def __getattribute__(self, name: str) -> Any:
            if name in OF_ROWS:
                seen = object.__getattribute__(self, "__dict__").get("_read")
                if seen is not None:
                    seen.add(name)
            return object.__getattribute__(self, name)

        def history(self, key: str, x: Any) -> Any:
            self.__dict__["_read"].add("history")
            return super().history(key, x)

    return Watched


def watched(seen: set[str]) -> Any:
    """What makes an `At` that notes in `seen` what is read of it."""

    def make(**facts: Any) -> At:
        made = object.__new__(_class())
        made.__dict__.update(At(**facts).__dict__)
        made.__dict__["_read"] = seen
        return made

    return make
