"""Checkpoints: any moment is a good moment to be killed.

Tensors are in safetensors and all else in JSON; nothing is pickled. A checkpoint is written beside its
place, forced to the disk, and renamed, so that the folder of a run holds whole checkpoints only; the last
good one stays until the next is whole. A lock that the system releases keeps a second run out of the
folder.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer._disk import sync
from veneer.errors import BadFile, TrainingFailed

Packed = tuple[Any, dict[str, Tensor]]


def pack(value: Any) -> Packed:
    """Nested values as (what JSON holds, tensors by key). Takes dicts, lists, tuples, numbers, text,
    tensors.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(value, "", tensors), tensors


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = path or "value"
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, Mapping):
        pairs = [[k, _pack(v, f"{path}.{k}" if path else str(k), tensors)] for k, v in value.items()]
        return {"pairs": pairs}
    if isinstance(value, (list, tuple)):
        packed = [_pack(v, f"{path}.{i}" if path else str(i), tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": packed}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{path or 'the state'} is a {type(value).__name__}, which a checkpoint cannot hold")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given; tensors on the CPU."""
    (kind, value), *_ = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "pairs":
        return {k: unpack(v, tensors) for k, v in value}
    if kind in ("list", "tuple"):
        found = [unpack(v, tensors) for v in value]
        return tuple(found) if kind == "tuple" else found
    return value


def write_state(folder: Path, parts: Mapping[str, Any]) -> None:
    """Write {name: nested value} as NAME.json and NAME.safetensors into `folder`, whole or not at all."""
    from safetensors.torch import save

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        for name, value in parts.items():
            packed, tensors = pack(value)
            _write_through(unfinished / f"{name}.json", json.dumps(packed).encode())
            _write_through(unfinished / f"{name}.safetensors", save(tensors))
        sync(unfinished)
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(unfinished, folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise TrainingFailed(
            f"the checkpoint {folder} cannot be written: {error.strerror or error}.",
            next_step="free some space and give the same command again; the last whole checkpoint stays",
        ) from error


def read_state(folder: Path, *names: str) -> dict[str, Any]:
    """The parts that `write_state` wrote. BadFile where one is not whole."""
    from safetensors.torch import load

    found = {}
    for name in names:
        try:
            packed = json.loads((folder / f"{name}.json").read_text())
            found[name] = unpack(packed, load((folder / f"{name}.safetensors").read_bytes()))
        except Exception as error:
            raise BadFile(
                f"the checkpoint {folder} cannot be read ({name}: {str(error)[:100]}).",
                next_step=f"delete {folder} to go on from the one before, or from the beginning",
            ) from error
    return found


def write_json(path: Path, value: Any) -> None:
    """JSON to `path`, whole or not at all, forced to the disk."""
    write_bytes(
        path, (json.dumps(plain(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()
    )


def write_bytes(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write_through(unfinished, data)
        os.replace(unfinished, path)
        sync(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise TrainingFailed(
            f"{path} cannot be written: {error.strerror or error}.",
            next_step="df -h    shows the room that is left; output= another folder",
        ) from error


def _write_through(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def plain(value: Any) -> Any:
    """Nested values as strict JSON holds them: NaN and infinity become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


class Checkpoints:
    """The checkpoints of one run: `step-00000012` folders, of which the last good one is kept, and `best`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkpoints"

    def steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []

    def write(self, step: int, parts: Mapping[str, Any]) -> Path:
        target = self.folder / f"step-{step:08d}"
        write_state(target, parts)
        for older in self.steps():
            if older != target:
                shutil.rmtree(older, ignore_errors=True)
        return target

    def last(self, *names: str) -> dict[str, Any] | None:
        found = self.steps()
        return read_state(found[-1], *names) if found else None

    def write_best(self, state: Any) -> None:
        write_state(self.folder / "best", {"adapter": state})

    def best(self) -> Any:
        place = self.folder / "best"
        if not place.is_dir():  # killed between the two renames: the one before is still there
            place = self.folder / ".best.old"
        return read_state(place, "adapter")["adapter"] if place.is_dir() else None

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the folder of a run; the system lets go of it when its holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise TrainingFailed(
                f"another run works in {folder} (process {holder}).",
                next_step="wait for it, or give this run another output",
            ) from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        _sweep(folder)
        yield


def _sweep(folder: Path) -> None:
    """Take away the halves that killed runs left; the lock says that nobody writes them any more."""
    for unfinished in folder.glob(".*"):
        if re.fullmatch(r"\..+\.\d+", unfinished.name) and unfinished.is_file():
            unfinished.unlink(missing_ok=True)


def to_device(value: Any, device: Any) -> Any:
    """Nested values with their tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(v, device) for v in value)
    return value
