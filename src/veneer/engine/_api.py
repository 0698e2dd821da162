"""Choosing which adapters act: for whole batches, for a block of code, and for each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ._adapter import Adapter
from ._attach import host_of
from ._frame import local, opened
from ._host import Host
from ._names import session_for


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """{name: Adapter}, in the order in which they came; empty for a bare base."""
    host = model._modules.get("veneer")
    return host.adapters() if isinstance(host, Host) else {}


def activate(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Send whole batches through an adapter, through several on top of one another, or (None) the bare base."""
    host = host_of(model)
    chosen = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    host.set_active(chosen)


@contextmanager
def active(model: nn.Module, names: str | Sequence[str] | None) -> Iterator[None]:
    """`activate` for a block of code; afterwards names and `requires_grad` are what they were."""
    host = host_of(model)
    before = host.active
    flags = {n: [p.requires_grad for p in a.leaves()] for n, a in host.adapters().items()}
    activate(model, names)
    try:
        yield
    finally:
        host.active = tuple(n for n in before if n in host.names)
        for n, values in flags.items():
            if n in host.names:
                for p, flag in zip(host.adapter(n).leaves(), values):
                    p.requires_grad_(flag)


@contextmanager
def rows(
    model: nn.Module,
    names: Sequence[Any] | Mapping[str, Sequence[Any]] | str | None,
    *,
    form: str | None = None,
) -> Iterator[None]:
    """A name (or None, or a list on top of one another) for each row of the batches inside of the block.

    For a base of two towers: {"text": names, "image": names}. One name stands for every row. Threads see their own;
    asynchronous code passes names with the call: model(**batch, adapters=[...]).

    form: in which way rows of several adapters are computed, "bmm", "packed", "kernel", "segments" or "vmap"; a site
    that cannot have it takes another. None: the engine's choice. Under one form a row's bits do not depend on other
    rows' adapters; "packed" alone, whose columns are those of all, rounds differently.
    """
    session = session_for(host_of(model), names, form)
    with opened(session):
        yield


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """The bare base, inside of a step too: a teacher pass. The outer call's frame is untouched."""
    session = session_for(host_of(model), None)
    frame, local.frame = local.frame, None
    try:
        with opened(session):
            yield
    finally:
        local.frame = frame
