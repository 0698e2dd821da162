"""Kept states: what the frozen base makes of each row below the lowest edit, computed once and used in every epoch.

A table holds the states of one split's rows, without padding, at the places that adapters ask for. It is filled a
chunk at a time, and which rows make a chunk follows from the split alone. So a row's states do not depend on the
batch that asked first, and a run that is resumed meets the very same ones. Members of a cohort share tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from veneer._disk import mapped
from veneer.tasks import Batch, Encoded, Task
from veneer.tasks._collate import takes
from veneer.training._batches import in_order
from veneer.training._evaluate import evaluating

CHUNK = 16  # rows that are computed together, of nearly one length


class Table:
    """States of one split's rows: for each place (tokens of all rows, width), and which chunks are filled."""

    def __init__(self, encoded: Encoded, task: Task, feeder: Any, kept: Kept) -> None:
        self.features, self.task, self.feeder, self.kept = encoded.features, task, feeder, kept
        self.encoded = encoded  # held, so that its id stays its own
        self.number = {id(f): i for i, f in enumerate(self.features)}
        self.chunks = in_order([f["length"] for f in self.features], CHUNK)
        self.chunk_of = {i: c for c, rows in enumerate(self.chunks) for i in rows}
        self.sizes: list[int] = [len(f["input_ids"]) for f in self.features if "input_ids" in f]
        self.starts: list[int] = []
        self.buffers: dict[int, Tensor] = {}
        self.filled: dict[int, set[int]] = {}
        self.shapes: dict[int, Any] = {}
        self.maps: dict[
            int, tuple[int, ...]
        ] = {}  # of a row at a place that holds maps: (channels, height, width)
        self.refused = False  # the base has no prefix that can be kept, or there is no room

    def states(self, prefix: Any, rows: Sequence[Any], batch: Batch) -> dict[int, Tensor] | None:
        """{place: (rows, tokens, width)} as they would enter and leave the blocks of this batch."""
        numbers = [self.number[id(f)] for f in rows]
        for chunk in sorted({self.chunk_of[i] for i in numbers}):
            missing = [p for p in prefix.places if chunk not in self.filled.get(p, ())]
            if missing and not self.refused:
                self._fill(chunk, missing)
        if self.refused:
            return None
        mask = batch.inputs.get("attention_mask")
        index = torch.cat([torch.arange(self.starts[i], self.starts[i] + self.sizes[i]) for i in numbers])
        found = {p: self._padded(self.buffers[p][index], mask, len(numbers), batch) for p in prefix.places}
        return {p: x.view(len(numbers), *self.maps[p]) if p in self.maps else x for p, x in found.items()}

    def _padded(self, flat: Tensor, mask: Tensor | None, rows: int, batch: Batch) -> Tensor:
        device = next(v.device for v in batch.inputs.values() if isinstance(v, Tensor))
        flat = flat.to(device=device, dtype=self.kept.dtype or flat.dtype)
        if mask is None or "input_ids" not in batch.inputs:
            return flat.view(rows, -1, flat.shape[-1])
        made = flat.new_zeros(*mask.shape, flat.shape[-1])
        made[mask.bool()] = flat
        return made

    def _fill(self, chunk: int, places: Sequence[int]) -> None:
        """Run the bare base on a chunk's rows, up to the last place that is missing."""
        from veneer import engine

        rows = self.chunks[chunk]
        model, accelerator = self.kept.model, self.kept.accelerator
        batch = self.task.collate([self.features[i] for i in rows], self.feeder, model)
        batch = batch.to(accelerator.device)
        inputs = {**batch.inputs, **({"use_cache": False} if takes(model, "use_cache") else {})}
        wanted = engine.Prefix(self.kept.stack, max(places), tuple(places))
        with evaluating(model), accelerator.autocast():
            found = engine.record_prefix(model, wanted, inputs)
        if found is None:
            self.refused = True
            return
        self.shapes |= found.plain
        mask = inputs.get("attention_mask") if "input_ids" in inputs else None
        for place in places:
            x = found.states[place]
            if mask is None and x.dim() > 3:  # maps of a convolution: their lines are kept as tokens are
                self.maps[place] = tuple(x.shape[1:])
                x = x.flatten(1, -2)
            fits = x.dim() == 3 if mask is None else x.shape[:2] == mask.shape
            if not fits or (mask is None and self.starts and x.shape[1] != self.sizes[0]):
                self.refused = True  # maps that shrink from place to place among others
                return
            if not self.starts:
                self._lay_out(x, mask)
            if place not in self.buffers and not self._make(place, x):
                return
            flat = (x.flatten(0, 1) if mask is None else x[mask.bool()]).cpu()
            for i, own in zip(rows, flat.split([self.sizes[i] for i in rows])):
                self.buffers[place][self.starts[i] : self.starts[i] + self.sizes[i]] = own
            self.filled[place].add(chunk)

    def _lay_out(self, x: Tensor, mask: Tensor | None) -> None:
        if mask is None:  # pictures and the like: as many tokens for each
            self.sizes = [x.shape[1]] * len(self.features)
        self.starts, at = [], 0
        for size in self.sizes:
            self.starts.append(at)
            at += size

    def _make(self, place: int, x: Tensor) -> bool:
        made = self.kept.room(sum(self.sizes), x.shape[-1], x.dtype)
        if made is None:
            self.refused = True
            return False
        self.buffers[place], self.filled[place] = made, set()
        return True


class Kept:
    """All tables of one base, within a bound of bytes."""

    def __init__(self, model: nn.Module, accelerator: Any, form: str, limit: int) -> None:
        """form: one of `FROZEN_PREFIX`. limit: bytes of all tables; what does not fit is not kept: see `notes`."""
        self.model, self.accelerator = model, accelerator
        self.where, _, half = form.partition("-")
        self.half, self.limit, self.used = bool(half), limit, 0
        self.tables: dict[int, Table] = {}
        self.notes: list[str] = []
        self.dtype: torch.dtype | None = None  # of the states as the base makes them
        self.stack = ""

    def view(self, name: str, encoded: Encoded, task: Task, feeder: Any) -> View | None:
        """The kept states of a split for one adapter; None where its edits leave nothing to keep."""
        from veneer import engine

        if self.where == "off" or not encoded.features:
            return None
        prefix = engine.frozen_prefix(self.model, [name])
        if prefix is None:
            return None
        self.stack = prefix.stack
        table = self.tables.get(id(encoded))
        if table is None:
            table = self.tables[id(encoded)] = Table(encoded, task, feeder, self)
        return View(prefix, table)

    def room(self, tokens: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """(tokens, width) in memory or on disk; None where the bound or the disk does not allow it."""
        self.dtype = dtype
        stored = torch.float16 if self.half and dtype == torch.float32 else dtype
        size = tokens * width * stored.itemsize
        if self.used + size > self.limit:
            self.notes.append(
                f"the states below the lowest edit take {size:,} bytes more than frozen_prefix_bytes={self.limit:,} "
                "allows, so they are computed anew"
            )
            return None
        self.used += size
        if self.where == "memory":
            return torch.empty(tokens, width, dtype=stored)
        try:
            return mapped(tokens * width, stored).view(tokens, width)
        except OSError as error:
            self.notes.append(f"the states below the lowest edit are not kept: {error.strerror or error}")
            return None


class View:
    """One adapter's prefix over a table."""

    def __init__(self, prefix: Any, table: Table) -> None:
        self.prefix, self.table = prefix, table

    def of(self, rows: Sequence[Any], batch: Batch) -> Played | None:
        states = self.table.states(self.prefix, rows, batch)
        return None if states is None else Played(self.prefix, states, self.table.shapes)


class Played:
    """Kept states of one batch, to be played in the place of the prefix."""

    def __init__(self, prefix: Any, states: dict[int, Tensor], shapes: dict[int, Any]) -> None:
        self.prefix, self.states, self.shapes = prefix, states, shapes


@contextmanager
def played(model: nn.Module, found: Played | None) -> Iterator[None]:
    """Calls of the model inside of the block begin behind the prefix."""
    from veneer import engine

    with nullcontext() if found is None else engine.playing(model, found.prefix, found.states, found.shapes):
        yield
