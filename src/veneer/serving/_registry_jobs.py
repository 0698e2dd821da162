"""Jobs beside the registry, in the same file: a kind, a state, a JSON body, and events in their order.

What a job is and which states it has is its own affair; here it is kept, so that it goes on after a restart.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from veneer.errors import UnknownName, nearest

from ._registry_tables import Tables


@dataclass(frozen=True)
class Job:
    id: str
    kind: str
    state: str
    body: Mapping[str, Any]
    created: float  # seconds since 1970
    changed: float


@dataclass(frozen=True)
class JobEvent:
    number: int  # grows with time
    at: float
    body: Mapping[str, Any]


class Jobs:
    """The jobs of a registry: `Jobs(registry.tables)`."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def create(
        self, kind: str, body: Mapping[str, Any], *, state: str = "queued", id: str | None = None
    ) -> Job:
        made = id or f"{kind}-{uuid.uuid4().hex[:24]}"
        now = time.time()
        with self._tables.change() as at:
            at.execute(
                "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?)", (made, kind, state, json.dumps(body), now, now)
            )
        return self.job(made)

    def job(self, id: str) -> Job:
        row = self._tables.row("SELECT * FROM jobs WHERE id = ?", (id,))
        if row is None:
            known = [
                r["id"] for r in self._tables.rows("SELECT id FROM jobs ORDER BY created DESC LIMIT 200")
            ]
            raise UnknownName(
                f"there is no job '{id[:100]}'.",
                nearest=nearest(id, known),
                next_step="GET /v1/fine_tuning/jobs    lists them",
            )
        return Job(
            row["id"], row["kind"], row["state"], json.loads(row["body"]), row["created"], row["changed"]
        )

    def listed(self, kind: str | None = None, state: str | None = None) -> list[Job]:
        """Jobs of a kind and a state, the oldest first."""
        rows = self._tables.rows(
            "SELECT id FROM jobs WHERE (?1 IS NULL OR kind = ?1) AND (?2 IS NULL OR state = ?2) "
            "ORDER BY created, rowid",
            (kind, state),
        )
        return [self.job(row["id"]) for row in rows]

    def counts(self, kind: str) -> dict[str, int]:
        """How many jobs of a kind are in each state."""
        rows = self._tables.rows(
            "SELECT state, COUNT(*) AS jobs FROM jobs WHERE kind = ? GROUP BY state", (kind,)
        )
        return {row["state"]: row["jobs"] for row in rows}

    def update(
        self,
        id: str,
        *,
        state: str | None = None,
        expected: str | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> bool:
        """Change a job; keys of `body` are laid over those that are there. expected: only from this state."""
        with self._tables.change() as at:
            row = at.execute("SELECT state, body FROM jobs WHERE id = ?", (id,)).fetchone()
            if row is None or (expected is not None and row["state"] != expected):
                return False
            merged = json.dumps({**json.loads(row["body"]), **(body or {})})
            at.execute("UPDATE jobs SET state = ?, body = ?, changed = ? WHERE id = ?",
                       (state or row["state"], merged, time.time(), id))  # fmt: skip
        return True

    def claim(self, kind: str, *, of: str = "queued", to: str = "running") -> Job | None:
        """The oldest waiting job, moved to its next state in one step: two workers never have the same one."""
        with self._tables.change() as at:
            row = at.execute(
                "SELECT id FROM jobs WHERE kind = ? AND state = ? ORDER BY created, rowid LIMIT 1", (kind, of)
            ).fetchone()
            if row is None:
                return None
            at.execute("UPDATE jobs SET state = ?, changed = ? WHERE id = ?", (to, time.time(), row["id"]))
        return self.job(row["id"])

    def note(self, id: str, *bodies: Mapping[str, Any]) -> None:
        """Add events to a job, all of them by one write."""
        now = time.time()
        with self._tables.change() as at:
            at.executemany(
                "INSERT INTO job_events (job, at, body) VALUES (?, ?, ?)",
                [(id, now, json.dumps(body)) for body in bodies],
            )

    def events(self, id: str, after: int = 0, limit: int = 100) -> list[JobEvent]:
        rows = self._tables.rows(
            "SELECT id, at, body FROM job_events WHERE job = ? AND id > ? ORDER BY id LIMIT ?",
            (id, after, limit),
        )
        return [JobEvent(r["id"], r["at"], json.loads(r["body"])) for r in rows]
