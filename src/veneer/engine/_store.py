"""Saving and loading: a folder with `veneer.json` and `adapter.safetensors`, and nothing else is needed to use it.

A save is written beside its place, read back, compared, and moved there in one step. A load compares every name and
shape with what the method declares on this base before anything is attached. Pickles are never read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer._disk import sync
from veneer.edits import build
from veneer.errors import BadFile, ShapeDiffers, UnknownName, Unsupported, VeneerError, nearest

from ._adapter import Adapter, draw
from ._attach import _plan_for, attach, frozen_seed, host_of
from ._beside import beside, sweep
from ._fingerprint import fingerprint
from ._host import Host

RECORD, TENSORS = "veneer.json", "adapter.safetensors"
WRITTEN = (RECORD, TENSORS, "both")  # what a save writes before it moves it
FORMAT = 1

# Formats by name: the module that reads and writes them, and the file by which a folder of theirs is known.
FORMATS: dict[str, tuple[str, str]] = {
    "peft": ("veneer.interop.peft", "adapter_config.json"),
    "adapterhub": ("veneer.interop.adapterhub", "adapter_config.json"),
    "gguf": ("veneer.interop.gguf", ""),
    "vllm": ("veneer.interop._vllm", ""),
    "sglang": ("veneer.interop._vllm_sglang", ""),
}


def register_format(name: str, module: str, marker: str = "") -> None:
    """Make a format known: `module` has `read(model, folder, name, **options)` and `write(model, name, folder)`."""
    FORMATS[name] = (module, marker)


def save(
    model: nn.Module, name: str, folder: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write one adapter (its trained modules included) to `folder`; return the folder."""
    import safetensors.torch

    host = host_of(model)
    adapter = host.adapter(name)
    adapter.check_prepared()
    adapter.project()
    tensors = {k: v.contiguous().cpu() for k, v in adapter.saved_tensors().items()}
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise BadFile(f"tensor '{key}' of adapter '{name}' is not finite; it was not saved.",
                          next_step="train with a smaller learning rate, or restore an earlier checkpoint")  # fmt: skip
    record = _record(host, adapter, tensors, extra)
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise BadFile(
            f"'{target}' is a file; an adapter is saved to a folder.", next_step="name another folder"
        )
    try:
        _write(target, tensors, record)
    except (OSError, safetensors.SafetensorError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise BadFile(
            f"'{target}' cannot be written ({why}); what was there before stays.",
            next_step="free some space, or save to another folder",
        ) from e
    return target


def _write(target: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Both files in place of those that are there, so that a kill at any moment leaves a whole adapter.

    The tensors are the moment of change. Before them the record is replaced by one that has the old one in it, and
    the digest of the tensors tells which of the two is theirs.
    """
    import safetensors.torch

    target.parent.mkdir(parents=True, exist_ok=True)
    with beside(target, WRITTEN) as place:
        safetensors.torch.save_file(tensors, str(place / TENSORS), metadata={"format": "pt"})
        _write_record(place / RECORD, record)
        back = safetensors.torch.load_file(str(place / TENSORS))
        if set(back) != set(tensors) or any(not _same(back[k], tensors[k]) for k in tensors):
            raise BadFile(
                f"what was written to '{target}' does not read back equal; the disk may be full.",
                next_step="free some space, or save to another folder",
            )
        before = _record_there(target)
        if before is not None:
            _write_record(place / "both", {**record, "before": before})
        mask = os.umask(0)
        os.umask(mask)
        for written in place.iterdir():
            os.chmod(written, 0o666 & ~mask)
            sync(written)
        target.mkdir(exist_ok=True)
        if before is not None:
            os.replace(place / "both", target / RECORD)
            sync(target)
        os.replace(place / TENSORS, target / TENSORS)
        sync(target)
        os.replace(place / RECORD, target / RECORD)
        sync(target)


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _record_there(folder: Path) -> dict[str, Any] | None:
    """The record of the adapter that a folder holds, if it holds a whole one."""
    if not ((folder / RECORD).is_file() and (folder / TENSORS).is_file()):
        return None
    try:
        return read_record(folder)
    except BadFile:
        return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _record(
    host: Host, adapter: Adapter, tensors: dict[str, Tensor], extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    drawn = {
        key: {"seed": frozen_seed(adapter.method, adapter.seed), "sha256": _digest(host.shared[store])}
        for key, store in adapter.frozen_shared.items()
    }
    return {
        "format": FORMAT,
        "name": adapter.name,
        "method": adapter.method.key,
        "options": _plain(adapter.method.non_default()),
        "plan": _plain({k: v for k, v in adapter.plan.options.items() if v}),
        "whole": list(adapter.plan.whole),
        "of": list(adapter.of),
        "seed": adapter.seed,
        "dtype": str(adapter.keep_dtype).removeprefix("torch."),
        "drawn": drawn,
        "tensors": {k: list(v.shape) for k, v in sorted(tensors.items())},
        "sha256": _digest_all(tensors),
        "base": {**_base_info(host), "fingerprint": fingerprint(host.anatomy, host.root, adapter.plan)},
        "versions": {"veneer": _version(), "torch": torch.__version__},
        **dict({**adapter.info, **(extra or {})}.items()),
    }


def _base_info(host: Host) -> dict[str, Any]:
    spec = host.root.__dict__.get("_veneer_spec")
    name = getattr(getattr(host.root, "config", None), "_name_or_path", "")
    return {"spec": spec or name or ""}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("veneer")
    except PackageNotFoundError:
        return "0"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return value


def _digest(t: Tensor) -> str:
    flat: Any = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(flat).hexdigest()


def _digest_all(tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for key in sorted(tensors):
        whole.update(key.encode())
        whole.update(_digest(tensors[key]).encode())
    return whole.hexdigest()


# -- loading --------------------------------------------------------------------------------------------------------


def load(
    model: nn.Module,
    source: str | os.PathLike[str] | Read,
    name: str | None = None,
    *,
    activate: bool = True,
    replace: bool = False,
    strict: bool = True,
    **options: Any,
) -> Adapter:
    """Attach an adapter from a folder or a hub id: veneer's own form, HF PEFT's, or another registered format.

    replace: one of the same name leaves for it, at one moment.
    Names, shapes and the base are compared first; nothing is half-loaded. Raises BadFile, ShapeDiffers, UnknownName.
    """  # fmt: skip
    fresh = "veneer" not in getattr(model, "_modules", ())
    read = source if isinstance(source, Read) else None
    folder = source.folder if isinstance(source, Read) else folder_of(source)
    if read is None:
        sweep(folder, WRITTEN)
    if not (read.record if read is not None else (folder / RECORD).is_file()):
        for _, (module, marker) in FORMATS.items():
            if marker and (folder / marker).is_file():
                options = {**options, "replace": True} if replace else options
                return importlib.import_module(module).read(model, folder, name, activate=activate, **options)
        raise BadFile(
            f"'{folder}' holds no adapter: there is no {RECORD} and no file of another known format.",
            nearest=sorted(p.name for p in folder.iterdir())[:5],
            next_step=f"name the folder that veneer.save wrote: {RECORD} and {TENSORS} lie in it",
        )
    record, values = (
        (read.record, read.values)
        if read is not None
        else (read_record(folder), read_tensors(folder / TENSORS))
    )
    host = host_of(model, make=True)
    try:
        method = build(record["method"], **record["options"])
        found = _plan_for(model, method, whole=tuple(record.get("whole", ())), **record.get("plan", {}))
        _compare(host, record, found, values, strict)
        dtype = "float32" if record.get("dtype") == "float32" else "base"
        adapter = attach(
            model, method, name or record["name"], activate=activate, replace=replace, seed=record["seed"], dtype=dtype,
            of=record.get("of", ()), values=values, whole=tuple(record.get("whole", ())), **record.get("plan", {}),
        )  # fmt: skip
    except Exception as e:
        if fresh:
            host.leave()
        if isinstance(e, VeneerError):
            raise
        raise BadFile(
            f"'{folder / RECORD}' holds values that no save writes ({type(e).__name__}: {e}).",
            next_step="copy the folder again, or save the adapter again",
        ) from e
    known = {"format", "name", "method", "options", "plan", "whole", "of", "seed", "dtype", "drawn", "tensors",
             "sha256", "base", "versions"}  # fmt: skip
    adapter.info = {k: v for k, v in record.items() if k not in known}
    return adapter


class Checked(dict[str, Tensor]):
    """Tensors that are those of the record beside them: their digest was compared."""


@dataclasses.dataclass(frozen=True)
class Read:
    """A folder's content in memory, so that attaching it reads nothing. Of foreign formats the folder alone."""

    folder: Path
    record: dict[str, Any]
    values: dict[str, Tensor]


def read_adapter(source: str | os.PathLike[str]) -> Read:
    """Read a folder without a model: record and tensors, compared with their digest. Touches no model, so that it can
    run beside one that is at work. `load` takes what it returns. Raises BadFile.
    """
    folder = folder_of(source)
    if not (folder / RECORD).is_file():
        return Read(folder, {}, {})
    record, values = read_record(folder), read_tensors(folder / TENSORS)
    for key, value in values.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise BadFile(f"tensor '{key}' of '{folder}' is not finite.", next_step="save the adapter again")
    if "sha256" not in record:
        return Read(folder, record, values)
    if record["sha256"] != _digest_all(values):
        raise BadFile(
            f"'{folder}': the tensors are not those that were saved (their SHA-256 differs).",
            next_step="copy the folder again",
        )
    return Read(folder, record, Checked(values))


def check_folder(model: nn.Module, source: str | os.PathLike[str]) -> dict[str, Any]:
    """What can be told of a folder without reading its tensors: format, method, options, names and shapes on this
    base. Returns the record, {} for foreign formats. Raises BadFile, ShapeDiffers, UnknownMethod, ...
    """
    import safetensors

    folder = folder_of(source)
    if not (folder / RECORD).is_file():
        known = [marker for _, marker in FORMATS.values() if marker and (folder / marker).is_file()]
        if known:
            return {}
        inside(folder, RECORD)
    record = read_record(folder)
    try:
        with safetensors.safe_open(str(inside(folder, TENSORS)), "pt") as file:
            values = {k: torch.empty(file.get_slice(k).get_shape(), device="meta") for k in file.keys()}  # noqa: SIM118
    except VeneerError:
        raise
    except Exception as e:
        raise BadFile(f"'{folder / TENSORS}' is truncated or no safetensors file ({e}).",
                      next_step="copy it again, or save it again") from None  # fmt: skip
    host = host_of(model)
    try:
        method = build(record["method"], **record["options"])
        found = _plan_for(model, method, whole=tuple(record.get("whole", ())), **record.get("plan", {}))
    except VeneerError:
        raise
    except Exception as e:
        raise BadFile(
            f"'{folder / RECORD}' holds values that no save writes ({type(e).__name__}: {e}).",
            next_step="copy the folder again, or save the adapter again",
        ) from e
    _compare(host, {**record, "drawn": {}}, found, values, strict=False)
    now, then = fingerprint(host.anatomy, host.root, found), record.get("base", {}).get("fingerprint", {})
    return {**record, "same_base": not then or then.get("values") == now["values"]}


def folder_of(source: str | os.PathLike[str]) -> Path:
    """A local folder, or the snapshot of a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    text = str(source)
    if folder.exists():
        raise BadFile(f"'{text}' is a file; an adapter is a folder with {RECORD} and {TENSORS}.",
                      next_step=f"veneer.load(model, {str(folder.parent)!r})")  # fmt: skip
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        try:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors"]))
        except Exception as e:
            raise UnknownName(f"'{text}' is no folder here, and the hub did not give it ({type(e).__name__}).",
                              next_step="check the path, or the network") from None  # fmt: skip
    siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    raise UnknownName(
        f"there is no folder '{text}'.",
        nearest=nearest(folder.name, siblings),
        next_step="check the path: a folder that veneer.save wrote, or a hub id such as user/name",
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The checked content of veneer.json: the record of the tensors that lie beside it."""
    path = inside(folder, RECORD)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:  # no permission, no UTF-8, no JSON, a number too long
        raise BadFile(
            f"'{path}' is not readable as JSON ({e}).", next_step="save the adapter again"
        ) from None
    record = _checked(record, path)
    before = record.pop("before", None)
    if before is not None and record.get("sha256") != _digest_all(read_tensors(folder / TENSORS)):
        record = _checked(before, path)  # a save over another was killed before it came to the tensors
        record.pop("before", None)
    return record


def _checked(record: Any, path: Path) -> dict[str, Any]:
    if not isinstance(record, dict) or not isinstance(record.get("method"), str):
        raise BadFile(f"'{path}' does not name a method.", next_step="save the adapter again")
    if not isinstance(record.get("format"), int) or record["format"] > FORMAT:
        raise BadFile(
            f"'{path}' has format {record.get('format')!r}; this version reads up to {FORMAT}.",
            next_step="pip install --upgrade veneer",
        )
    record.setdefault("options", {})
    record.setdefault("seed", 0)
    for key, kind in (
        ("options", dict),
        ("plan", dict),
        ("whole", list),
        ("of", list),
        ("seed", int),
        ("drawn", dict),
        ("base", dict),
        ("dtype", str),
    ):
        if key in record and not isinstance(record[key], kind):
            raise BadFile(
                f"'{path}': '{key}' should be a {kind.__name__}, it is {record[key]!r:.60}.",
                next_step="save the adapter again",
            )
    if not isinstance(record.get("name", "adapter"), str):
        raise BadFile(f"'{path}': 'name' should be a text.", next_step="save the adapter again")
    record.setdefault("name", record["method"])
    return record


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; everything else is refused."""
    import safetensors.torch

    path = inside(path.parent, path.name)
    try:
        return safetensors.torch.load_file(str(path))
    except Exception as e:  # safetensors raises several kinds for truncated and foreign files
        raise BadFile(
            f"'{path}' is truncated or no safetensors file ({e}).",
            next_step="copy it again, or save it again",
        ) from None


def inside(folder: Path, name: str) -> Path:
    """A file of the folder: present, regular, and not a link that leads out of it."""
    path = folder / name
    if not path.exists():
        pickles = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        if pickles:
            raise BadFile(f"'{folder}' holds {pickles[0]}, a pickle, which can run code; pickles are never loaded.",
                          next_step=f"ask for {name}, or convert it where you trust it")  # fmt: skip
        raise BadFile(
            f"'{folder}' has no {name}.",
            nearest=sorted(p.name for p in folder.iterdir())[:5],
            next_step="copy the folder again, or save the adapter again",
        )
    if path.is_symlink():
        # Hub caches link to blobs beside the snapshot; a link to anywhere else is refused.
        real = path.resolve()
        allowed = [folder.resolve(), folder.resolve().parent.parent / "blobs"]
        if not any(real.is_relative_to(a) for a in allowed):
            raise BadFile(
                f"'{path}' is a link that leads out of its folder, to '{real}'.",
                next_step="put the file itself there, if you trust it",
            )
    if not path.is_file():
        raise BadFile(f"'{path}' is not a regular file.", next_step="save the adapter again")
    return path


def _compare(host: Host, record: dict[str, Any], found: Any, values: dict[str, Tensor], strict: bool) -> None:
    from ._plan import is_saved

    wanted = {e.key: e.shape for e in found.entries if is_saved(e.spec)}
    fluid = {
        e.key for e in found.entries if found.sites[e.first].method.facts.data
    }  # data chose their shapes
    missing = sorted(set(wanted) - set(values))
    extra = sorted(set(values) - {e.key for e in found.entries})
    base = record.get("base", {}).get("fingerprint", {}).get("class", "another base")
    what = f"adapter '{record['name']}' (made for {base})"
    if missing or extra:
        names = [f"missing {m}" for m in missing[:3]] + [f"unexpected {e}" for e in extra[:3]]
        raise ShapeDiffers(
            f"{what} does not fit this {type(host.root).__name__}: {len(missing)} tensors are missing and "
            f"{len(extra)} are unexpected: {'; '.join(names)}.",
            next_step="load it on the base that it was trained on",
        )
    wrong = [k for k, shape in wanted.items() if k not in fluid and tuple(values[k].shape) != shape]
    if wrong:
        k = wrong[0]
        raise ShapeDiffers(
            f"'{k}' is {tuple(values[k].shape)} in the file, but {found.method} declares {wanted[k]} on this "
            f"{type(host.root).__name__} ({len(wrong)} tensors differ).",
            next_step="load it on the base that it was trained on",
        )
    known = "sha256" in record and all(not v.is_meta for v in values.values())
    if known and not isinstance(values, Checked) and record["sha256"] != _digest_all(values):
        raise BadFile(f"{what}: the tensors are not those that were saved (their SHA-256 differs).",
                      next_step="copy the folder again")  # fmt: skip
    now = fingerprint(host.anatomy, host.root, found)
    then = record.get("base", {}).get("fingerprint", {})
    if strict and then and then.get("values") != now["values"]:
        import warnings

        warnings.warn(
            f"{what}: this base has other weights than the one that it was trained on; its answers will differ.",
            stacklevel=4,
        )
    for e in found.entries:
        seen = record.get("drawn", {}).get(e.key)
        if seen and e.key not in values:
            again = _digest(draw(e.spec, e.shape, seen["seed"], f"{found.method.key}:{e.key}"))
            if again != seen["sha256"]:
                raise Unsupported(
                    f"{what}: the frozen tensor '{e.key}' drawn from seed {seen['seed']} is another one with this "
                    "version of torch, so the adapter would compute something else.",
                    next_step="save it with save_projection=True where it was made",
                )


def export(
    model: nn.Module, name: str, folder: str | os.PathLike[str], *, format: str = "peft", **options: Any
) -> Any:
    """Write an adapter in another format; returns that format's report. Raises UnknownName, Unsupported."""
    if format not in FORMATS:
        raise UnknownName(
            f"no format is called '{format}'.",
            nearest=nearest(format, FORMATS) or tuple(FORMATS),
            next_step=f"format= one of {', '.join(FORMATS)}",
        )
    return importlib.import_module(FORMATS[format][0]).write(model, name, Path(folder), **options)
