"""What a version is made of: the files of an adapter's folder, read once, counted, checked and digested.

The digest is over the content alone (tensors, what changes the answers, the base that it was made for), so that one
adapter has one version wherever it came from and whatever it is called.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.edits import build
from veneer.engine import read_record, read_tensors
from veneer.engine._store import RECORD, TENSORS, _digest_all, inside
from veneer.errors import BadFile, ShapeDiffers, Unsupported, VeneerError

CONFIG, CONFIG_TENSORS = "adapter_config.json", "adapter_model.safetensors"
CARD = "README.md"
FILES = (RECORD, TENSORS, CONFIG, CONFIG_TENSORS, CARD)  # what is ever taken from a folder or an archive
LARGEST = 8 << 30  # bytes of one file
LARGEST_TEXT = 16 << 20

# What of veneer.json changes an answer; names, places and the story of the training do not.
MEANT = ("format", "method", "options", "plan", "whole", "of", "seed", "dtype", "drawn", "task", "peft")
UNMEANT = ("peft_version", "inference_mode")  # of adapter_config.json


@dataclass(frozen=True)
class Content:
    """A folder's adapter, as far as it can be known without a base."""

    digest: str
    method: str
    form: str  # "veneer" or "peft"
    task: str | None
    bytes: int
    base: Mapping[str, Any]
    score: float | None = None
    metric: str | None = None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds the two files of an adapter, in one of the two forms."""
    return any(
        (folder / text).is_file() and (folder / tensors).is_file()
        for text, tensors in ((RECORD, TENSORS), (CONFIG, CONFIG_TENSORS))
    )


def allowed_folder(path: str | os.PathLike[str], roots: Sequence[Path]) -> Path:
    """The folder that `path` means, links followed, if it lies under one of `roots`.

    A relative path is looked for under each root. The refusal is the same for what is outside and for what is not
    there, so that it tells nothing about the machine.
    """
    text = os.fspath(path)
    given = Path(text)
    candidates = [given] if given.is_absolute() else [root / given for root in roots]
    for candidate in candidates if text and "\0" not in text else ():
        try:
            real = candidate.resolve(strict=True)
        except (OSError, RuntimeError):
            continue
        if real.is_dir() and any(real.is_relative_to(root) for root in roots):
            return real
    raise BadFile(
        f"'{given.name[:80]}' is no folder under those that adapters may be read from.",
        next_step="put it into one of them, or upload it as an archive",
    )


def take(source: Path, into: Path, roots: Sequence[Path]) -> None:
    """Copy an adapter's files. A link is followed only to where files may be read; nothing else is opened."""
    if not is_adapter(source):
        inside(
            source, CONFIG_TENSORS if (source / CONFIG).is_file() else TENSORS
        )  # names a pickle where one lies
        inside(source, RECORD)
    for name in FILES:
        path = source / name
        if not path.exists():
            continue
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in (*roots, source)):
            raise BadFile(f"'{name}' is a link that leads out of the folders that adapters may be read from.",
                          next_step="put the file itself there, if you trust it")  # fmt: skip
        _copy(real, into / name, LARGEST if name.endswith(".safetensors") else LARGEST_TEXT)


def _copy(source: Path, target: Path, largest: int) -> None:
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        opened = os.open(source, flags)
    except OSError as error:
        raise BadFile(
            f"'{source.name}' cannot be read ({error.strerror}).",
            next_step="check the file's owner and rights",
        ) from None
    with os.fdopen(opened, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > largest:
            raise BadFile(
                f"'{source.name}' is no regular file of at most {largest:,} bytes.",
                next_step="save the adapter again",
            )
        with target.open("wb") as written:
            shutil.copyfileobj(file, written, 1 << 20)


def examine(folder: Path) -> Content:
    """Read a folder's adapter whole and check all that needs no base: method, options, shapes, finite values."""
    if (folder / RECORD).is_file():
        return _examine_own(folder)
    if (folder / CONFIG).is_file():
        return _examine_peft(folder)
    raise BadFile(
        f"this is no adapter: there is neither {RECORD} nor {CONFIG}.",
        nearest=sorted(p.name for p in folder.iterdir())[:5],
        next_step="register the folder that veneer.save or HF PEFT wrote",
    )


def _examine_own(folder: Path) -> Content:
    record = read_record(folder)
    method = build(record["method"], **record["options"])
    tensors = read_tensors(folder / TENSORS)
    _check_shapes(record.get("tensors"), tensors)
    _check_finite(tensors)
    if "sha256" in record and record["sha256"] != _digest_all(tensors):
        raise BadFile("the tensors are not those that were saved (their SHA-256 differs).",
                      next_step="copy the folder again")  # fmt: skip
    if record.get("of"):
        raise Unsupported(
            f"{method.key} combines other adapters ({', '.join(map(str, record['of'][:3]))}), and a version is one "
            "adapter.",
            next_step="merge it, or serve its members",
        )
    task = record.get("task")
    base = record.get("base", {}).get("fingerprint") or {}
    score, metric = _score(record)
    return Content(
        _digest({k: record[k] for k in MEANT if k in record}, base, tensors), method.key, "veneer",
        task.get("name") if isinstance(task, Mapping) else None, _size(tensors), base, score, metric,
    )  # fmt: skip


def _examine_peft(folder: Path) -> Content:
    from veneer.interop._config import read_json, type_of
    from veneer.interop._converter import converters
    from veneer.interop.peft import OTHERS

    from ._reading_tasks import task_of

    path, raw = read_json(folder)
    known = converters()
    kind = known[type_of(path, raw, OTHERS, {t: c.methods[0] for t, c in known.items()})]
    tensors = read_tensors(folder / CONFIG_TENSORS)
    if not tensors:
        raise BadFile(f"{CONFIG_TENSORS} holds no tensor.", next_step="save the adapter again")
    _check_finite(tensors)
    base = {k: raw[k] for k in ("base_model_name_or_path", "revision") if raw.get(k)}
    config = {k: v for k, v in raw.items() if k not in UNMEANT}
    task = task_of(folder)
    return Content(
        _digest(config, base, tensors), kind.methods[0], "peft", None if task is None else task.name,
        _size(tensors), base,
    )  # fmt: skip


def _check_shapes(declared: Any, tensors: Mapping[str, Tensor]) -> None:
    if not isinstance(declared, Mapping):
        return
    odd = sorted(set(declared) ^ set(tensors))
    if odd:
        where = "the record alone" if odd[0] in declared else "the file alone"
        raise ShapeDiffers(f"the tensor '{odd[0]}' is in {where} ({len(odd)} such).",
                           next_step="copy the folder again")  # fmt: skip
    for key, shape in declared.items():
        if list(tensors[key].shape) != shape:
            raise ShapeDiffers(
                f"'{key}' is {tuple(tensors[key].shape)} in the file, and {shape} in the record.",
                next_step="copy the folder again",
            )


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise BadFile(
                f"tensor '{key}' holds values that are not finite.",
                next_step="an earlier checkpoint of that run, or a lower learning rate",
            )


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(v.numel() * v.element_size() for v in tensors.values())


def _digest(config: Mapping[str, Any], base: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted tensors (name, kind, shape, bytes), the canonical config and the base."""
    found = hashlib.sha256(b"veneer version 1\0")
    for part in (config, base):
        found.update(
            json.dumps(part, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\0"
        )
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        found.update(f"{key}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _score(record: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """The task's first metric on the test rows, else on the validation rows, where the run kept one."""
    from veneer.tasks import task_from_dict

    training = record.get("training")
    metrics = training.get("metrics") if isinstance(training, Mapping) else None
    if not isinstance(metrics, Mapping) or not isinstance(record.get("task"), Mapping):
        return None, None
    try:
        wanted = task_from_dict(record["task"]).primary_metric
    except (VeneerError, KeyError, TypeError):
        return None, None
    for split in ("test", "validation"):
        value = (metrics.get(split) or {}).get(wanted)
        if isinstance(value, (int, float)):
            return float(value), f"{split} {wanted}"
    return None, None
