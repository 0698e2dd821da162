"""The forwards of a batch over one base: rows side by side in a rectangle, or single tokens of all of them.

`_joint` takes single tokens of rows that speak and of prompts that are read. `_read` takes whole prompts, padded to one
length, for methods that ask where their prompt lies, or put positions before it, and for bases on which single tokens
cannot be told apart. Which of the two a base can have is tried once, on a few tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.engine import begin, going_on, host_of, why_not_joined, within

from ._joint import Joint
from ._row import Row
from ._slots import Slots

SIDE_BY_SIDE = 64  # tokens of a forward in which keys are laid out for each, as edits of attention take them


class Forwards:
    """slots: rows at most. positions: of a row at most. budget: tokens of prompts that a forward reads."""

    def __init__(self, model: nn.Module, slots: int, positions: int, budget: int) -> None:
        self.model, self.budget, self.positions = model, budget, positions
        self.host = host_of(model)
        self.device = self.host.device
        self.slots = Slots(slots, positions)
        self.accepts = frozenset(inspect.signature(type(model).forward).parameters)
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.windows = _windows(config)
        self.adds_masks = getattr(config, "_attn_implementation", None) == "eager"  # others take them as bool
        self.in_slots = self.windows is not None and self._agrees(self._in_rows)
        self.joins = self.in_slots and why_not_joined(model) is None and self._agrees(self._in_tokens)

    # -- single tokens ---------------------------------------------------------------------------------------------

    def _joint(self, rows: Sequence[Row]) -> tuple[list[Row], Tensor]:
        """One forward over the last words of rows that speak, and over what the others read of their prompts.

        rows: the speaking ones first. Returns those that say something next, and logits (rows, vocabulary).
        """
        counts = self._counts(rows)
        speaking = sum(not r.todo for r in rows)
        ids = [t for r, c in zip(rows, counts) for t in (r.todo[:c] or [r.last])]
        session = going_on(
            self.model,
            [r.name for r, c in zip(rows, counts) for _ in range(c)],
            any(r.traits.added for r in rows),
        )
        session.attend = self.slots.attend
        if speaking < len(rows):
            session.form = "segments"  # tensors gathered for each token of a prompt would be large
        self.slots.join(
            [r.slot for r in rows], [r.length for r in rows], counts, speaking, self.device,
            aligned=any(r.traits.attention for r in rows),
        )  # fmt: skip
        last, at = [], -1
        for row, count in zip(rows, counts):
            at += count
            if count >= len(row.todo):
                last.append(at)
        chosen = None if len(last) == len(ids) else torch.tensor(last, dtype=torch.long, device=self.device)
        if not any(r.traits.head for r in rows):
            session.keep, chosen = chosen, None
        logits = self._forward(rows, {"input_ids": torch.tensor(ids, device=self.device)[:, None]}, session)[
            :, -1
        ]
        for row, count in zip(rows, counts):
            del row.todo[:count]
            row.length += count
        self._was_read(rows[speaking:])
        saying = [r for r in rows if not r.todo]
        return saying, logits if chosen is None else logits.index_select(0, chosen)

    def _counts(self, rows: Sequence[Row]) -> list[int]:
        """Tokens that each row brings: one that it said, or as many of its prompt as the budget leaves."""
        left, counts = self.budget, []
        for row in rows:
            counts.append(min(len(row.todo), left) if row.todo else 1)
            left -= counts[-1] if row.todo else 0
        return counts

    def _was_read(self, rows: Sequence[Row]) -> None:
        """Rows have read some of their prompts."""

    # -- rows in a rectangle ---------------------------------------------------------------------------------------

    def _read(self, rows: Sequence[Row]) -> tuple[list[Row], Tensor]:
        """One forward over the prompts of some rows, or over a part of a long one."""
        counts = [
            len(r.todo) if len(rows) > 1 or r.traits.whole else min(len(r.todo), self.budget) for r in rows
        ]
        ids, mask = self._left_padded([r.todo[:c] for r, c in zip(rows, counts)])
        names = [r.name for r in rows]
        inputs: dict[str, Any] = {"input_ids": ids}
        if not rows[0].length:
            session, inputs = begin(self.model, names, {"input_ids": ids, "attention_mask": mask})
            mask = inputs.pop("attention_mask")
        else:
            session = going_on(self.model, names, any(r.traits.added for r in rows))
        taken = mask.sum(1).tolist()
        self.slots.place([r.slot for r in rows], [r.length for r in rows], taken, self.device, mask.bool())
        logits = self._forward(rows, inputs, session, mask.bool())[:, -1]
        for row, count, positions in zip(rows, counts, taken):
            del row.todo[:count]
            row.length += int(positions)
        self._was_read(rows)
        return self._saying(rows, logits)

    def _speak(self, rows: Sequence[Row]) -> tuple[list[Row], Tensor]:
        """One token for every row: (rows, 1) -> logits of the next. For bases that take no single tokens."""
        ids = torch.tensor([[r.last] for r in rows], device=self.device)
        session = going_on(self.model, [r.name for r in rows], any(r.traits.added for r in rows))
        self.slots.place([r.slot for r in rows], [r.length for r in rows], [1] * len(rows), self.device)
        logits = self._forward(rows, {"input_ids": ids}, session)[:, -1]
        for row in rows:
            row.length += 1
        return list(rows), logits

    def _saying(self, rows: Sequence[Row], logits: Tensor) -> tuple[list[Row], Tensor]:
        """Of rows that were read, those that are done, and their logits."""
        done = [i for i, r in enumerate(rows) if not r.todo]
        return [rows[i] for i in done], logits if len(done) == len(rows) else logits[done]

    # -- the base's own forward ------------------------------------------------------------------------------------

    def _forward(
        self, rows: Sequence[Row], inputs: dict[str, Any], session: Any, mask: Tensor | None = None
    ) -> Tensor:
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
        if self.adds_masks and not isinstance(self.slots.now, Joint):
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

    # -- what the base can do --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _agrees(self, run: Callable[[list[list[int]], list[int], list[int]], Tensor]) -> bool:
        """Whether the base computes in slots what it does for a row by itself: two of unequal lengths, tried once.

        run: (prompts, positions that they have, tokens that they bring) -> logits of their last ones.
        """
        if not {"position_ids", "past_key_values", "use_cache"} <= self.accepts:
            return False
        vocabulary = int(getattr(self.model.config, "vocab_size", 0) or 16)
        prompts = [[i % vocabulary for i in range(3, 9)], [i % vocabulary for i in range(5, 8)]]
        slots, self.slots = self.slots, Slots(2, 16)
        try:
            with within(going_on(self.model, [None], False)):
                alone = [
                    self.model(input_ids=torch.tensor([p], device=self.device)).logits[0] for p in prompts
                ]
            size = max(float(a.abs().max()) for a in alone)
            wrong, lengths = 0.0, [0, 0]
            for counts in ([5, 2], [1, 1]):
                found = run(prompts, lengths, counts)
                lengths = [n + c for n, c in zip(lengths, counts)]
                for i, length in enumerate(lengths):
                    wrong = max(wrong, float((found[i] - alone[i][length - 1]).abs().max()))
            eps = torch.finfo(found.dtype).eps
            return bool(self.slots.k) and wrong <= 1000 * eps * max(1.0, size)
        except Exception:
            return False
        finally:
            self.slots = slots

    def _in_rows(self, prompts: list[list[int]], lengths: list[int], counts: list[int]) -> Tensor:
        ids, _ = self._left_padded([p[n : n + c] for p, n, c in zip(prompts, lengths, counts)])
        self.slots.place([0, 1], lengths, counts, self.device)
        return self._forward((), {"input_ids": ids}, going_on(self.model, [None, None], False))[:, -1]

    def _in_tokens(self, prompts: list[list[int]], lengths: list[int], counts: list[int]) -> Tensor:
        """The second time, one row speaks and the other still reads."""
        ids = [t for p, n, c in zip(prompts, lengths, counts) for t in p[n : n + c]]
        session = going_on(self.model, [None] * len(ids), False)
        session.attend = self.slots.attend
        session.keep = torch.tensor(counts, device=self.device).cumsum(0) - 1
        self.slots.join([0, 1], lengths, counts, int(bool(lengths[0])), self.device)
        return self._forward((), {"input_ids": torch.tensor(ids, device=self.device)[:, None]}, session)[
            :, -1
        ]


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
