"""The rows that run: their forwards, in slots beside one another or each with a cache of its own.

A step reads prompts (a group of rows, or a part of one, under a budget of tokens) and says one token for every row
that has read its own: one forward for all of them, whatever their adapters and lengths. If a forward raises, its rows
run again one by one, so that whoever caused it fails alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.engine import begin, going_on, host_of, within
from veneer.errors import VeneerError

from ._alone import Alone
from ._prefix import BLOCK, Prefixes
from ._row import Row
from ._slots import Slots
from ._traits import Traits

ONE_MORE = 16  # tokens that cost about what one more forward does
Said = list[tuple[Row, Tensor]]  # a row, and the logits of what it says next, (vocabulary,)
Failed = list[tuple[Row, Exception]]


class NoNumbers(VeneerError):
    """A row's logits are no numbers."""


class Batch:
    """slots: rows at most. positions: of a row at most. budget: tokens of prompts that a step reads."""

    def __init__(
        self, model: nn.Module, slots: int, positions: int, budget: int, prefixes: Prefixes | None = None
    ) -> None:
        self.model, self.budget, self.positions = model, budget, positions
        self.host = host_of(model)
        self.device = self.host.device
        self.slots = Slots(slots, positions)
        self.prefixes = prefixes or Prefixes("", 0)
        self.rows: list[Row] = []  # row i of those in slots has slot i
        self.alone: list[Row] = []
        self.accepts = frozenset(inspect.signature(type(model).forward).parameters)
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.windows = _windows(config)
        self.adds_masks = getattr(config, "_attn_implementation", None) == "eager"  # others take them as bool
        self.in_slots = self.windows is not None and self._fits_slots()

        self.bare = Traits()

    # -- who is in -------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.alone)

    @property
    def everybody(self) -> list[Row]:
        return [*self.rows, *self.alone]

    def join(self, row: Row) -> None:
        if row.traits.alone or not self.in_slots:
            self.alone.append(row)
            return
        row.slot = len(self.rows)
        self.rows.append(row)
        if row.todo and not row.began and not row.traits.whole:
            whose = f"{row.request.key}\0{row.request.salt}"
            row.chain = self.prefixes.chain(row.request.prompt, row.name, whose)
            self.prefixes.asked += len(row.chain)
        if row.aside is not None:
            self.slots.write(row.slot, 0, row.aside)
            row.aside = None

    def leave(self, row: Row, spoilt: bool = False) -> None:
        """Free the row's slot; the last row takes it, so that rows stay neighbours."""
        if row in self.alone:
            self.alone.remove(row)
            row.own = None
            return
        hole, last = row.slot, self.rows.pop()
        if spoilt:
            self.slots.clear(hole)
        if last is not row:
            self.slots.move(last.slot, hole, last.length)
            if spoilt:
                self.slots.clear(last.slot)
            last.slot = hole
            self.rows[hole] = last
        row.slot = -1

    def put_aside(self, row: Row) -> None:
        """Take a row out with what it has computed; `join` puts it back."""
        if row.slot >= 0:
            row.aside = self.slots.read(row.slot, 0, row.length)
        own = row.own
        self.leave(row)
        row.own = own

    def clear(self) -> None:
        self.rows, self.alone = [], []
        self.slots = Slots(0, 0)

    # -- steps -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> tuple[Said, Failed]:
        """Read prompts and say a token for whoever is done reading."""
        said: Said = []
        failed: Failed = []
        speaking = [r for r in self.rows if not r.todo]
        for group in self._readers():
            self._run(group, self._read, said, failed)
        if speaking:
            self._run(speaking, self._speak, said, failed)
        for row in list(self.alone):
            self._run([row], self._by_itself, said, failed)
        return said, failed

    def _run(self, rows: list[Row], forward: Callable[[list[Row]], Said], said: Said, failed: Failed) -> None:
        try:
            found = forward(rows)
        except Exception as e:
            if len(rows) == 1:
                failed.append((rows[0], e))
                return
            for row in rows:
                self._run([row], forward, said, failed)
            return
        for row, logits in found:
            if bool(torch.isnan(logits).any()):
                wrong = NoNumbers(
                    f"the answer of {_whose(row)} has no numbers (NaN).",
                    next_step="look at the adapter's values, or serve in float32",
                )
                failed.append((row, wrong))
            else:
                said.append((row, logits))

    def _readers(self) -> list[list[Row]]:
        """The rows whose prompts are read in this step, in groups that share a forward."""
        waiting, being_read = [], set[bytes]()
        for row in self.rows:
            if row.todo:
                self._take_known(row)
                # A block that another row is reading will be there in a moment.
                if row.began or not being_read.intersection(row.chain[row.kept : row.kept + 1]):
                    waiting.append(row)
                    being_read.update(row.chain[row.kept :])
        return _groups(waiting, self.budget)

    def _read(self, rows: list[Row]) -> Said:
        """One forward over the prompts of some rows, or over a part of a long one."""
        counts = [
            len(r.todo) if len(rows) > 1 or r.traits.whole else min(len(r.todo), self.budget) for r in rows
        ]
        ids, mask = self._left_padded([r.todo[:c] for r, c in zip(rows, counts)])
        names = [r.name for r in rows]
        fresh = not rows[0].length
        inputs: dict[str, Any] = {"input_ids": ids}
        if fresh:
            session, inputs = begin(self.model, names, {"input_ids": ids, "attention_mask": mask})
            mask = inputs.pop("attention_mask")
        else:
            session = going_on(self.model, names, any(r.traits.added for r in rows))
        taken = mask.sum(1).tolist()
        logits = self._forward(rows, [r.length for r in rows], taken, inputs, session, mask.bool())
        for row, count, positions in zip(rows, counts, taken):
            del row.todo[:count]
            row.length += int(positions)
            row.began = True
            self._keep_known(row)
        return [(row, logits[i, -1]) for i, row in enumerate(rows) if not row.todo]

    def _take_known(self, row: Row) -> None:
        """Blocks of the prompt that were computed before, into the row's slot."""
        while not row.began and row.kept < len(row.chain):
            values = self.prefixes.get(row.chain[row.kept])
            if values is None:
                return
            self.slots.write(row.slot, row.length, values)
            row.length += values[0].shape[1]
            row.kept += 1
            row.cached += BLOCK
            self.prefixes.hits += 1
            del row.todo[:BLOCK]

    def _keep_known(self, row: Row) -> None:
        """Blocks that the row has read, for others."""
        added = row.length - (len(row.request.prompt) - len(row.todo))
        while row.kept < len(row.chain) and added + (row.kept + 1) * BLOCK <= row.length:
            start = added + row.kept * BLOCK if row.kept else 0
            values = self.slots.read(row.slot, start, added + (row.kept + 1) * BLOCK)
            self.prefixes.put(row.chain[row.kept], values, row.name)
            row.kept += 1

    def _speak(self, rows: list[Row]) -> Said:
        """One token for every row: (rows, 1) -> logits of the next."""
        ids = torch.tensor([[r.last] for r in rows], device=self.device)
        session = going_on(self.model, [r.name for r in rows], any(r.traits.added for r in rows))
        logits = self._forward(
            rows, [r.length for r in rows], [1] * len(rows), {"input_ids": ids}, session, None
        )
        for row in rows:
            row.length += 1
        return [(row, logits[i, -1]) for i, row in enumerate(rows)]

    def _forward(
        self, rows: Sequence[Row], lengths: Sequence[int], counts: Sequence[int], inputs: dict[str, Any],
        session: Any, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        self.slots.place([r.slot for r in rows], lengths, counts, self.device, mask)
        more = {"logits_to_keep": 1} if "logits_to_keep" in self.accepts else {}
        with within(session, mask):
            out = self.model(
                **inputs, **more, attention_mask=self._masks(), position_ids=self.slots.position_ids(),
                past_key_values=self.slots, use_cache=True,
            )  # fmt: skip
        return out.logits

    def _masks(self) -> Any:
        """What the base's forward takes as a ready mask: one, or one for each kind of layer."""
        assert self.windows is not None
        made = {kind: self.slots.mask(window) for kind, window in self.windows.items()}
        if self.adds_masks:
            lowest = torch.finfo(self.host.dtype).min if self.host.dtype is not None else -1e9
            made = {
                kind: torch.zeros(m.shape, dtype=self.host.dtype, device=m.device).masked_fill_(~m, lowest)
                for kind, m in made.items()
            }
        return made if len(made) > 1 else next(iter(made.values()))

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """ids and mask, (rows, tokens): all rows end together, so that their last logits stand in one column."""
        tokens = max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), tokens, dtype=torch.long)
        mask = torch.zeros(len(prompts), tokens, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, tokens - len(prompt) :] = torch.tensor(prompt)
            mask[i, tokens - len(prompt) :] = 1
        return ids.to(self.device), mask.to(self.device)

    # -- rows by themselves ----------------------------------------------------------------------------------------

    def _by_itself(self, rows: list[Row]) -> Said:
        row = rows[0]
        if row.own is None:
            row.own = Alone(self.model, row.name)
        if not row.todo:
            return [(row, row.own.say(row.last))]
        logits = row.own.read(row.todo)
        row.todo.clear()
        return [(row, logits)]

    # -- what the base can do --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _fits_slots(self) -> bool:
        """Whether this base computes the same in slots as by itself: two rows of unequal lengths, tried once."""
        if not {"position_ids", "past_key_values", "use_cache"} <= self.accepts:
            return False
        vocabulary = int(getattr(self.model.config, "vocab_size", 0) or 16)
        prompts = [[i % vocabulary for i in range(3, 9)], [i % vocabulary for i in range(5, 8)]]
        nobody = going_on(self.model, [None, None], False)
        slots, self.slots = self.slots, Slots(2, 16)
        try:
            with within(nobody):
                alone = [
                    self.model(input_ids=torch.tensor([p], device=self.device)).logits[0] for p in prompts
                ]
                found = []
                lengths = [0, 0]
                for counts in ([5, 2], [1, 1]):
                    parts = [p[n : n + c] for p, n, c in zip(prompts, lengths, counts)]
                    ids, _ = self._left_padded(parts)
                    self.slots.place([0, 1], lengths, counts, self.device)
                    out = self.model(
                        input_ids=ids, attention_mask=self._masks(), position_ids=self.slots.position_ids(),
                        past_key_values=self.slots, use_cache=True,
                    )  # fmt: skip
                    lengths = [n + c for n, c in zip(lengths, counts)]
                    found.append(out.logits[:, -1])
            size = max(float(a.abs().max()) for a in alone)
            wrong = max(
                float((found[step][i] - alone[i][at]).abs().max())
                for step, places in enumerate(([4, 1], [5, 2]))
                for i, at in enumerate(places)
            )
            eps = torch.finfo(found[0].dtype).eps
            return bool(self.slots.k) and wrong <= 1000 * eps * max(1.0, size)
        except Exception:
            return False
        finally:
            self.slots = slots


def _groups(waiting: Sequence[Row], budget: int) -> list[list[Row]]:
    """Groups of rows whose prompts are read in one step: alike in kind and length, so that little is padded, and as
    many as the budget of tokens allows. The first of those that wait is always among them.
    """
    order = {id(row): i for i, row in enumerate(waiting)}
    made: list[list[Row]] = []
    for row in sorted(waiting, key=lambda r: (bool(r.length), len(r.todo))):
        group = made[-1] if made else []
        read = sum(len(r.todo) for r in group) + len(row.todo)
        area = len(row.todo) * (len(group) + 1)
        alike = bool(group) and bool(group[0].length) == bool(row.length)
        if alike and area <= budget and area - read <= ONE_MORE + read // 4:
            group.append(row)
        else:
            made.append([row])
    made.sort(key=lambda group: min(order[id(r)] for r in group))
    chosen: list[list[Row]] = []
    left = budget
    for group in made:
        area = max(len(r.todo) for r in group) * len(group)
        if chosen and area > left:
            break
        chosen.append(group)
        left -= area
    return chosen


def _windows(config: Any) -> dict[str, int | None] | None:
    """{kind of layer: keys that a token sees, or None for all}; None where slots cannot hold a kind."""
    if config is None:
        return None
    window = getattr(config, "sliding_window", None)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    known: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
    if not kinds:
        return {"full_attention": window}
    if not set(kinds) <= set(known):
        return None
    return {kind: known[kind] for kind in kinds}


def _whose(row: Row) -> str:
    return "the bare base" if row.name is None else f"adapter '{row.name}'"
