"""Batches whose rows use different adapters: a forward of 16 x 32, and one decoding step.

HF PEFT takes a name a row as `adapter_names`, veneer as `adapters`; both are given with every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _bases, _peer
from ._clock import Arm, check_equal, check_moved, interleaved
from ._report import Expectation, Row
from ._size import Size

TOKENS = 32
FORWARD = Expectation(1.25, "Scaling and adding an adapter's output are passes over a linear's whole output.")
DECODE = Expectation(2.5, "The adapters' own products, which read them at about memory speed.")


class Pair:
    """Two bases of the same weights that carry the same adapters, and a batch."""

    def __init__(self, shape: str, rank: int, targets: list[str], size: Size) -> None:
        self.shape, self.size = shape, size
        self.names = [f"a{i}" for i in range(max(size.adapters))]
        self.inputs = _bases.batch(shape, size.rows, TOKENS if not size.toy else 6, size.seed, size.toy)
        self.ours = _bases.make(shape, size.seed, size.toy)
        base = _bases.make(shape, size.seed, size.toy)
        self.bare = self._bare(base)
        drawn = _peer.lora(targets, rank, init_lora_weights=False)
        self.theirs = _peer.adapted(base, drawn, self.names[0])
        _peer.add(self.theirs, drawn, self.names[1:])
        _peer.copy(self.theirs, self.ours, self.names)

    @torch.no_grad()
    def _bare(self, base: Any) -> torch.Tensor:
        return _bases.hidden(base(**self.inputs))

    def named(self, count: int) -> list[str]:
        """A name a row; rows of one adapter stand together."""
        return [self.names[i * count // self.size.rows] for i in range(self.size.rows)]

    def compare(self, case: str, count: int, ours: Callable[[], Any], theirs: Callable[[], Any], setting: str,
                expected: Expectation | None) -> Row:  # fmt: skip
        """Outputs compared, then timed."""
        with torch.no_grad():
            mine = _bases.hidden(ours())
            error = check_equal(f"{case}, {setting}", mine, _bases.hidden(theirs()))
            if mine.shape == self.bare.shape:
                check_moved(case, mine, self.bare)
            found = interleaved({"veneer": Arm(ours), "peft": Arm(theirs)}, self.size.repeats)
        return Row.of(
            case, setting, found["veneer"], found["peft"], error=error, expected=self.size.expects(expected)
        )


def forward(size: Size) -> list[Row]:
    rows = []
    for shape, rank, which in (
        ("minilm", 8, "query, value"),
        ("minilm", 16, "all linears"),
        ("smollm2", 16, "all linears"),
    ):
        targets = (_bases.QUERY_VALUE if which == "query, value" else _bases.LINEARS)[shape]
        pair = Pair(shape, rank, targets, size)
        for count in size.adapters:
            names = pair.named(count)
            last = count == max(size.adapters) and rank == 16
            rows.append(
                pair.compare(
                    "forward",
                    count,
                    lambda pair=pair, names=names: pair.ours(**pair.inputs, adapters=names),  # type: ignore[misc]
                    lambda pair=pair, names=names: pair.theirs(**pair.inputs, adapter_names=names),  # type: ignore[misc]
                    f"{shape}, {which}, rank {rank}, {count} in {size.rows} x {TOKENS}",
                    FORWARD if last else None,
                )
            )
    return rows


def decode(size: Size) -> list[Row]:
    """One step: a token a row behind a cache of 32 tokens, which is cut back after each step on both sides."""
    pair = Pair("smollm2", 16, _bases.LINEARS["smollm2"], size)
    rows = []
    for count in size.adapters:
        names = pair.named(count)
        with torch.no_grad():
            caches = [
                pair.ours(**pair.inputs, adapters=names, use_cache=True)["past_key_values"],
                pair.theirs(**pair.inputs, adapter_names=names, use_cache=True)["past_key_values"],
            ]
        past = pair.inputs["input_ids"].shape[1]
        step = {
            "input_ids": pair.inputs["input_ids"][:, :1],
            "attention_mask": torch.ones(size.rows, past + 1, dtype=torch.long),
            "position_ids": torch.full((size.rows, 1), past),
        }

        def ours(step: Any = step, cache: Any = caches[0], names: Any = names) -> Any:
            y = pair.ours(**step, past_key_values=cache, use_cache=True, adapters=names)
            cache.crop(-1)
            return y

        def theirs(step: Any = step, cache: Any = caches[1], names: Any = names) -> Any:
            y = pair.theirs(**step, past_key_values=cache, use_cache=True, adapter_names=names)
            cache.crop(-1)
            return y

        rows.append(
            pair.compare(
                "decode",
                count,
                ours,
                theirs,
                f"smollm2, all linears, rank 16, {count} in {size.rows} x 1",
                DECODE if count == max(size.adapters) else None,
            )
        )
    return rows
