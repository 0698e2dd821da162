"""Data sets that travel inside packages of Debian 12."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from pathlib import Path
from typing import Any

from veneer.bases._packages import Package
from veneer.data._formats import Numbered, Raw
from veneer.data._source import Builtin, ends_with, translations


def _deb(name: str, version: str, sha256: str) -> Package:
    return Package("deb", name, version, sha256)


_FASHION = _deb(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
_KJV = _deb("sword-text-kjv", "14.3-1", "9f463f28ce665f6f528fc723179722bced880a4c5485f7a41bf742838315de57")
_SPARV = _deb(
    "sword-text-sparv", "2.60-1", "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf"
)
_VOICE = (
    _deb(
        "asterisk-core-sounds-en-wav",
        "1.6.1-1",
        "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    ),
    _deb(
        "asterisk-core-sounds-en",
        "1.6.1-1",
        "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    ),
)
_OFFICE = {
    "si": "dd13af5b12614f0764e1ea32a14fbf99c556a61e5286e060704b5785c7b87c14",
    "ne": "d21f265d52cd9dc0125505e0b9535e107231e53ed2aebf16c8ded696dd624eef",
    "ta": "88a3c6c020aa6e024bbd18be3e5e404cb54550857746f41c5d8e268faea6aa1a",
    "pt": "83ed70de5e5d53e5216445f10ddcd4722900a0712a3acdb3ea694f101aff919d",
}


def _office(folder: Path) -> Raw:
    """Strings of an office program, 4 to 30 words of plain text, and their translation."""
    found: dict[str, str] = {}
    for file in sorted(folder.rglob("*.mo")):
        for asked, given in _catalogue(file.read_bytes()):
            english = asked.split("\x04")[-1]  # a context may stand before
            plain = not re.search(r"[%$<>\\~\n\x00]", english + given)
            if plain and 4 <= len(english.split()) <= 30 and given.strip() and given != english:
                found.setdefault(english, given)
    rows = [{"source": source, "target": target} for source, target in found.items()]
    return translations(rows, None, min(500, len(rows) // 10))


def _catalogue(data: bytes) -> list[tuple[str, str]]:
    """The pairs of a gettext `.mo` file: two tables of (length, offset)."""
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, asked, given = struct.unpack_from(f"{order}3I", data, 8)

    def texts(table: int) -> list[str]:
        places = (struct.unpack_from(f"{order}2I", data, table + 8 * i) for i in range(count))
        return [data[at : at + size].decode("utf-8", "replace") for size, at in places]

    return list(zip(texts(asked), texts(given)))


def _bible(folder: Path) -> Raw:
    """Verses of the same number in the King James and the Reina-Valera; books stay together."""
    rows: list[dict[str, Any]] = []
    for testament in ("ot", "nt"):
        english, spanish = (
            list(_verses(next(folder.rglob(f"{module}/{testament}.bzz")).parent, testament))
            for module in ("engKJV2006eb", "spaRV1909eb")
        )
        for (book, one), (_, two) in zip(english, spanish):
            if one and two:
                rows.append({"source": one, "target": two, "book": f"{testament}{book}"})
    return translations(rows, "book", 1000)


def _verses(folder: Path, testament: str) -> list[tuple[int, str]]:
    """(book, text) of every verse of a compressed module, empty ones too, so that two modules align.

    .bzs: u32 offset, u32 size, u32 plain size of a block, a book. .bzv: u32 block, u32 offset, u16 size.
    """
    blocks = folder.joinpath(f"{testament}.bzs").read_bytes()
    data = folder.joinpath(f"{testament}.bzz").read_bytes()
    books = [zlib.decompress(data[at : at + size]) for at, size, _ in struct.iter_unpack("<3I", blocks)]
    index = folder.joinpath(f"{testament}.bzv").read_bytes()
    found = []
    for block, at, size in struct.iter_unpack("<2IH", index):
        text = books[block][at : at + size].decode("utf-8", "replace") if size else ""
        found.append((block, _plain(text)))
    return found


def _plain(marked: str) -> str:
    """A verse without its notes, headings and marks."""
    text = re.sub(r"<(note|title)\b.*?</\1>", " ", marked, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", text)).strip(" ¶")


def _fashion(folder: Path) -> Raw:
    """28 x 28 grey pictures as arrays of uint8; its own test pictures."""
    import numpy

    labels = [
        "t-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ]
    parts: dict[str, Numbered] = {}
    for split, start in (("train", "train"), ("test", "t10k")):
        pictures, kinds = (
            gzip.decompress(next(folder.rglob(f"{start}-{what}-ubyte.gz")).read_bytes())
            for what in ("images-idx3", "labels-idx1")
        )
        grey = numpy.frombuffer(pictures, numpy.uint8, offset=16).reshape(-1, 28, 28)
        rows = ({"image": image, "label": labels[kind]} for image, kind in zip(grey, kinds[8:]))
        parts[split] = list(enumerate(rows, 1))
    columns = {"image": "image", "label": "label"}
    return Raw(parts, columns=columns, task="image-classify", labels={"label": labels}, drop_copies=True)


def _voice_prompts(folder: Path) -> Raw:
    """Prompts of a telephone system, one speaker, 8 kHz, three words and more."""
    lines = gzip.decompress(next(folder.rglob("core-sounds-en.txt.gz")).read_bytes()).decode().splitlines()
    clips = {file.relative_to(file.parents[0]).stem: file for file in sorted(folder.rglob("*.wav"))}
    rows = []
    for line in lines:
        name, colon, text = line.partition(":")
        if colon and name.strip() in clips and len(text.split()) >= 3 and "[" not in text:
            rows.append({"audio": str(clips[name.strip()]), "text": text.strip()})
    return Raw(
        {"": list(enumerate(rows, 1))}, columns={"audio": "audio", "text": "text"}, task="speech",
        sizes={"validation": 20, "test": 41},
    )  # fmt: skip


SETS = (
    Builtin(
        "fashion-mnist",
        "70,000 pictures of 10 kinds of clothes",
        "MIT",
        (_FASHION,),
        ends_with("ubyte.gz"),
        _fashion,
    ),
    *(
        Builtin(
            f"office-en-{language}",
            f"strings of an office program in English and {language}",
            "MPL-2.0 and others",
            (_deb(f"libreoffice-l10n-{language}", "4:7.4.7-1+deb12u14", sha256),),
            ends_with(".mo"),
            _office,
        )
        for language, sha256 in _OFFICE.items()
    ),
    Builtin(
        "bible-en-es",
        "31,000 verses in English and Spanish, books apart",
        "public domain",
        (_KJV, _SPARV),
        ends_with(".bzs", ".bzv", ".bzz"),
        _bible,
    ),
    Builtin(
        "voice-prompts",
        "recorded prompts of one speaker with their text",
        "CC-BY-SA-3.0",
        _VOICE,
        lambda path: "en_US_f_Allison" in path or path.endswith("core-sounds-en.txt.gz"),
        _voice_prompts,
    ),
)
