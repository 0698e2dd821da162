"""Where rows stand: files, folders, hub ids, and objects in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from veneer.data._formats import READERS, Numbered, Raw, read_table
from veneer.errors import BadData, UnknownName, VeneerError, missing_package, nearest

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "validation", "test": "test", "testing": "test",
}  # fmt: skip


def read_raw(spec: Any) -> Raw:
    """The rows of `spec`: a path, a hub id, or rows already in memory (lists, tables, `datasets` objects)."""
    if not isinstance(spec, (str, Path)):
        return _from_memory(spec)
    path = Path(spec).expanduser()
    try:
        if path.is_dir():
            return _from_folder(path)
        if path.is_file():
            return _from_file(path, "")
    except (OSError, ValueError) as error:  # no permission; a name too long or with a NUL
        raise BadData(
            f"{str(spec)!r} cannot be read: {error}",
            next_step="ls -l    shows whether it is there and may be read",
        ) from error
    if path.suffix.lower() in READERS or str(spec).count("/") > 1 or path.is_absolute():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UnknownName(
            f"there is no file or folder {str(spec)!r}.",
            nearest=nearest(path.name, names),
            next_step="a CSV, TSV, JSONL or Parquet file, a folder, a hub id, or builtin:NAME",
        )
    return _from_hub(str(spec))


def _from_file(path: Path, split: str) -> Raw:
    rows, problems = read_table(path, split)
    return Raw({split: rows}, problems)


def _from_folder(path: Path) -> Raw:
    """A folder: of `datasets`, of files named after splits, of images in class folders, or with one file."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved(path)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS and not p.name.startswith("."))
    named = {SPLIT_NAMES[p.stem.lower()]: p for p in files if p.stem.lower() in SPLIT_NAMES}
    if named or len(files) == 1:
        return _joined([_from_file(p, split) for split, p in named.items()] or [_from_file(files[0], "")])
    images = _image_folder(path)
    if images is not None:
        return images
    raise BadData(
        f"the folder {path} holds nothing that veneer reads.",
        next_step="train.csv, validation.csv, test.csv (or .jsonl, .parquet); a folder saved by datasets; or "
        "images in a folder for each class",
    )


def _joined(parts: list[Raw]) -> Raw:
    joined = Raw({})
    for part in parts:
        joined.problems.extend(part.problems)
        joined.labels.update(part.labels)
        for name, rows in part.parts.items():
            if name in joined.parts:
                joined.notes.append(f"a second split that reads as {name!r} was left out")
            joined.parts.setdefault(name, rows)
    return joined


def _image_folder(path: Path) -> Raw | None:
    """Images in a folder for each class, below folders named after splits or not."""
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    split_folders = [p for p in folders if p.name.lower() in SPLIT_NAMES]
    parts = {SPLIT_NAMES[p.name.lower()]: _images(p) for p in split_folders} or {"": _images(path)}
    if not any(parts.values()):
        return None
    return Raw(parts, columns={"image": "image", "label": "label"}, task="image-classify")


def _images(path: Path) -> Numbered:
    found = (
        {"image": str(file), "label": folder.name}
        for folder in sorted(path.iterdir())
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    )
    return list(enumerate(found, 1))


def _saved(path: Path) -> Raw:
    datasets = _datasets(f"reading the folder {path}")
    try:
        return _from_memory(datasets.load_from_disk(str(path)))
    except VeneerError:
        raise
    except Exception as error:
        raise BadData(
            f"the folder {path} is not readable as a saved data set: {error}",
            next_step="datasets.load_from_disk(folder)    says what is missing",
        ) from error


def _from_hub(spec: str) -> Raw:
    datasets = _datasets(f"reading {spec!r}")
    name, _, config = spec.partition(":")
    try:
        return _from_memory(datasets.load_dataset(name, config or None))
    except VeneerError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownName(
            f"{spec!r} is no file, no folder and could not be read as a hub id: {first}",
            next_step="a CSV, TSV, JSONL or Parquet file, a folder, a hub id, or builtin:NAME",
        ) from error


def _datasets(what_for: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_package("datasets", "train", what_for) from error
    return datasets


def _from_memory(value: Any) -> Raw:
    """Lists of rows, {split: rows}, tables of pandas, `datasets` objects."""
    if isinstance(value, dict):
        return _joined([_renamed(_from_memory(rows), str(name)) for name, rows in value.items()])
    if hasattr(value, "features") and hasattr(value, "cast_column"):
        return _from_datasets(value)
    if hasattr(value, "to_dict") and hasattr(value, "iloc"):
        value = value.to_dict("records")
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise BadData(
            f"data of type {type(value).__name__} cannot be read; expected a path or rows.",
            next_step='data="reviews.csv", or a list of dicts',
        )
    numbered = list(enumerate(value, 1))
    wrong = [n for n, row in numbered if not isinstance(row, dict)]
    if wrong:
        raise BadData(
            f"row {wrong[0]} is a {type(numbered[wrong[0] - 1][1]).__name__}; expected a dict a row.",
            next_step='[{"text": ..., "label": ...}, ...]',
        )
    return Raw({"": [(n, dict(row)) for n, row in numbered]})


def split_name(name: str) -> str:
    """train, validation or test, where a name or its beginning ("train_sft") says so; else the name."""
    lowered = name.lower()
    return SPLIT_NAMES.get(lowered) or SPLIT_NAMES.get(re.split(r"[^a-z]", lowered)[0], name)


def _renamed(raw: Raw, name: str) -> Raw:
    raw.parts = {split_name(name): rows for rows in raw.parts.values()}
    return raw


def _from_datasets(table: Any) -> Raw:
    """A `datasets.Dataset`: class numbers become names; images and sounds stay undecoded."""
    import datasets

    names: dict[str, list[str]] = {}
    for column, feature in table.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(feature, (datasets.Image, datasets.Audio)):
            table = table.cast_column(column, type(feature)(decode=False))
        elif isinstance(inner, datasets.ClassLabel):
            names[column] = list(inner.names)
    rows = list(enumerate(table, 1))
    for _, row in rows:
        for column, known in names.items():
            row[column] = _named(row[column], known)
    return Raw({"": rows}, labels=names)


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(v, names) for v in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None  # -1: not given
