"""Shells: the base under each kind of head that adapters read with, its weights in memory once.

Adapters whose heads have different numbers of labels share a shell, and so a forward: its output layer has as many
rows as are ever asked for, an adapter fills the first of them, and of a row's logits only its own are read.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer import engine
from veneer.edits import build
from veneer.engine._attach import _plan_for
from veneer.engine._store import Checked, Read
from veneer.errors import ShapeDiffers, Unsupported, VeneerError
from veneer.tasks import Task

from ._registry_check import shadow

WIDE = 32  # labels of the shell that adapters share; the next powers of two above it for more

Opener = Callable[[str | None, int | None], Any]  # (task, labels) -> a Base
READ = ("classify", "multilabel", "regress", "rank", "tag", "seq2seq")  # tasks that are answered from a text
LABELLED = READ[:-1]
_OPENING = threading.Lock()  # transformers changes torch for all threads while it opens a model


@dataclass
class Shell:
    """A base with one kind of head. labels: rows of its output layer, None where it has none of its own."""

    model: nn.Module
    feeder: Any
    labels: int | None
    output: tuple[str, ...]  # names of the output layer's parameters
    wide: bool

    @property
    def body(self) -> nn.Module:
        """What ends before the head."""
        return getattr(self.model, getattr(self.model, "base_model_prefix", "") or "", self.model)


class Shells:
    """Opens shells when they are first needed. Used by one thread at a time."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._open: dict[tuple[str, int | None, bool], Shell] = {}
        self._pool: dict[str, Tensor] = {}  # parameters by their name in the body

    def candidates(self, task: Task | None) -> list[Callable[[], Shell]]:
        """The shells to try for an adapter, the one that most others share first."""
        if task is None or task.name not in LABELLED:
            name = None if task is None else task.name
            return [lambda: self._shell(_class_of(name), name, None, False)]
        count = task.num_labels or 1
        wide = WIDE
        while wide < count:
            wide *= 2
        head = _class_of(task.name)
        return [
            lambda: self._shell(head, task.name, wide, True),
            lambda: self._shell(head, task.name, count, False),
        ]

    def any(self) -> Shell:
        """A shell to read the bare base with."""
        return next(iter(self._open.values()), None) or self.candidates(None)[0]()

    def _shell(self, head: str, task: str | None, labels: int | None, wide: bool) -> Shell:
        key = (head, labels, wide)
        found = self._open.get(key)
        if found is None:
            base = self._opener(task, labels)
            base.model.eval()
            if base.tokenizer is None:
                raise Unsupported(
                    f"{base.name} has no tokenizer, so no text can be read with it.",
                    next_step="serve a base that brings a tokenizer",
                )
            self.share(base.model)
            output = _output_of(base.model, labels)
            found = self._open[key] = Shell(base.model, base.tokenizer, labels, output, wide)
        return found

    def share(self, model: nn.Module) -> None:
        """Put the tensors that another shell has already in place of equal ones."""
        prefix = getattr(model, "base_model_prefix", "") + "."
        for name, own in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            known = self._pool.setdefault(name.removeprefix(prefix), own)
            if (
                known is own
                or known.shape != own.shape
                or known.dtype != own.dtype
                or not torch.equal(known, own)
            ):
                continue
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(parent)
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = known  # type: ignore[assignment]


def _class_of(task: str | None) -> str:
    from veneer.bases._open import HEADS

    return HEADS.get(task, "") if task else ""


def _output_of(model: nn.Module, labels: int | None) -> tuple[str, ...]:
    """Names of the parameters outside of the body that have a row for each label."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    if labels is None:
        return ()
    outside = [(n, p) for n, p in model.named_parameters() if not n.startswith(prefix)]
    return tuple(n for n, p in outside if p.shape[0] == labels)


def attach(shell: Shell, read: Read, version: str) -> Any:
    """Attach an adapter that was read to a shell; return the Adapter. Raises what `veneer.load` raises."""
    made = read if not shell.wide else _widened(shell, read)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return engine.load(shell.model, made, version, activate=False)


def _widened(shell: Shell, read: Read) -> Read:
    """The adapter with rows of zeros for the labels that it has not."""
    if not read.record:
        raise Unsupported(
            "an adapter in this form says nothing of its labels.",
            next_step="veneer.load and veneer.save it with labels=, or serve what veneer train wrote",
        )
    record = read.record
    missing = [n for n in shell.output if f"{n}/W" not in read.values]
    if missing or not shell.output:
        raise Unsupported(
            "the head of this adapter is the base's own.",
            next_step="train it with veneer train, which saves the head beside it",
        )
    host = engine.host_of(shell.model, make=True)
    try:
        method = build(record["method"], **record["options"])
        plan = _plan_for(shell.model, method, whole=tuple(record.get("whole", ())), **record.get("plan", {}))
    finally:
        if not host.names:
            host.leave()
    values = dict(read.values)
    for entry in plan.entries:
        value, site = values.get(entry.key), plan.sites[entry.first].site
        at_output = (
            f"{site.module}.{site.parameter}" in shell.output or f"{site.module}.weight" in shell.output
        )
        if value is not None and at_output and tuple(value.shape) != entry.shape:
            values[entry.key] = _with_rows(value, entry.shape, entry.key)
    return replace(read, values=Checked(values))


def _with_rows(value: Tensor, shape: tuple[int, ...], key: str) -> Tensor:
    if value.dim() != len(shape) or tuple(value.shape[1:]) != shape[1:] or value.shape[0] > shape[0]:
        raise ShapeDiffers(
            f"'{key}' is {tuple(value.shape)}, and {shape} is the shared head's.",
            next_step="train it again on this base",
        )
    return torch.cat([value, value.new_zeros(shape[0] - value.shape[0], *shape[1:])])


def fit(shells: Shells, task: Task | None, read: Read, version: str) -> Shell:
    """The first shell on which the adapter goes; it is attached there."""
    failure: VeneerError | None = None
    for candidate in shells.candidates(task):
        try:
            shell = candidate()
            attach(shell, read, version)
            return shell
        except VeneerError as error:
            failure = error
    assert failure is not None
    raise failure


def spec_opener(spec: str, *, dtype: Any = None, quantise: str | None = None, model: Any = None) -> Opener:
    """Opens shells of the base that `spec` names.

    model: (an open causal model of the same base, its tokenizer): read without being opened again.
    """
    from veneer.bases import Base, open_base

    ghost = None if model is None else shadow(model[0])  # now: later its adapters may be changing

    def open_shell(task: str | None, labels: int | None) -> Any:
        if ghost is not None and task in (None, "lm", "instruct"):
            return Base(ghost, spec, spec, "transformers", tokenizer=model[1])
        with _OPENING:
            return open_base(spec, task=task, num_labels=labels, dtype=dtype, quantise=quantise, seed=0)

    return open_shell
