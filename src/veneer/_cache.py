"""Where the project keeps what it made once for this machine: one folder, which the environment may name."""

from __future__ import annotations

import os
from pathlib import Path

from veneer.errors import VeneerError


def cache_folder() -> Path:
    """$VENEER_CACHE, or ~/.cache/veneer; made when it is missing."""
    folder = Path(os.environ.get("VENEER_CACHE") or Path.home() / ".cache" / "veneer").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VeneerError(
            f"the cache folder {folder} cannot be made: {error.strerror}.",
            next_step="VENEER_CACHE=FOLDER     names a folder that can be written",
        ) from error
    return folder
