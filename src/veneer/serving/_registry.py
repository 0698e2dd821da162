"""The registry: immutable versions of adapters in folders named by their content, and the names that point to them.

A version is written beside its place, examined, moved there, and only then entered in the table, in the transaction
that moves its name. A process that is killed at any moment leaves either all of that or nothing that can be seen.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer._disk import sync
from veneer.engine._beside import SETTLED, beside
from veneer.errors import UnknownAdapter, Unsupported, VeneerError, nearest

from ._archive import unpack
from ._registry_content import FILES, Content, allowed_folder, examine, take
from ._registry_look import Looking, check_name, unknown
from ._registry_rows import SERVED, State, Version, enter, point, undone
from ._registry_tables import Tables

DIGEST = re.compile(r"[0-9a-f]{4,64}")

Check = Callable[[Path, Content], None]  # raises a VeneerError where an adapter does not fit the base
Ready = Callable[[str, Path], Any]  # takes a version's digest and folder


class Registry(Looking):
    """Versions, aliases and jobs under `root`: `registry.sqlite` and one folder a version in `versions/`.

    allowed: folders under which adapters may be read. check: raises where an adapter does not fit the served base
    (`check_on(model)` makes one); without it a version stays "registered". base: what tells that base from another,
    so that versions are checked again when the same registry serves another one.
    """

    def __init__(
        self, root: Path, allowed: Sequence[Path] = (), *, check: Check | None = None, base: str = ""
    ) -> None:
        self.root = Path(root).resolve()
        self.allowed = tuple(Path(p).resolve() for p in allowed)
        self.check, self.base = check, base
        self._moving = threading.RLock()  # names and what is served change together
        self.versions_folder = self.root / "versions"
        self.versions_folder.mkdir(parents=True, exist_ok=True)
        self.tables = Tables(self.root / "registry.sqlite")
        self._recover()

    # -- registering ----------------------------------------------------------------------------------------------

    def register(
        self, name: str, source: str | Path | bytes, *, trusted: bool = False, ready: Ready | None = None
    ) -> Version:
        """Take an adapter in and point `name` to it. source: a folder, or the bytes of a zip or tar archive.

        trusted: the folder was given by whoever runs the server, and need not lie under an allowed one.
        ready: called with (digest, folder) before the name moves, so that who serves it knows it by then.
        Raises BadFile, ShapeDiffers, UnknownMethod, Unsupported; then nothing has changed.
        """
        return self._register(name, source, trusted, ready, None)

    def _register(
        self, name: str, source: Any, trusted: bool, ready: Ready | None, seen: tuple[str, str] | None
    ) -> Version:
        check_name(name)
        with self._brought(source, trusted) as (place, content):
            if self.check is not None:
                self.check(place, content)
            with self._moving:
                self._put(place, content)
                if ready is not None:
                    ready(content.digest, self.folder(content.digest))
                with self.tables.change() as at:
                    enter(
                        at,
                        content,
                        "verified" if self.check else "registered",
                        self.base if self.check else "",
                    )
                    if seen is not None:
                        at.execute("INSERT OR REPLACE INTO seen VALUES (?, ?, ?)", (*seen, content.digest))
                    point(at, name, content.digest, "moved")
        return self.version(content.digest, name)

    @contextmanager
    def _brought(self, source: Any, trusted: bool) -> Iterator[tuple[Path, Content]]:
        """The adapter's files in a folder of ours, examined."""
        with beside(self.versions_folder / "incoming", FILES) as place:
            os.chmod(place, 0o755)
            if isinstance(source, bytes):
                unpack(source, place)
            elif trusted:
                folder = Path(source).expanduser().resolve()
                take(folder, place, (folder, folder.parent.parent / "blobs"))
            else:
                take(allowed_folder(source, self.allowed), place, self.allowed)
            yield place, examine(place)

    def _put(self, place: Path, content: Content) -> None:
        """Move a folder to the place that its digest names, unless a version lies there."""
        target = self.folder(content.digest)
        if target.is_dir() and self.tables.row("SELECT 1 FROM versions WHERE digest = ?", (content.digest,)):
            return
        for path in place.iterdir():
            sync(path)
        sync(place)
        os.utime(place)  # new: nobody takes it for one that was left behind
        try:
            os.rename(place, target)
        except OSError:  # a process that was killed before it entered its version left one there
            if target.is_dir() and _digest_there(target) == content.digest:
                return
            shutil.rmtree(target, ignore_errors=True)
            os.rename(place, target)
        sync(self.versions_folder)

    # -- names ----------------------------------------------------------------------------------------------------

    def resolve(self, text: str) -> Version:
        """The version that `name`, `base:name` or `name@digest-prefix` means. Raises UnknownAdapter."""
        called, _, prefix = text.partition("@")
        name = called if self._pointed(called) else called.rpartition(":")[2]
        digest = self._pointed(name)
        if digest is None:
            raise unknown(f"no adapter is called '{text[:150]}'.", name, self.names())
        if prefix:
            digest = self._by_prefix(name, prefix)
        found = self.version(digest, name)
        if found.state == "registered" and self.check is not None:
            found = self._check_again(found)
        if found.state not in SERVED:
            raise Unsupported(
                f"adapter '{text[:150]}' cannot be used, it is {found.state}"
                + (f": {found.reason}" if found.reason else "."),
                next_step="move the name to another version, or register the adapter again",
            )
        return found

    def _pointed(self, name: str) -> str | None:
        found = self.tables.row("SELECT digest FROM aliases WHERE name = ?", (name,))
        return found["digest"] if found else None

    def _by_prefix(self, name: str, prefix: str) -> str:
        """The one version of a name's history whose digest begins so."""
        wanted = prefix.removeprefix("sha256:").lower()
        mine = list(dict.fromkeys(m.digest for m in self.history(name) if m.digest))
        found = [d for d in mine if DIGEST.fullmatch(wanted) and d.startswith(wanted)]
        if len(found) == 1:
            return found[0]
        what = f"{len(found)} versions begin so" if found else "no version of it begins so"
        raise UnknownAdapter(
            f"'{name}@{prefix[:70]}': {what}; expected the first digits (4 or more) of one digest.",
            nearest=[d[:12] for d in mine[-5:]],
            next_step=f"GET /v1/adapters/{name}    lists its versions",
        )

    def move(self, name: str, version: str, *, ready: Ready | None = None) -> Version:
        """Point a name to another version of its history, or to that of any name by its whole digest."""
        check_name(name)
        wanted = version.removeprefix("sha256:").lower()
        whole = len(wanted) == 64 and self.tables.row("SELECT 1 FROM versions WHERE digest = ?", (wanted,))
        return self._repoint(name, wanted if whole else self._by_prefix(name, wanted), "moved", ready)

    def rollback(self, name: str, *, ready: Ready | None = None) -> Version:
        """Point a name back to the version before; of a name that was taken away, to its last one."""
        before = undone(self.history(name), self._pointed(name))
        if before is None:
            raise UnknownAdapter(
                f"'{name}' has no earlier version to go back to.",
                nearest=() if self._pointed(name) else nearest(name, self.names()),
                next_step=f"GET /v1/adapters/{name}    lists its versions",
            )
        return self._repoint(name, before, "rolled back", ready)

    def _repoint(self, name: str, digest: str, action: str, ready: Ready | None) -> Version:
        found = self.version(digest, name)
        with self._moving:
            if found.state not in SERVED:
                self._check_again(found, strict=True)
            if ready is not None:
                ready(digest, self.folder(digest))
            with self.tables.change() as at:
                point(at, name, digest, action)
        return self.version(digest, name)

    def remove(self, name: str, *, gone: Callable[[str], Any] | None = None) -> list[Version]:
        """Take a name away. The versions that no other name can mean any more drain, and are returned.

        gone: called with the digest of each; when it returns, the version is retired.
        """
        with self._moving:
            found = self._remove(name)
            for version in found if gone is not None else ():
                gone(version.digest)  # type: ignore[misc]
                self.retire(version.digest)
        return found

    def _remove(self, name: str) -> list[Version]:
        with self.tables.change() as at:
            if at.execute("SELECT 1 FROM aliases WHERE name = ?", (name,)).fetchone() is None:
                raise unknown(f"no adapter is called '{name[:150]}'.", name, self.names())
            at.execute("DELETE FROM aliases WHERE name = ?", (name,))
            at.execute(
                "INSERT INTO moves (name, digest, action, at) VALUES (?, NULL, 'removed', ?)",
                (name, time.time()),
            )
            gone = at.execute(
                "SELECT DISTINCT digest FROM moves WHERE name = ? AND digest IS NOT NULL AND digest NOT IN "
                "(SELECT m.digest FROM moves m JOIN aliases a ON a.name = m.name WHERE m.digest IS NOT NULL)",
                (name,),
            ).fetchall()
            digests = [row["digest"] for row in gone]
            at.executemany(
                "UPDATE versions SET state = 'draining' WHERE digest = ? AND state IN "
                "('registered', 'verified', 'host', 'device')", [(d,) for d in digests],
            )  # fmt: skip
        found = [self.version(d, name) for d in digests]
        return [v for v in found if v.state == "draining"]

    def retire(self, digest: str) -> None:
        """A draining version has no request left. Its folder stays, so that a rollback can bring it back."""
        with self.tables.change() as at:
            at.execute(
                "UPDATE versions SET state = 'retired' WHERE digest = ? AND state = 'draining'", (digest,)
            )

    def mark(self, digest: str, state: State, reason: str | None = None) -> None:
        """Say where a version is now: "host", "device", or "failed" with the reason."""
        with self.tables.change() as at:
            at.execute("UPDATE versions SET state = ?, reason = ? WHERE digest = ?", (state, reason, digest))

    # -- starting -------------------------------------------------------------------------------------------------

    def serve(self, ready: Ready) -> list[Version]:
        """Hand every version that can be asked for to `ready`; one that it refuses is marked failed."""
        found = [v for v in self.all_versions() if v.state in SERVED]
        for version in found:
            try:
                ready(version.digest, self.folder(version.digest))
            except VeneerError as error:
                self.mark(version.digest, "failed", error.what)
        return [v for v in self.all_versions() if v.state in SERVED]

    def close(self) -> None:
        self.tables.close()

    def _recover(self) -> None:
        """What a process that ended was in the midst of: requests are gone, so nothing drains and nothing is loaded."""
        with self.tables.change() as at:
            at.execute("UPDATE versions SET state = 'retired' WHERE state = 'draining'")
            at.execute("UPDATE versions SET state = 'verified' WHERE state IN ('host', 'device')")
            if (
                self.check is not None
            ):  # what fitted another base, or failed on it, is looked at again when asked for
                at.execute(
                    "UPDATE versions SET state = 'registered', reason = NULL "
                    "WHERE state IN ('verified', 'failed') AND checked_on != ?", (self.base,),
                )  # fmt: skip
        known = {row["digest"] for row in self.tables.rows("SELECT digest FROM versions")}
        for folder in self.versions_folder.iterdir():
            left = folder.name not in known and not folder.name.startswith(".")
            if left and time.time() - folder.stat().st_mtime > SETTLED:
                shutil.rmtree(folder, ignore_errors=True)

    def _check_again(self, found: Version, strict: bool = False) -> Version:
        folder = self.folder(found.digest)
        state: State = "registered"
        reason = None
        try:
            content = examine(folder)
            if content.digest != found.digest:
                raise Unsupported(
                    f"the files of version {found.digest[:12]} have changed on the disk.",
                    next_step="register the adapter again from where it came",
                )
            if self.check is not None:
                self.check(folder, content)
                state = "verified"
        except (VeneerError, OSError) as error:
            if strict:
                raise
            state, reason = "failed", error.what if isinstance(error, VeneerError) else str(error)
        with self.tables.change() as at:
            at.execute(
                "UPDATE versions SET state = ?, reason = ?, checked_on = ? WHERE digest = ?",
                (state, reason, self.base, found.digest),
            )
        return replace(found, state=state, reason=reason)


def _digest_there(folder: Path) -> str | None:
    try:
        return examine(folder).digest
    except (VeneerError, OSError):
        return None
