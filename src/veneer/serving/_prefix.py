"""Shared beginnings: keys and values of prompts' first blocks, computed once and written into other rows' slots.

A block is found by a chain of digests that begins with everything its values depend on: the base's weights, the
adapter's version (the digest of its content), and the key whose requests may share. Names enter nowhere, so that an
adapter under an old name never meets the keys and values of another.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

BLOCK = 16  # tokens


@dataclass
class Kept:
    """Keys and values of each layer, (kv heads, positions, d): of BLOCK tokens, and of what was added before them."""

    values: list[Tensor]
    version: str | None
    bytes: int


class Prefixes:
    """budget: bytes of blocks that are kept; the one that was used longest ago goes first. 0 keeps nothing."""

    def __init__(self, base: str, budget: int) -> None:
        self.base, self.budget = base, budget
        self.blocks: OrderedDict[bytes, Kept] = OrderedDict()
        self.bytes = self.hits = self.asked = 0

    def chain(self, prompt: Sequence[int], version: str | None, key: str) -> list[bytes]:
        """A digest for each whole block of the prompt. Its last token is always read: the answer begins with it."""
        if not self.budget:
            return []
        whose = "base" if version is None else f"adapter {version}"
        link = hashlib.sha256("\0".join((self.base, whose, f"key {key}")).encode()).digest()
        made = []
        for start in range(0, (len(prompt) - 1) // BLOCK * BLOCK, BLOCK):
            tokens = ",".join(map(str, prompt[start : start + BLOCK]))
            link = hashlib.sha256(link + tokens.encode()).digest()
            made.append(link)
        return made

    def get(self, digest: bytes) -> list[Tensor] | None:
        found = self.blocks.get(digest)
        if found is None:
            return None
        self.blocks.move_to_end(digest)
        return found.values

    def put(self, digest: bytes, values: list[Tensor], version: str | None) -> None:
        size = sum(v.numel() * v.element_size() for v in values)
        if digest in self.blocks or size > self.budget:
            return
        self.blocks[digest] = Kept(values, version, size)
        self.bytes += size
        while self.bytes > self.budget:
            self._forget(next(iter(self.blocks)))

    def drop(self, version: str) -> None:
        """Forget what belongs to an adapter that is gone."""
        for digest in [d for d, kept in self.blocks.items() if kept.version == version]:
            self._forget(digest)

    def _forget(self, digest: bytes) -> None:
        self.bytes -= self.blocks.pop(digest).bytes
