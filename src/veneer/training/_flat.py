"""Flat tokens in a run: used where they were seen to give what padding gives, on the first batch that has padding.

The base's structure says whether it can be flat at all. Whether everything on it (its blocks, its head, the method)
treats sequences in one row as it treats rows is seen, not assumed: loss and gradients of one batch both ways, without
dropout. Where they differ the run goes on with padding and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer import engine
from veneer.tasks import Batch
from veneer.training._evaluate import evaluating
from veneer.training._kept import Played, played
from veneer.training._seeds import own_randomness

if TYPE_CHECKING:
    from veneer.training._loop import Run

NEAR = {torch.float32: 1e-4, torch.float64: 1e-8}  # of loss and gradients, relative; rougher types below
ROUGH = 0.05
FEW = 2  # shortest rows that are looked at, with a longer one: the look runs them twice, with gradients
LONGER = 1.1  # times the shortest: a row beside which the others are padded


class FlatTokens:
    """Whether a run's steps compute no padding. why_not: None until a batch with padding came, "" where they do."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.why_not: str | None = None if run.settings.flat else "flat=False"

    @contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        """Calls of the model inside of the block compute no padding, where that is known to be right."""
        if self.why_not is None and _has_padding(batch):
            self.why_not = self._look(batch)
            if self.why_not:
                self.run.notes.append(f"padding is computed: {self.why_not}")
        if self.why_not == "":
            with engine.flat_tokens(self.run.model):
                yield
        else:
            yield

    def _look(self, batch: Batch) -> str:
        """Why not, on this batch; "" where nothing speaks against it."""
        model = self.run.model
        if "veneer" not in model._modules:
            return "no adapter is on the base"
        found = engine.why_not_flat(model)
        if found:
            return found
        batch, states = self._few(batch)
        with own_randomness(), evaluating(model), played(model, states):
            expected = self._gradients(batch)
            try:
                with engine.flat_tokens(model):
                    ours = self._gradients(batch)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a base or a method says of shapes that it does not know
                return f"the base or the method fails on flat tokens ({type(error).__name__}: {error})"
        near = NEAR.get(self._type(), ROUGH)
        apart = max(_distance(a, b) for a, b in zip(ours, expected))
        return "" if apart <= near else f"flat, loss or gradients differ by {apart:.0e} of their size"

    def _few(self, batch: Batch) -> tuple[Batch, Played | None]:
        """The shortest rows of this step and the next longer one, with what is kept of them: a look at a whole batch
        costs four steps. The batch itself where none is longer, or where nothing is kept of so few."""
        rows = self.run.rows_of(self.run.step_now)
        kept = self.run.frozen.of(batch)
        if len(rows) <= FEW or any("input_ids" not in row for row in rows):
            return batch, kept
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        longer = [row for row in rows[FEW:] if len(row["input_ids"]) >= LONGER * len(rows[0]["input_ids"])]
        few = self.run.part_of([*rows[:FEW], *longer[:1]])
        states = self.run.frozen.of(few)
        if (states is None) != (kept is None) or not _has_padding(few):
            return batch, kept
        return few, states

    def _gradients(self, batch: Batch) -> list[Tensor]:
        run = self.run
        backward = getattr(run.recipe, "backward", True) is not False
        trained = [p for p in run.subject.parameters() if p.requires_grad] if backward else []
        with torch.set_grad_enabled(bool(trained)), run.accelerator.autocast():
            loss = run.task.loss(run.model, batch)
            found = torch.autograd.grad(loss, trained, allow_unused=True) if trained else ()
        return [loss.detach(), *(g.detach() for g in found if g is not None)]

    def _type(self) -> Any:
        half = self.run.settings.mixed_precision in ("bf16", "fp16")
        return None if half else engine.host_of(self.run.model).dtype


def _has_padding(batch: Batch) -> bool:
    mask: Any = batch.inputs.get("attention_mask")
    return isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all())


def _distance(one: Tensor, two: Tensor) -> float:
    """The norm of the difference over the norm."""
    one, two = one.double(), two.double()
    value = float((one - two).norm() / two.norm().clamp(min=1e-12))
    return value if value == value else float("inf")
