"""An uploaded archive, zip or tar, opened without trust: its list is read first, and nothing else is written.

Only the files of an adapter are ever unpacked, flat, under their own names. Sizes are counted while bytes come out,
so that a list that lies about them gains nothing.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from veneer.errors import BadFile

from ._registry_content import CONFIG, CONFIG_TENSORS, FILES, RECORD, TENSORS

MOST_MEMBERS = 64
LARGEST = 4 << 30  # bytes of all files together, unpacked
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
NEXT = "pack the adapter's folder alone: its JSON file and its .safetensors file"


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    plain: bool  # a regular file; else a link, a device or the like
    folder: bool
    open: Callable[[], Any]


def unpack(data: bytes, into: Path, *, largest: int = LARGEST, most: int = MOST_MEMBERS) -> None:
    """Write the adapter that an archive holds into `into`. Raises BadFile, which says what was wrong with it."""
    try:
        with _opened(data) as archive:
            members = list(_members(archive, most))
            _write(_chosen(members, largest), into, largest)
    except BadFile:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError,
            RuntimeError, NotImplementedError, OverflowError) as error:  # fmt: skip
        raise BadFile(
            f"the archive is damaged or encrypted ({type(error).__name__}).", next_step=NEXT
        ) from None


def _opened(data: bytes) -> Any:
    if zipfile.is_zipfile(io.BytesIO(data)):
        return zipfile.ZipFile(io.BytesIO(data))
    try:
        return tarfile.open(fileobj=io.BytesIO(data), mode="r:*")
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error):
        raise BadFile("these bytes are neither a zip nor a tar archive.", next_step=NEXT) from None


def _members(archive: Any, most: int) -> Iterator[_Member]:
    infos = archive.infolist() if isinstance(archive, zipfile.ZipFile) else archive
    for count, info in enumerate(infos, 1):  # a tar's list is read as it goes: an endless one ends here
        if count > most:
            raise BadFile(f"the archive has more than {most} entries.", next_step=NEXT)
        yield _of_zip(archive, info) if isinstance(info, zipfile.ZipInfo) else _of_tar(archive, info)


def _of_zip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    kind = (info.external_attr >> 16) & 0o170000  # of a Unix mode, where the archive has one
    plain = kind in (0, 0o100000, 0o040000)
    return _Member(info.orig_filename, info.file_size, plain, info.is_dir(), lambda: archive.open(info))


def _of_tar(archive: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    plain = (info.isreg() and not info.issparse()) or info.isdir()
    return _Member(info.name, info.size, plain, info.isdir(), lambda: archive.extractfile(info))


def _chosen(members: list[_Member], largest: int) -> dict[str, _Member]:
    """File name -> member, of one folder of the archive. Every name is checked, wanted or not."""
    found: dict[str, _Member] = {}
    places: dict[str, str] = {}
    for member in members:
        path = _checked(member)
        if member.folder or path.name not in FILES:
            continue
        if path.name in found:
            raise BadFile(f"the archive holds '{path.name}' twice.", next_step=NEXT)
        found[path.name], places[path.name] = member, str(path.parent)
    if sum(m.size for m in found.values()) > largest:
        raise BadFile(f"the archive unpacks to more than {largest:,} bytes.", next_step="a smaller adapter")
    if not ({RECORD, TENSORS} <= set(found) or {CONFIG, CONFIG_TENSORS} <= set(found)):
        raise BadFile(
            f"the archive holds no adapter: neither {RECORD} with {TENSORS} nor {CONFIG} with {CONFIG_TENSORS}.",
            nearest=sorted(PurePosixPath(m.name).name[:60] for m in members if not m.folder)[:5],
            next_step=NEXT,
        )
    if len(set(places.values())) > 1:
        raise BadFile("the archive's files lie in several folders; expected one adapter.", next_step=NEXT)
    return found


def _checked(member: _Member) -> PurePosixPath:
    name = member.name
    path = PurePosixPath(name)
    bad = (
        not name or len(name) > 400 or "\0" in name or "\\" in name or ":" in name
        or path.is_absolute() or ".." in path.parts or len(path.parts) > 4
    )  # fmt: skip
    if bad:
        raise BadFile(f"the archive holds the name {name[:80]!r}, which leads out of it.", next_step=NEXT)
    if not member.plain:
        raise BadFile(f"'{name[:80]}' in the archive is a link or a device, no regular file.", next_step=NEXT)
    if path.suffix.lower() in PICKLES:
        raise BadFile(f"the archive holds {path.name[:80]}, a pickle, which can run code; pickles are never loaded.",
                      next_step=NEXT)  # fmt: skip
    return path


def _write(chosen: dict[str, _Member], into: Path, largest: int) -> None:
    left = largest
    for name, member in chosen.items():
        source: IO[bytes] = member.open()
        with source, (into / name).open("wb") as target:
            while piece := source.read(min(1 << 20, left + 1)):
                left -= len(piece)
                if left < 0:
                    raise BadFile(
                        f"the archive unpacks to more than {largest:,} bytes.", next_step="a smaller adapter"
                    )
                target.write(piece)
