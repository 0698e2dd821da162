"""The frame: what is known of one forward pass. It belongs to the call and travels in a thread-local.

Two levels. A *session* is opened by `rows(...)` or by `generate` and lives over many calls: the names by row, where
the prompt was, what was inserted, what `condition` returned. A *call* is made by a door, then frozen: the program
(which edits run at which module) and the facts of the rows. Checkpointed blocks carry the call's frame as a keyword,
so that recomputation, on whatever thread, sees the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Names = tuple[str, ...]  # the adapters on top of one another, lowest first


@dataclass
class Session:
    """What lives longer than one forward. `rows` is None where the active adapters serve the whole batch."""

    host: Any
    rows: list[Names] | None = None
    by_stack: dict[str, list[Names]] | None = None  # two towers: names by row of each
    names: Names | None = None  # for the whole batch, in place of the host's active ones
    generating: bool = False
    prompt: Tensor | None = None  # (rows, tokens when generation began) bool
    mask: Tensor | None = (
        None  # (rows, tokens of the call) bool: real ones, where the call's own mask is of 4 axes
    )
    inserted: Any = None  # the Insertion of `tokens` edits made when generation began
    conditions: dict[Any, dict[str, Tensor]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # inputs for adapters, given when generation began
    banks: Any = None  # for compiled code: the live banks, each with its slots
    adapters: dict[str, Any] | None = None  # those that a generation began with
    form: str | None = None  # in which all rows are computed; None: the engine chooses
    attend: Any = None  # a loop's own attention, in place of the base's (see `_joined`)
    keep: Tensor | None = None  # the rows of the backbone's output that go on to its head


@dataclass
class Frame:
    """One call, frozen before the first block runs; `captured` and `taps` are written by blocks and read later."""

    host: Any
    program: dict[str, Any]
    session: Session | None = None
    at: dict[str, Any] = field(default_factory=dict)  # stack -> At
    captured: dict[Any, Any] = field(default_factory=dict)
    taps: dict[str, dict[int, Tensor]] | None = None  # stack -> block -> (rows, tokens, width)
    key_mask: dict[str, Tensor] = field(
        default_factory=dict
    )  # stack -> (rows, keys): inserted padding, where a base has no mask
    inserted: Any = None
    adapters: dict[str, Any] = field(default_factory=dict)  # by name, as they were when the call began
    names: Any = ()  # the names of the whole batch, or of each row
    seeds: Any = field(default_factory=lambda: _seeds())  # of adapters' dropout, where a loop gave some
    prefix: Any = field(
        default_factory=lambda: _prefix()
    )  # states recorded or played back, where a loop says so
    flat: Any = field(default_factory=lambda: local.flat)  # the host whose calls compute no padding
    layout: Any = None  # inside of a flat backbone: where its tokens stand


def names_in(*rows: Any) -> set[str]:
    """All names in stacks of names, one for the whole batch or one for each row."""
    found: set[str] = set()
    for each in rows:
        for names in [each] if each and isinstance(each[0], str) else each or ():
            found.update(names)
    return found


class _Local(threading.local):
    def __init__(self) -> None:  # once for each thread: compiled code guards on the attributes being there
        self.frame: Frame | None = None
        self.session: Session | None = None
        self.seeds: Any = None
        self.prefix: Any = None
        self.flat: Any = None
        self.read: set[str] | None = None  # names of the facts that methods read, where somebody asks


local: _Local = _Local()


def _seeds() -> Any:
    return local.seeds


def _prefix() -> Any:
    return local.prefix


def current(host: Any) -> Frame | None:
    """The frame of this call, if it belongs to `host`; another model's frame counts as none."""
    frame = local.frame
    return frame if frame is not None and frame.host is host else None


def session_of(host: Any) -> Session | None:
    session = local.session
    return session if session is not None and session.host is host else None


@contextmanager
def entered(frame: Frame | None) -> Iterator[None]:
    before = local.frame
    local.frame = frame
    try:
        yield
    finally:
        local.frame = before


@contextmanager
def opened(session: Session | None) -> Iterator[None]:
    before = local.session
    local.session = session
    try:
        yield
    finally:
        local.session = before
