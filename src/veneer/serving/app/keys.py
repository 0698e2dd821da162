"""Keys: who may use the server, and who may manage it. Only hashes are kept, in memory and in the file.

A key is random and long, so that a plain SHA-256 of it cannot be turned back. The file is read again when it
changes: a new key works at once, one that is taken out stops working.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import BadFile, BadOption, nearest
from veneer.interop._folder import put_file

SCOPES = ("use", "manage")
LOOK_AGAIN = 1.0  # seconds between two looks at the file


@dataclass(frozen=True)
class Key:
    """Whose request it is. `adapters`: the names that it may ask for, None for all of them."""

    name: str
    scopes: frozenset[str] = frozenset(SCOPES)
    adapters: frozenset[str] | None = None
    in_flight: int | None = None
    tokens_per_minute: int | None = None


ANYBODY = Key("")  # of a server without keys


class Keys:
    """The keys that a server knows.

    Args:
        given: keys of the command line, with both scopes.
        file: a JSON file as `new_key` writes it.
    """

    def __init__(self, given: Sequence[str] = (), file: Path | None = None) -> None:
        self._given = {digest_of(k): Key(f"given-{i + 1}") for i, k in enumerate(given)}
        self._file, self._seen, self._looked = file, None, -LOOK_AGAIN  # type: ignore[var-annotated]
        self._of_file: dict[str, Key] = {}
        if any(not k for k in given):
            raise BadOption(
                "An empty API key was given.", next_step="veneer serve --new-key NAME --keys FILE"
            )
        if file is not None:
            self._of_file, self._seen = read_keys(file), _stamp(file)

    @property
    def required(self) -> bool:
        return bool(self._given) or self._file is not None

    def find(self, secret: str) -> Key | None:
        """The key whose secret this is."""
        self._refresh()
        digest = digest_of(secret)  # looked up by its hash: timing tells nothing of the secret
        return self._given.get(digest) or self._of_file.get(digest)

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked < LOOK_AGAIN:
            return
        self._looked = now
        stamp = _stamp(self._file)
        if stamp != self._seen:
            try:
                self._of_file, self._seen = read_keys(self._file), stamp
            except BadFile:  # half an edit: yesterday's keys go on
                return


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(file: Path) -> dict[str, Key]:
    """The keys of a file, by the hash of each."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["keys"]
        return {row["sha256"]: _key(row) for row in found}
    except FileNotFoundError:
        raise BadFile(
            f"There is no file of keys at {file}.",
            next_step=f"veneer serve --new-key NAME --keys {file}    writes it",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(
            f"The keys in {file} cannot be read: {type(error).__name__}: {error}.",
            next_step=f"veneer serve --new-key NAME --keys {file}    shows the form in a fresh file",
        ) from None


def _key(row: dict[str, Any]) -> Key:
    adapters = row.get("adapters")
    scopes = frozenset(row["scopes"])
    if scopes - set(SCOPES) or len(row["sha256"]) != 64:
        raise ValueError(
            f"the key {row['name']!r} has scopes {sorted(scopes)}, a hash of {len(row['sha256'])}"
        )
    return Key(
        row["name"],
        scopes,
        None if adapters is None else frozenset(adapters),
        row.get("in_flight"),
        row.get("tokens_per_minute"),
    )


def new_key(file: Path, name: str, scopes: Sequence[str] = ("use",)) -> str:
    """Make a key called `name`, write its hash into `file`, and give back its secret, which is kept nowhere."""
    for scope in scopes:
        if scope not in SCOPES:
            raise BadOption(
                f"No scope is called '{scope}'.",
                nearest=nearest(scope, SCOPES) or SCOPES,
                next_step="--scope use, --scope manage",
            )
    rows: list[dict[str, Any]] = []
    if file.exists():
        if any(key.name == name for key in read_keys(file).values()):
            raise BadOption(
                f"{file} has a key called '{name}'.",
                next_step="take another name, or delete that key's lines",
            )
        rows = json.loads(file.read_text(encoding="utf-8"))["keys"]
    secret = "vn-" + secrets.token_urlsafe(32)
    rows.append(
        {"name": name, "scopes": list(scopes), "sha256": digest_of(secret), "created": int(time.time())}
    )
    put_file(file, lambda place: _write(place, json.dumps({"keys": rows}, indent=2) + "\n"))
    return secret


def _write(place: Path, text: str) -> None:
    """For the owner's eyes alone from the first byte on."""
    with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        out.write(text)


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
