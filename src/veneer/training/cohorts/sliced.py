"""Runs in slices, side by side on one base: parts of steps that wait at the same time are one forward and backward.

Each run stays what it is by itself (its rows, rate, schedule, checkpoints, failures); a part that was computed with
others is handed to it as done. Runs join and leave at any time, asked on any thread; the slices are done by whoever
owns the model.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import BadOption
from veneer.training._seeds import own_randomness
from veneer.training._sliced import Part, Slice, Sliced
from veneer.training._step import terms
from veneer.training.cohorts.shared_forward import shared_losses

AT_ONCE = ("begin", "update", "end")  # short, and followed by parts: those who could share one wait for them


@dataclass
class _Member:
    slices: Iterator[Slice]
    done: Future[None] = field(default_factory=Future)
    coming: Slice | None = None  # None: not looked at yet
    leaving: bool = False
    ended: bool = False


class SlicedCohort:
    """The runs that train on `model`. `tokens`: that were read for each run, filling included."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokens: Counter[str] = Counter()
        self._members: dict[str, _Member] = {}  # whoever acted longest ago first
        self._chosen: list[str] = []
        self._lock = threading.Lock()

    # -- on any thread ---------------------------------------------------------------------------------------------

    def join(self, run: Sliced) -> Future[None]:
        """Let a prepared run in; the future ends with it, with its error, or (after `leave`) cancelled."""
        with self._lock:
            if run.name in self._members:
                raise BadOption(f"a run is already called '{run.name}'.", next_step="choose another name")
            made = self._members[run.name] = _Member(run.slices())
        return made.done

    def leave(self, name: str) -> None:
        """Take a run off after the slice that is being done; its last checkpoint stays. Unknown names are no error."""
        with self._lock:
            if name in self._members:
                self._members[name].leaving = True

    def __len__(self) -> int:
        return len(self._members)

    # -- on the thread that owns the model -------------------------------------------------------------------------

    def coming(self) -> Slice | None:
        """What `do` would do now; None where there is nothing."""
        with self._lock:
            members = dict(self._members)
        for name, member in members.items():
            if member.leaving:
                self._end(name, CancelledError())
            elif member.coming is None:
                self._advance(name)  # the first of a run tells of itself and does nothing
        waiting = {n: m.coming for n, m in self._now().items() if m.coming is not None}
        self._chosen = _choose(waiting)
        return _as_one([waiting[n] for n in self._chosen])

    def smaller(self) -> Slice | None:
        """Half of the runs that were to share the next part, the others after them; None where it is one alone."""
        if len(self._chosen) < 2:
            return None
        self._chosen = self._chosen[: len(self._chosen) // 2]
        members = self._now()
        return _as_one([c for n in self._chosen if (c := members[n].coming) is not None])

    def do(self) -> None:
        """What `coming`, or `smaller` after it, told of. What goes wrong is its run's own error."""
        members = self._now()
        chosen, self._chosen = [n for n in self._chosen if n in members], []
        parts = {n: c for n in chosen if isinstance(c := members[n].coming, Part)}
        try:
            if len(parts) > 1:
                share(self.model, parts)
        except Exception as error:  # in the backward: gradients of all of them may be half there
            for name in chosen:
                self._end(name, error)
            return
        for name in chosen:
            coming = members[name].coming
            self.tokens[name] += coming.tokens if isinstance(coming, Part) else 0
            self._advance(name)

    def close(self) -> None:
        """All runs leave where they are."""
        for name in self._now():
            self._end(name, CancelledError())

    def _now(self) -> dict[str, _Member]:
        with self._lock:
            return dict(self._members)

    def _advance(self, name: str) -> None:
        with self._lock:
            member = self._members.pop(name)
            self._members[name] = member  # to the end of the row
        try:
            member.coming = next(member.slices)
        except StopIteration:
            self._end(name, None)
        except BaseException as error:
            self._end(name, error)

    def _end(self, name: str, error: BaseException | None) -> None:
        with self._lock:
            member = self._members.get(name)
            if member is None or member.ended:
                return
            member.ended = True
        try:
            member.slices.close()  # type: ignore[attr-defined]
        except BaseException as other:
            error = error or other
        with self._lock:  # not before: while a run is here its adapter may be on the model
            self._members.pop(name, None)
        if error is None:
            member.done.set_result(None)
        else:
            with contextlib.suppress(Exception):
                member.done.set_exception(error)


def _choose(waiting: Mapping[str, Slice]) -> list[str]:
    """Whose turn it is: short slices first, then whoever acted longest ago, with all whose part may share its own."""
    for name, coming in waiting.items():
        if coming.kind in AT_ONCE:
            return [name]
    for name, coming in waiting.items():
        if not isinstance(coming, Part):
            return [name]
        return [n for n, c in waiting.items() if isinstance(c, Part)]
    return []


def _as_one(slices: Sequence[Slice]) -> Slice | None:
    if not slices:
        return None
    return Slice(slices[0].kind, sum(s.tokens for s in slices))


def share(model: nn.Module, parts: Mapping[str, Part]) -> None:
    """Gradients of the parts of several runs, by one forward and one backward; each is told its loss.

    A part that raises in the forward is left to its run, which does it by itself and meets the error there.
    """
    from veneer import engine

    began = time.perf_counter()
    first = next(iter(parts.values())).run
    seeds = {name: part.run.dropout_seed(part.at) for name, part in parts.items()}
    with own_randomness(), engine.without_dropout(model):
        model.train()
        try:
            with first.accelerator.autocast():
                found = shared_losses(model, {name: _loss_of(part) for name, part in parts.items()}, seeds)
            losses = {}
            for name, value in found.items():
                with contextlib.suppress(Exception), engine.alone(model, name):
                    losses[name] = _with_terms(parts[name], value)
            finite = [v for v in losses.values() if math.isfinite(float(v.detach()))]
            if finite:
                first.accelerator.backward(torch.stack([v.float() for v in finite]).sum())
        finally:
            model.eval()
    took = (time.perf_counter() - began) / max(1, len(losses))
    for name, loss in losses.items():
        parts[name].done.append((float(loss.detach()), took))


def _loss_of(part: Part) -> Callable[[Any], Tensor]:
    return lambda model: part.run.task.loss(model, part.batch) * part.share


def _with_terms(part: Part, value: Tensor | Exception) -> Tensor:
    if isinstance(value, Exception):
        raise value
    for term in terms(part.run, part.batch) if part.at == 0 else ():
        value = value + term
    return value
