"""The registry's tables: one SQLite file in write-ahead mode, one connection that writes, one that reads.

Every change is one transaction that is on the disk before its call returns. A reader never waits for a writer.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer.errors import BadFile

SCHEMA = 1
TABLES = """
CREATE TABLE IF NOT EXISTS versions (
    digest TEXT PRIMARY KEY, method TEXT NOT NULL, form TEXT NOT NULL, task TEXT, bytes INTEGER NOT NULL,
    base TEXT NOT NULL, created REAL NOT NULL, score REAL, metric TEXT, state TEXT NOT NULL, reason TEXT,
    checked_on TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS aliases (name TEXT PRIMARY KEY, digest TEXT NOT NULL REFERENCES versions);
CREATE TABLE IF NOT EXISTS moves (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, digest TEXT, action TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS moves_by_name ON moves (name, id);
CREATE TABLE IF NOT EXISTS seen (place TEXT PRIMARY KEY, signature TEXT NOT NULL, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, state TEXT NOT NULL, body TEXT NOT NULL,
    created REAL NOT NULL, changed REAL NOT NULL);
CREATE INDEX IF NOT EXISTS jobs_by_kind ON jobs (kind, created);
CREATE TABLE IF NOT EXISTS job_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL REFERENCES jobs, at REAL NOT NULL, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS events_by_job ON job_events (job, id);
"""


class Tables:
    """The two connections. Usable from any thread; several processes may open one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writing, self._reading = threading.RLock(), threading.Lock()
        try:
            self._writer, self._reader = _connect(path), _connect(path)
            with self.change() as at:
                known = at.execute("PRAGMA user_version").fetchone()[0]
                for statement in TABLES.split(";\n"):
                    at.execute(statement)
                at.execute(f"PRAGMA user_version = {max(known, SCHEMA)}")
        except sqlite3.Error as error:
            raise BadFile(
                f"the registry '{path}' cannot be opened ({error}).",
                next_step="move that file away: the adapters beside it can be registered again",
            ) from None
        if known > SCHEMA:
            self.close()
            raise BadFile(
                f"the registry '{path}' has schema {known}; this version reads up to {SCHEMA}.",
                next_step="pip install --upgrade veneer",
            )

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on the disk at the end, or none of it."""
        with self._writing:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._reading:
            return self._reader.execute(statement, values).fetchall()

    def row(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Row | None:
        found = self.rows(statement, values)
        return found[0] if found else None

    def close(self) -> None:
        with self._writing, self._reading:
            self._writer.close()
            self._reader.close()


def _connect(path: Path) -> sqlite3.Connection:
    made = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    made.row_factory = sqlite3.Row
    made.execute("PRAGMA journal_mode = WAL")
    made.execute("PRAGMA synchronous = FULL")  # what was answered survives the loss of power too
    made.execute("PRAGMA foreign_keys = ON")
    return made
