"""Sixteen rows of eight methods of all ports, against the bare base: a forward, and one decoding step.

HF PEFT mixes no kinds in a batch, so the reference is the same base that nothing was ever attached to.
"""

from __future__ import annotations

from typing import Any

import torch

import veneer

from . import _bases, _drawn
from ._bare import TOKENS, World
from ._clock import check_equal, check_moved
from ._report import Expectation, Row
from ._size import Size

# Weight, output, around and attention edits; the decoder has no biases to train, so its norms' scales are.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "dora": {"rank": 8},
    "ia3": {},
    "bitfit": {},
    "serial_adapter": {"reduction": 8},
    "prefix_tuning": {"length": 8},
    "loreft": {"rank": 4},
    "vera": {"rank": 64},
}
INSTEAD = {"smollm2": {"bitfit": "norm_tuning"}}
LIMIT = "Each method's own calls, for two rows each: their number, more than their work."


class Mixed(World):
    """A base with one adapter of each method."""

    def __init__(self, shape: str, size: Size) -> None:
        self.shape, self.size = shape, size
        self.bare: Any = _bases.make(shape, size.seed, size.toy)
        self.model: Any = _bases.make(shape, size.seed, size.toy)
        self.names = []
        for i, (key, options) in enumerate(METHODS.items()):
            key = INSTEAD.get(shape, {}).get(key, key)
            own = {} if size.toy else options
            _drawn.draw(veneer.attach(self.model, key, name=key, activate=False, **own), i)
            self.names.append(key)
        veneer.activate(self.model, None)
        self.inputs = _bases.batch(shape, size.rows, 6 if size.toy else TOKENS, size.seed, size.toy)

    @torch.no_grad()
    def check(self, what: str, names: list[str | None]) -> float:
        """Every row against a whole batch of its method; the largest error."""
        mixed = _bases.hidden(self.model(**self.inputs, adapters=names))
        bare = _bases.hidden(self.bare(**self.inputs))
        found = 0.0
        for name in dict.fromkeys(names):
            mine = [i for i, n in enumerate(names) if n == name]
            alone = _bases.hidden(self.model(**self.inputs, adapters=[name] * len(names)))
            found = max(found, check_equal(f"{what}, {name}", mixed[mine], alone[mine]))
            check_moved(f"{what}, {name}", mixed[mine], bare[mine])
        return found


def mixed(size: Size) -> list[Row]:
    rows = []
    for shape in ("minilm", "smollm2"):
        world = Mixed(shape, size)
        names = world.named(min(len(world.names), size.rows))
        error = world.check("mixed", names)
        words = f"{shape}, {len(set(names))} methods in {size.rows}"
        rows.append(world.row("mixed", f"{words} x {TOKENS}", world.call(world.model, adapters=names),
                              world.call(world.bare), error, Expectation.at_most(1.10, LIMIT)))  # fmt: skip
    rows.append(world.row("mixed", f"{words} x 1", world.step(world.model, adapters=names), world.step(world.bare),
                          error, Expectation.at_most(1.15, LIMIT)))  # fmt: skip
    return rows
