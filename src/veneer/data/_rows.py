"""One row of a task: checked, and written with the names of roles in place of the file's own.

What a model is fed is the same for every file: `text` and `label` (a name, a list of names, or a number),
`tokens` and `tags` (names), `messages`, `source` and `target`, `question`, `context` and `answers`, `query`,
`document` and `label`, `image`, `audio`. Columns without a role stay beside them, for groups and for people.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from veneer.data._chat import BadRow, messages_of
from veneer.data._columns import number

Row = dict[str, Any]

IMAGE_STARTS = (
    b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\x00", b"MM\x00*", b"P5", b"P6", b"P4", b"P3",
)  # fmt: skip


def cleaned(row: Row, task: str, columns: dict[str, Any], labelled: bool = True) -> list[Row]:
    """The row under the names of roles, labels still as names; raises BadRow.

    One row gives one, but for ranking, where a query with its good and bad documents gives one for each.
    """
    used = {c for column in columns.values() for c in (column if isinstance(column, list) else [column])}
    named = {role: _value(row, column) for role, column in columns.items()}
    rest = {k: v for k, v in row.items() if k not in used and k not in named}
    _hold_encoding(named)
    return [{**rest, **made} for made in MAKERS[task](named, labelled)]


def _value(row: Row, column: Any) -> Any:
    """A column's value; of several 0/1 columns, the names of those that are set."""
    if not isinstance(column, list):
        return row.get(column)
    values = {name: number(row.get(name)) for name in column}
    wrong = [name for name, value in values.items() if value not in (0.0, 1.0)]
    if wrong and not all(isinstance(row.get(name), bool) for name in wrong):
        raise BadRow("bad label", f"the column {wrong[0]!r} holds {row.get(wrong[0])!r}; expected 0 or 1")
    return [name for name in column if row.get(name) is True or values[name] == 1.0]


def _hold_encoding(value: Any) -> None:
    """Bytes that did not decode stand in the text as lone surrogates."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("encoding", f"not UTF-8 at character {error.start + 1}: {value[:40]!r}") from error
    elif isinstance(value, dict):
        for inner in (*value, *value.values()):
            _hold_encoding(inner)
    elif isinstance(value, list):
        for inner in value:
            _hold_encoding(inner)


def _text(named: Row, role: str) -> str:
    value = named.get(role)
    if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
        raise BadRow("bad text", f"{role} is a {type(value).__name__}; expected text")
    text = "" if value is None or value != value else str(value)
    if not text.strip():
        raise BadRow("empty text", f"{role} is empty")
    return text


def _texts(named: Row) -> Row:
    found = {"text": _text(named, "text")}
    if "text_pair" in named:
        found["text_pair"] = _text(named, "text_pair")
    return found


def label_name(value: Any) -> str:
    """The name of a class: text without blanks around it; 1, 1.0 and "1" are one class."""
    if value is None or (isinstance(value, str) and not value.strip()) or value != value:
        raise BadRow("missing label", "the label is empty")
    if isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value == value // 1 and abs(value) < 1e15 else str(value)
    if isinstance(value, str):
        return value.strip()
    raise BadRow("bad label", f"the label is a {type(value).__name__}; expected a name or a number")


def _classify(named: Row, labelled: bool) -> list[Row]:
    found = _texts(named)
    return [{**found, "label": label_name(named.get("label"))} if labelled else found]


def _multilabel(named: Row, labelled: bool) -> list[Row]:
    found = _texts(named)
    if not labelled:
        return [found]
    return [{**found, "label": list(dict.fromkeys(map(label_name, _label_list(named.get("label")))))}]


def _label_list(value: Any) -> list[Any]:
    """A list, or text: JSON, or names with | ; or , between them. No label at all is an empty list."""
    if isinstance(value, list):
        return value
    if value is None:
        raise BadRow("missing label", "the label is empty")
    text = str(value).strip()
    if text.startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadRow("bad label", f"{text:.40} is not a list") from error
        return found if isinstance(found, list) else [found]
    mark = next((m for m in "|;," if m in text), None)
    return [part for part in text.split(mark) if part.strip()] if mark else [text] * bool(text)


def _regress(named: Row, labelled: bool) -> list[Row]:
    found = _texts(named)
    return [{**found, "label": _number(named.get("label"))} if labelled else found]


def _number(value: Any) -> float:
    if value is None or value == "" or value != value:
        raise BadRow("missing label", "the label is empty")
    found = float(value) if isinstance(value, bool) else number(value)
    if found is None:
        raise BadRow("bad label", f"the label {value!r:.40} is not a finite number")
    return found


def _tag(named: Row, labelled: bool) -> list[Row]:
    tokens = _word_list(named.get("tokens"), "tokens")
    if not tokens or not all(isinstance(token, str) and token.strip() for token in tokens):
        raise BadRow("empty text", "tokens are empty")
    if not labelled:
        return [{"tokens": tokens}]
    tags = [label_name(tag) for tag in _word_list(named.get("tags"), "tags")]
    if len(tags) != len(tokens):
        raise BadRow("bad tags", f"{len(tokens)} tokens, but {len(tags)} tags")
    return [{"tokens": tokens, "tags": tags}]


def _word_list(value: Any, role: str) -> list[Any]:
    """A list, or text: JSON, or words with blanks between them."""
    if isinstance(value, list):
        return value
    if value is None:
        return []
    if not isinstance(value, str):
        raise BadRow("bad tags", f"{role} is a {type(value).__name__}; expected a list")
    if value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value.split()
        return parsed if isinstance(parsed, list) else value.split()
    return value.split()


def _qa(named: Row, labelled: bool) -> list[Row]:
    found: Row = {"question": _text(named, "question"), "context": _text(named, "context")}
    if not labelled:
        return [found]
    answers = named.get("answers")
    if isinstance(answers, str) and answers.lstrip().startswith("{"):
        try:
            answers = json.loads(answers)
        except (ValueError, RecursionError) as error:
            raise BadRow("bad answer", "answers are text that is not JSON") from error
    if isinstance(answers, str):
        answers = {"text": [answers]}
    if not isinstance(answers, dict) or not isinstance(answers.get("text"), list):
        raise BadRow("bad answer", f"answers are {answers!r:.40}; expected text, or texts and their places")
    texts = answers["text"]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise BadRow("missing label", "there is no answer")
    starts = answers.get("answer_start") or [found["context"].find(text) for text in texts]
    for text, start in zip(texts, starts):
        if not isinstance(start, int) or start < 0 or found["context"][start : start + len(text)] != text:
            raise BadRow("bad answer", f"the answer {text!r:.40} does not stand in the context at {start!r}")
    if len(starts) != len(texts):
        raise BadRow("bad answer", f"{len(texts)} answers, but {len(starts)} places")
    return [{**found, "answers": {"text": texts, "answer_start": list(starts)}}]


def _rank(named: Row, labelled: bool) -> list[Row]:
    query = _text(named, "query")
    if "document" in named:
        found = {"query": query, "document": _text(named, "document")}
        return [{**found, "label": _number(named.get("label"))} if labelled else found]
    good, bad = _documents(named, "positive"), _documents(named, "negative") if named.get("negative") else []
    return [
        *({"query": query, "document": d, "label": 1.0} for d in good),
        *({"query": query, "document": d, "label": 0.0} for d in bad),
    ]


def _documents(named: Row, role: str) -> list[str]:
    value = named.get(role)
    return (
        [_text({role: v}, role) for v in value] if isinstance(value, list) and value else [_text(named, role)]
    )


def _lm(named: Row, labelled: bool) -> list[Row]:
    return [{"text": _text(named, "text")}]


def _instruct(named: Row, labelled: bool) -> list[Row]:
    return [{"messages": messages_of(named)}]


def _seq2seq(named: Row, labelled: bool) -> list[Row]:
    found = {"source": _text(named, "source")}
    return [{**found, "target": _text(named, "target")} if labelled else found]


def _image_classify(named: Row, labelled: bool) -> list[Row]:
    found = {"image": _image(named.get("image"))}
    return [{**found, "label": label_name(named.get("label"))} if labelled else found]


def _vqa(named: Row, labelled: bool) -> list[Row]:
    found = {"image": _image(named.get("image")), "question": _text(named, "question")}
    return [{**found, "label": label_name(named.get("label"))} if labelled else found]


def _speech(named: Row, labelled: bool) -> list[Row]:
    audio = _sound(named.get("audio"))
    return [{"audio": audio, "text": _text(named, "text")} if labelled else {"audio": audio}]


def _sound(value: Any) -> Any:
    """A path, encoded bytes, an array of numbers, or a dictionary of these as `datasets` keeps them."""
    inner = value
    if isinstance(value, dict):
        array = value.get("array")
        inner = (value.get("bytes") or value.get("path")) if array is None else array
    if inner is None or (isinstance(inner, str) and not inner):
        raise BadRow("bad file", "there is no sound")
    if isinstance(inner, (str, os.PathLike)):
        if not os.path.isfile(inner):
            raise BadRow("bad file", f"there is no sound file {str(inner)!r:.80}")
        return value
    numbers = isinstance(inner, (list, tuple)) and all(type(x) in (int, float) for x in inner)
    if not (numbers or isinstance(inner, bytes) or hasattr(inner, "tobytes")):
        raise BadRow("bad file", f"{value!r:.60} is not a sound")
    return value


def _image(value: Any) -> Any:
    """A path, encoded bytes (alone or as `datasets` keeps them), or an array; its first bytes decide."""
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        value = value.get("bytes") or value.get("path")
    if value is None or (isinstance(value, str) and not value):
        raise BadRow("bad file", "there is no image")
    if isinstance(value, (str, os.PathLike)):
        try:
            with open(value, "rb") as file:
                start = file.read(16)
        except (OSError, ValueError) as error:
            raise BadRow("bad file", f"the image {str(value)!r} cannot be read") from error
    elif isinstance(value, bytes):
        start = value[:16]
    elif hasattr(value, "tobytes"):
        return value
    else:
        raise BadRow("bad file", f"{value!r:.60} is not an image")
    if not start.startswith(IMAGE_STARTS):
        raise BadRow("bad file", f"{value!r:.60} is not an image")
    return value


MAKERS: dict[str, Callable[[Row, bool], list[Row]]] = {
    "classify": _classify, "multilabel": _multilabel, "regress": _regress, "tag": _tag, "qa": _qa,
    "rank": _rank, "lm": _lm, "instruct": _instruct, "seq2seq": _seq2seq, "image-classify": _image_classify,
    "vqa": _vqa, "speech": _speech,
}  # fmt: skip
