"""Looking into a registry: which names there are, what they point to, and what they pointed to before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from veneer.errors import BadOption, UnknownAdapter, nearest

from ._registry_rows import Move, Version, version_of
from ._registry_tables import Tables

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Looking:
    """What is read of the tables; nothing here changes them."""

    tables: Tables
    versions_folder: Path

    def names(self) -> list[str]:
        return [row["name"] for row in self.tables.rows("SELECT name FROM aliases ORDER BY name")]

    def aliases(self) -> dict[str, Version]:
        """Every name and the version that it points to."""
        rows = self.tables.rows(
            "SELECT a.name, v.* FROM aliases a JOIN versions v USING (digest) ORDER BY a.name"
        )
        return {row["name"]: version_of(row, row["name"]) for row in rows}

    def version(self, digest: str, name: str = "") -> Version:
        row = self.tables.row("SELECT * FROM versions WHERE digest = ?", (digest,))
        if row is None:
            raise UnknownAdapter(
                f"there is no version {digest[:64]}.", next_step="GET /v1/adapters    lists all"
            )
        return version_of(row, name)

    def versions(self) -> list[Version]:
        """The versions that names point to, a name each."""
        return list(self.aliases().values())

    def versions_of(self, name: str) -> list[Version]:
        """The versions of one name's history, the newest last."""
        return [
            self.version(d, name) for d in dict.fromkeys(m.digest for m in self.history(name) if m.digest)
        ]

    def all_versions(self) -> list[Version]:
        """Every version that was ever registered, the newest last."""
        return [
            version_of(r, "") for r in self.tables.rows("SELECT * FROM versions ORDER BY created, digest")
        ]

    def history(self, name: str) -> list[Move]:
        """What a name pointed to, the oldest first."""
        rows = self.tables.rows("SELECT at, action, digest FROM moves WHERE name = ? ORDER BY id", (name,))
        return [Move(r["at"], r["action"], r["digest"]) for r in rows]

    def folder(self, digest: str) -> Path:
        """Where a version's files lie; they never change."""
        return self.versions_folder / digest


def check_name(name: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadOption(
            f"the adapter name {str(name)[:150]!r} cannot be used: expected 1 to 128 letters, digits, '.', '_' or "
            "'-', the first a letter or a digit.",
            next_step="choose another name",
        )


def unknown(what: str, name: str, names: Sequence[str]) -> UnknownAdapter:
    return UnknownAdapter(
        what, nearest=nearest(name, names), next_step="GET /v1/adapters    lists those that are there"
    )
