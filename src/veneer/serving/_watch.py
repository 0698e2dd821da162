"""A folder whose adapters are served: one that is dropped in appears, one that is still being copied waits.

The folder is polled. An adapter is taken when its files are whole by their own account (the JSON ends, the tensors'
header tells as many bytes as there are) and have not changed since the look before.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

from veneer.errors import VeneerError

from ._registry import Ready, Registry, Version
from ._registry_content import CONFIG, CONFIG_TENSORS, FILES, RECORD, TENSORS

log = logging.getLogger(__name__)
LONGEST_HEADER = 100 << 20  # bytes, as the safetensors format allows


class Watcher:
    """Looks into `folder` every `every` seconds. ready: as `Registry.register` takes it.

    A sub-folder's name is the adapter's. An alias that was moved by hand since stays where it is until the files
    change. `failures` says why a sub-folder was not taken; it is tried again when its files change.
    """

    def __init__(
        self, registry: Registry, folder: Path, ready: Ready | None = None, *, every: float = 2.0
    ) -> None:
        self.registry, self.folder, self.ready, self.every = registry, Path(folder).resolve(), ready, every
        self.failures: dict[str, str] = {}
        self._before: dict[str, str] = {}  # sub-folder -> its signature at the look before
        self._refused: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self, *, patient: bool = True) -> list[Version]:
        """One look. patient=False takes what is whole at once, as a server does when it starts."""
        taken: list[Version] = []
        now: dict[str, str] = {}
        for place in self._places():
            signature = signature_of(place)
            now[place.name] = signature
            known = self.registry.tables.row("SELECT signature FROM seen WHERE place = ?", (str(place),))
            if (known and known["signature"] == signature) or self._refused.get(place.name) == signature:
                continue
            settled = not patient or self._before.get(place.name) == signature
            if settled and is_whole(place):
                found = self._take(place, signature)
                taken += [found] if found else []
        self._before = now
        self.failures = {k: v for k, v in self.failures.items() if k in now}
        return taken

    def _take(self, place: Path, signature: str) -> Version | None:
        try:
            found = self.registry._register(place.name, place, True, self.ready, (str(place), signature))
        except (VeneerError, OSError) as error:
            self.failures[place.name] = error.what if isinstance(error, VeneerError) else str(error)
            self._refused[place.name] = signature
            log.warning("adapter '%s' was not taken: %s", place.name, self.failures[place.name])
            return None
        self.failures.pop(place.name, None)
        return found

    def _places(self) -> list[Path]:
        try:
            found = sorted(self.folder.iterdir())
        except OSError as error:
            log.warning("the adapters' folder cannot be read: %s", error.strerror)
            return []
        return [
            p
            for p in found
            if not p.name.startswith(".") and p.is_dir() and p.resolve().is_relative_to(self.folder)
        ]

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="veneer-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.every):
            try:
                self.look()
            except Exception:  # a look that fails is made again
                log.exception("the adapters' folder could not be looked at")


def signature_of(place: Path) -> str:
    """Name, size and time of change of an adapter's files."""
    found = []
    for name in FILES:
        try:
            facts = (place / name).stat()
        except OSError:
            continue
        found.append([name, facts.st_size, facts.st_mtime_ns])
    return json.dumps(found)


def is_whole(place: Path) -> bool:
    """Whether nothing is missing from a folder's files by their own account."""
    for text, tensors in ((RECORD, TENSORS), (CONFIG, CONFIG_TENSORS)):
        if (place / text).is_file() and (place / tensors).is_file():
            return _json_ends(place / text) and _tensors_end(place / tensors)
    return False


def _json_ends(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return True


def _tensors_end(path: Path) -> bool:
    """The header of a safetensors file ends with the last byte that the file should have."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= LONGEST_HEADER:
                return False
            header = json.loads(file.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
            return path.stat().st_size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
