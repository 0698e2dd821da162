"""Versions and moves as the tables hold them: plain values, and the statements that write and read them."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ._registry_content import Content

State = Literal["registered", "verified", "host", "device", "draining", "retired", "failed"]
SERVED = ("registered", "verified", "host", "device")  # states in which requests are taken


@dataclass(frozen=True)
class Version:
    """One immutable adapter. `name` is the alias by which it was asked for, "" where it was asked for by digest."""

    digest: str
    name: str
    method: str
    form: str  # of its files: "veneer" or "peft"
    task: str | None
    bytes: int  # of its tensors
    base: Mapping[str, Any]  # fingerprint of the base that it was made for
    created: float  # seconds since 1970
    score: float | None
    metric: str | None  # what the score is, as in "test accuracy"
    state: State
    reason: str | None = None  # with state "failed"


@dataclass(frozen=True)
class Move:
    """One entry of a name's history. digest None: the name was taken away."""

    at: float
    action: Literal["moved", "rolled back", "removed"]
    digest: str | None


def enter(at: sqlite3.Connection, content: Content, state: State, checked_on: str) -> None:
    """A version's row; one that was retired or failed before comes back."""
    at.execute(
        "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?) ON CONFLICT (digest) DO UPDATE SET "
        "state = excluded.state, reason = NULL, checked_on = excluded.checked_on "
        "WHERE state NOT IN ('host', 'device')",
        (content.digest, content.method, content.form, content.task, content.bytes,
         json.dumps(dict(content.base), sort_keys=True), time.time(), content.score, content.metric, state,
         checked_on),
    )  # fmt: skip


def point(at: sqlite3.Connection, name: str, digest: str, action: str) -> None:
    now = at.execute("SELECT digest FROM aliases WHERE name = ?", (name,)).fetchone()
    if now is not None and now["digest"] == digest:
        return
    at.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?)", (name, digest))
    at.execute(
        "INSERT INTO moves (name, digest, action, at) VALUES (?, ?, ?, ?)",
        (name, digest, action, time.time()),
    )


def undone(moves: Sequence[Move], now: str | None) -> str | None:
    """What a name pointed to before, where earlier rollbacks have been undone already."""
    stack: list[str] = []
    for move in moves:
        if move.action == "moved" and move.digest:
            stack.append(move.digest)
        elif move.action == "rolled back" and move.digest in stack:
            del stack[len(stack) - stack[::-1].index(move.digest) :]
    if now is not None and stack and stack[-1] == now:
        stack.pop()
    return stack[-1] if stack else None


def version_of(row: sqlite3.Row, name: str) -> Version:
    return Version(
        row["digest"], name, row["method"], row["form"], row["task"], row["bytes"], json.loads(row["base"]),
        row["created"], row["score"], row["metric"], row["state"], row["reason"],
    )  # fmt: skip
