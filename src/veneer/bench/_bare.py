"""What adapters cost over the bare base: none active, one, sixteen, and sixteen of different ranks.

The reference is the same base, of the same weights, that nothing was ever attached to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import veneer

from . import _bases, _drawn
from ._clock import Arm, check_equal, interleaved
from ._report import Expectation, Row
from ._size import Size

BARE = "bare base"
TOKENS = 32
RANKS = (4, 8, 16, 64)
LIMIT = "The adapters' own products: their FLOPs in a batch, their bytes in decoding."


class World:
    """A bare base and the same one with adapters: of one setting, for batches of size.rows rows."""

    def __init__(self, shape: str, ranks: tuple[int, ...], sites: Any, size: Size) -> None:
        self.shape, self.size = shape, size
        self.bare: Any = _bases.make(shape, size.seed, size.toy)
        self.model: Any = _bases.make(shape, size.seed, size.toy)
        self.names = _drawn.loras(self.model, max(size.adapters), ranks, sites)
        self.inputs = _bases.batch(shape, size.rows, 6 if size.toy else TOKENS, size.seed, size.toy)

    def named(self, count: int) -> list[str | None]:
        return [self.names[i * count // self.size.rows] for i in range(self.size.rows)]

    def check(self, what: str, names: list[str | None]) -> float:
        with torch.no_grad():
            bare = _bases.hidden(self.bare(**self.inputs))
        return _drawn.check_rows(what, self.model, self.inputs, names, bare)

    def row(self, case: str, setting: str, ours: Callable[[], Any], bare: Callable[[], Any], error: float,
            expected: Expectation | None) -> Row:  # fmt: skip
        with torch.no_grad():
            found = interleaved({"veneer": Arm(ours), "bare": Arm(bare)}, self.size.repeats)
        return Row.of(case, setting, found["veneer"], found["bare"], error=error, reference=BARE,
                      expected=self.size.expects(expected))  # fmt: skip

    def call(self, model: Any, **named: Any) -> Callable[[], Any]:
        return functools.partial(model, **self.inputs, **named)

    def step(self, model: Any, **named: Any) -> Callable[[], Any]:
        """One token a row behind a cache, which is cut back after each step."""
        with torch.no_grad():
            cache = model(**self.inputs, use_cache=True, **named)["past_key_values"]
        past = self.inputs["input_ids"].shape[1]
        given = {
            "input_ids": self.inputs["input_ids"][:, :1],
            "attention_mask": torch.ones(self.size.rows, past + 1, dtype=torch.long),
            "position_ids": torch.full((self.size.rows, 1), past),
        }

        def run() -> Any:
            y = model(**given, past_key_values=cache, use_cache=True, **named)
            cache.crop(-1)
            return y

        return run


def forward(size: Size) -> list[Row]:
    """Whole batches: nothing active, and a different adapter in every row."""
    rows = []
    for rank, sites, words, least in (
        (8, _drawn.QUERY_VALUE, "query, value", 1.05),
        (16, _drawn.ALL["minilm"], "all linears", 1.15),
    ):
        world = World("minilm", (rank,), sites, size)
        names = world.named(max(size.adapters))
        if rank == 8:
            with torch.no_grad():
                error = check_equal("idle", _bases.hidden(world.model(**world.inputs)),
                                    _bases.hidden(world.bare(**world.inputs)), 0.0)  # fmt: skip
            rows.append(world.row("bare", f"minilm, {len(world.names)} attached, none active, {size.rows} x {TOKENS}",
                                  world.call(world.model), world.call(world.bare), error,
                                  Expectation.at_most(1.02)))  # fmt: skip
        error = world.check("bare", names)
        rows.append(world.row("bare", f"minilm, {words}, rank {rank}, {len(set(names))} in {size.rows} x {TOKENS}",
                              world.call(world.model, adapters=names), world.call(world.bare), error,
                              Expectation.at_most(least, LIMIT)))  # fmt: skip
    return rows


def decode(size: Size) -> list[Row]:
    """One decoding step of the decoder: one adapter active, and a different one in every row."""
    rows = []
    for ranks, sites, words, counts in (
        ((16,), _drawn.ALL["smollm2"], "all linears, rank 16", {1: 1.10, max(size.adapters): 1.30}),
        ((8,), _drawn.QUERY_VALUE, "query, value, rank 8", {max(size.adapters): 1.10}),
        (
            RANKS,
            "attention.{query,key,value}",
            "query, key, value, ranks 4 to 64",
            {max(size.adapters): 1.20},
        ),
    ):
        world = World("smollm2", ranks, sites, size)
        bare = world.step(world.bare)
        for count, least in counts.items():
            names = world.named(count)
            error = world.check("bare_decode", names)
            if count == 1:
                veneer.activate(world.model, world.names[0])
                ours = world.step(world.model)
            else:
                veneer.activate(world.model, None)
                ours = world.step(world.model, adapters=names)
            rows.append(world.row("bare_decode", f"smollm2, {words}, {count} in {size.rows} x 1", ours, bare, error,
                                  Expectation.at_most(least, LIMIT)))  # fmt: skip
    return rows
