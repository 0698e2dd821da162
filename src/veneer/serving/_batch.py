"""The rows that run: who has which slot, and what each step runs.

A step reads prompts, under a budget of tokens, and says one token for every row that has read its own: one forward for
all of them, whatever their adapters and lengths. If a forward raises, its rows run again one by one, so that whoever
caused it fails alone. Rows of one kind of adapter are neighbours, so that an edit takes its rows as one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from veneer.errors import VeneerError

from ._alone import Alone
from ._forwards import SIDE_BY_SIDE, Forwards
from ._prefix import BLOCK, Prefixes
from ._row import Row
from ._slots import Slots
from ._traits import Traits

ONE_MORE = 16  # tokens that cost about what one more forward does
Said = tuple[list[Row], Tensor]  # rows, and the logits of what they say next, (rows, vocabulary)
Failed = list[tuple[Row, Exception]]


class NoNumbers(VeneerError):
    """A row's logits are no numbers."""


class Batch(Forwards):
    """slots: rows at most. positions: of a row at most. budget: tokens of prompts that a step reads."""

    def __init__(
        self, model: nn.Module, slots: int, positions: int, budget: int, prefixes: Prefixes | None = None
    ) -> None:
        super().__init__(model, slots, positions, budget)
        self.prefixes = prefixes or Prefixes("", 0)
        self.rows: list[Row] = []  # row i of those in slots has slot i
        self.alone: list[Row] = []
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
        self._take_slot(row)
        if row.todo and not row.length and not row.traits.whole:
            whose = f"{row.request.key}\0{row.request.salt}"
            row.chain = self.prefixes.chain(row.request.prompt, row.name, whose)
            self.prefixes.asked += len(row.chain)
        if row.aside is not None:
            self.slots.write(row.slot, 0, row.aside)
            row.aside = None

    def leave(self, row: Row, spoilt: bool = False) -> None:
        """Free the row's slot; others move up, so that rows stay neighbours."""
        if row in self.alone:
            self.alone.remove(row)
            row.own = None
            return
        if spoilt:
            self.slots.clear(row.slot)
        rows, hole = self.rows, row.slot
        end = self._last(hole)
        while hole < end or end + 1 < len(
            rows
        ):  # of each group behind it the last one, into the hole before it
            end = end if hole < end else self._last(end + 1)
            self._put(rows[end], hole)
            hole = end
        rows.pop()
        row.slot = -1

    def _take_slot(self, row: Row) -> None:
        """A slot among rows of its kind: of each group behind it the first one makes room."""
        adapter = None if row.name is None else self.host.adapter(row.name)
        row.kind = (row.traits.attention, 0 if adapter is None else id(adapter.plan))
        place = sum(r.kind <= row.kind for r in self.rows)
        hole = len(self.rows)
        self.rows.append(row)
        while hole > place:
            kind = self.rows[hole - 1].kind
            start = next(i for i, r in enumerate(self.rows) if r.kind == kind)
            self._put(self.rows[start], hole)
            hole = start
        row.slot, self.rows[hole] = hole, row

    def _last(self, i: int) -> int:
        """The last row of row i's kind."""
        kind = self.rows[i].kind
        return max(j for j, r in enumerate(self.rows) if r.kind == kind)

    def _put(self, row: Row, slot: int) -> None:
        self.slots.move(row.slot, slot, row.length)
        row.slot, self.rows[slot] = slot, row

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
    def step(self) -> tuple[list[Said], Failed]:
        """Read prompts and say a token for whoever is done reading."""
        said: list[Said] = []
        failed: Failed = []
        speaking = [r for r in self.rows if not r.todo]
        waiting = self._waiting()
        side_by_side = []
        if self.joins and not (not speaking and _alike(waiting)):
            side_by_side = self._side_by_side(speaking, [r for r in waiting if _by_token(r)])
            waiting = [r for r in waiting if not _by_token(r)]
        for group in _groups(waiting, self.budget):
            self._run(group, self._read, said, failed)
        for rows in side_by_side if self.joins else [speaking]:
            if rows:
                self._run(rows, self._joint if self.joins else self._speak, said, failed)
        for row in list(self.alone):
            self._run([row], self._by_itself, said, failed)
        return said, failed

    def _side_by_side(self, speaking: list[Row], reading: list[Row]) -> list[list[Row]]:
        """Rows of the forwards over single tokens: one for all, unless edits of attention would have much laid out."""
        left, chosen = self.budget, []
        for row in reading:
            if left <= 0:
                break
            chosen.append(row)
            left -= len(row.todo)
        chosen.sort(key=lambda r: r.slot)
        tokens = len(speaking) + min(self.budget, self.budget - left)
        if any(r.traits.attention for r in (*speaking, *chosen)) and tokens > SIDE_BY_SIDE:
            return [speaking, chosen]
        return [[*speaking, *chosen]]

    def _run(
        self, rows: list[Row], forward: Callable[[list[Row]], Said], said: list[Said], failed: Failed
    ) -> None:
        try:
            saying, logits = forward(rows)
        except Exception as e:
            if len(rows) == 1:
                failed.append((rows[0], e))
                return
            for row in rows:
                self._run([row], forward, said, failed)
            return
        if not saying:
            return
        wrong = logits.amax(-1).isnan().tolist()
        if any(wrong):
            for row, bad in zip(saying, wrong):
                if bad:
                    failed.append((row, _no_numbers(row)))
            good = [i for i, bad in enumerate(wrong) if not bad]
            saying, logits = [saying[i] for i in good], logits[good]
        if saying:
            said.append((saying, logits))

    def _waiting(self) -> list[Row]:
        """Rows whose prompts can be read now, who came first first."""
        waiting, being_read = [], set[bytes]()
        for row in sorted((r for r in self.rows if r.todo), key=lambda r: r.joined):
            self._take_known(row)
            # A block that another row is reading will be there in a moment.
            if row.began or not being_read.intersection(row.chain[row.kept : row.kept + 1]):
                waiting.append(row)
                being_read.update(row.chain[row.kept :])
        return waiting

    # -- shared beginnings -----------------------------------------------------------------------------------------

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

    def _was_read(self, rows: Sequence[Row]) -> None:
        """Blocks that rows have read, for others."""
        for row in rows:
            row.began = True
            added = row.length - (len(row.request.prompt) - len(row.todo))
            while row.kept < len(row.chain) and added + (row.kept + 1) * BLOCK <= row.length:
                start = added + row.kept * BLOCK if row.kept else 0
                values = self.slots.read(row.slot, start, added + (row.kept + 1) * BLOCK)
                self.prefixes.put(row.chain[row.kept], values, row.name)
                row.kept += 1

    # -- rows by themselves ----------------------------------------------------------------------------------------

    def _by_itself(self, rows: list[Row]) -> Said:
        row = rows[0]
        if row.own is None:
            row.own = Alone(self.model, row.name)
        if not row.todo:
            return rows, row.own.say(row.last)[None]
        logits = row.own.read(row.todo)
        row.todo.clear()
        return rows, logits[None]


def _by_token(row: Row) -> bool:
    """Whether its prompt can be read as single tokens: nothing asks where it lies, or is still to be put before it."""
    return not row.traits.whole and (bool(row.length) or not row.traits.added)


def _alike(waiting: Sequence[Row]) -> bool:
    """Whether prompts make a full rectangle of many adapters: there, adapters of a kind are one product."""
    adapters = {r.name for r in waiting}
    return len(adapters) > 4 and len({(len(r.todo), bool(r.length)) for r in waiting}) == 1


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


def _no_numbers(row: Row) -> NoNumbers:
    whose = "the bare base" if row.name is None else f"adapter '{row.name}'"
    return NoNumbers(
        f"the answer of {whose} has no numbers (NaN).",
        next_step="look at the adapter's values, or serve in float32",
    )
