"""Data sets that travel inside packages of PyPI."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.bases._packages import Package
from veneer.data._formats import Numbered, Raw
from veneer.data._source import Builtin
from veneer.errors import missing_package

# Sentences with the mean rating of about twenty people, in [-4, 4] (Hutto and Gilbert, 2014).
_VADER = Package(
    "sdist", "vadersentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
)
_DOMAINS = {"tweets": "tweet", "amazonReviewSnippets": "product", "nytEditorialSnippets": "editorial",
            "movieReviewSnippets": "movie"}  # fmt: skip


DOMAIN_SETS = {
    "vader-domains": ("tweet-sentences", "product-sentences", "editorial-sentences", "movie-sentences")
}
"""Sets that stand for one, where it is asked for as a test set of other sources: same task and labels in each."""


def _rated(folder: Path, stem: str) -> Numbered:
    lines = next(folder.rglob(f"{stem}_GroundTruth.txt")).read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        _, rating, text = line.split("\t", 2)
        found.append((number, {"text": text.strip(), "rating": float(rating)}))
    return found


def _sentiment(stem: str) -> Callable[[Path], Raw]:
    """Two classes: ratings of at least half a point on either side; those between are left out."""

    def rows(folder: Path) -> Raw:
        found = [
            (number, {**row, "label": "positive" if row["rating"] > 0 else "negative"})
            for number, row in _rated(folder, stem)
            if abs(row["rating"]) >= 0.5
        ]
        columns = {"text": "text", "label": "label"}
        return Raw({"": found}, columns=columns, task="classify", labels={"label": ["negative", "positive"]})

    return rows


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
        (_VADER,),
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


def _champ(folder: Path) -> Raw:
    """Competition problems with worked steps; the answer ends the last line, so that it can be compared."""
    problems = json.loads(next(folder.rglob("v0.json")).read_text(encoding="utf-8"))
    hints = {**problems["hints"], **problems["concepts"]}
    rows = []
    for problem in problems["problems"].values():
        steps = "\n".join(step["_text"] for step in problem["solution"]["steps"])
        messages = [
            {"role": "user", "content": problem["_text"]},
            {"role": "assistant", "content": f"{steps}\nAnswer: {problem['_answer']}"},
        ]
        known = [hints[key]["_text"] for key in problem.get("ch_list") or [] if key in hints]
        rows.append({
            "messages": messages, "answer": problem["_answer"], "category": problem["category"],
            "hints": known,
        })  # fmt: skip
    return Raw(
        {"": list(enumerate(rows, 1))}, columns={"messages": "messages"}, task="instruct",
        sizes={"validation": 35, "test": 35},
    )  # fmt: skip


def _amp(folder: Path) -> Raw:
    """Peptides that kill microbes, and others: a header of counts and names, then sequence and class."""
    lines = next(folder.rglob("AMPvsUniProt.csv")).read_text(encoding="utf-8").splitlines()
    _, _, *names = (field.strip() for field in lines[0].split(","))
    rows = []
    for number, line in enumerate(lines[1:], 2):
        sequence, kind = line.split(",")
        rows.append((number, {"text": sequence.strip(), "label": names[int(kind)]}))
    return Raw(
        {"": rows}, columns={"text": "text", "label": "label"}, task="classify", labels={"label": names},
        sizes={"validation": 500, "test": 500},
    )  # fmt: skip


def _easy_vqa(folder: Path) -> Raw:
    """Questions on pictures of one coloured shape, 13 answers; the pictures of train and test are others."""
    place = next(folder.rglob("answers.txt")).parent
    labels = place.joinpath("answers.txt").read_text(encoding="utf-8").split()
    parts = {}
    for split in ("train", "test"):
        asked = json.loads((place / split / "questions.json").read_text(encoding="utf-8"))
        rows = [
            {"image": str(place / split / "images" / f"{picture}.png"), "question": question, "label": answer}
            for question, answer, picture in asked
        ]
        parts[split] = list(enumerate(rows, 1))
    columns = {"image": "image", "question": "question", "label": "label"}
    return Raw(parts, columns=columns, task="vqa", labels={"label": labels}, group="image", drop_copies=True)


SETS = (
    _vader(
        "movie-sentences",
        "10,072 film sentences of two sentiments, with ratings",
        _sentiment("movieReviewSnippets"),
    ),
    _vader("tweet-sentences", "tweets of two sentiments, with ratings", _sentiment("tweets")),
    _vader(
        "product-sentences",
        "sentences of product reviews, of two sentiments, with ratings",
        _sentiment("amazonReviewSnippets"),
    ),
    _vader(
        "editorial-sentences",
        "sentences of editorials, of two sentiments, with ratings",
        _sentiment("nytEditorialSnippets"),
    ),
    _vader("vader-domains", "23,703 rated sentences of four sources", _vader_domains),
    *(
        Builtin(
            "dialog" if language == "english" else f"dialog-{language}",
            f"short exchanges in {language.capitalize()}, in the form of chats",
            "BSD-3-Clause",
            (_CHATTERBOT,),
            lambda path: path.endswith(".yml"),
            _dialog(language),
        )
        for language in DIALOG_LANGUAGES
    ),
    Builtin(
        "champ",
        "270 competition problems with worked steps, hints and answers, in the form of chats",
        "MIT",
        (_CHAMP,),
        lambda path: path.endswith("v0.json"),
        _champ,
    ),
    Builtin(
        "amp",
        "5,200 peptides, antimicrobial or not",
        "BSD-3-Clause",
        (_MODLAMP,),
        lambda path: path.endswith("AMPvsUniProt.csv"),
        _amp,
    ),
    Builtin(
        "easy-vqa",
        "48,248 questions on 5,000 pictures of a coloured shape, 13 answers",
        "MIT",
        (_EASY_VQA,),
        lambda path: path.endswith((".png", "questions.json", "answers.txt")),
        _easy_vqa,
    ),
)
