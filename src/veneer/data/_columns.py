"""Which column plays which role, and which task that makes.

One idea: a role has the names that data sets give it; a task has the roles that it needs. What a person says
(`columns`, `task`) goes before what the names suggest, and the values decide between classes and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from veneer.errors import BadData, BadOption, UnknownName, UnknownOption, nearest

# The first name that a data set has is taken; a role's own name goes first.
NAMES: dict[str, tuple[str, ...]] = {
    "text": (
        "text", "sentence", "sentence1", "premise", "question1", "review", "content", "comment", "tweet",
        "body", "sequence", "smiles", "utterance", "message", "document",
    ),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2", "text2", "second_sentence"),
    "label": (
        "label", "labels", "class", "category", "target", "sentiment", "intent", "score", "rating", "stars",
        "y",
    ),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags", "ner", "pos", "labels"),
    "question": ("question",),
    "context": ("context", "passage", "paragraph"),
    "answers": ("answers", "answer"),
    "query": ("query", "anchor"),
    "document": ("document", "passage", "doc", "candidate"),
    "positive": ("positive", "pos", "chosen"),
    "negative": ("negative", "negatives", "neg", "rejected"),
    "messages": ("messages", "conversations", "conversation", "dialog"),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response", "answer"),
    "prompt": ("prompt", "question", "query"),
    "completion": ("completion", "response", "answer", "chosen"),
    "system": ("system", "system_prompt"),
    "source": ("source", "src", "article", "document", "dialogue", "input"),
    "target": ("target", "tgt", "translation", "summary", "highlights", "reference", "output"),
    "image": ("image", "img", "picture", "image_path", "file_name"),
    "audio": ("audio", "sound", "wav", "audio_path", "path"),
}  # fmt: skip

# {task: (needed, welcome)}, or several forms of them; the order is the one of detection.
FORMS: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "instruct": (
        (("messages",), ("system",)),
        (("instruction", "output"), ("input", "system")),
        (("prompt", "completion"), ("system",)),
    ),
    "vqa": ((("image", "question", "label"), ()),),
    "image-classify": ((("image", "label"), ()),),
    "speech": ((("audio", "text"), ()),),
    "tag": ((("tokens", "tags"), ()),),
    "qa": ((("question", "context", "answers"), ()),),
    "rank": (
        (("query", "positive"), ("negative",)),
        (("query", "document", "label"), ()),
    ),
    "seq2seq": ((("source", "target"), ()),),
    "classify": ((("text", "label"), ("text_pair",)),),
    "multilabel": ((("text", "label"), ("text_pair",)),),
    "regress": ((("text", "label"), ("text_pair",)),),
    "lm": ((("text",), ()),),
}
TASKS = tuple(FORMS)
MOST_CLASSES_OF_NUMBERS = 20


def parse_columns(columns: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """{"text": "review"} from that, or from "text=review,label=stars". "label=a+b" gathers 0/1 columns."""
    if columns is None:
        return {}
    if isinstance(columns, str):
        pairs = [part.partition("=") for part in columns.split(",") if part.strip()]
        wrong = [role for role, equals, column in pairs if not equals or not column.strip()]
        if wrong:
            raise BadOption(
                f"columns={columns!r}: {wrong[0].strip()!r} names no column.",
                next_step="text=COLUMN,label=COLUMN",
            )
        columns = {role.strip(): column.strip() for role, _, column in pairs}
    for role in columns:
        if role not in NAMES:
            raise UnknownOption(
                f"columns has no role {role!r}.",
                nearest=nearest(role, NAMES),
                next_step=f"roles: {', '.join(NAMES)}",
            )
    return {
        r: c.split("+") if isinstance(c, str) and r == "label" and "+" in c else c for r, c in columns.items()
    }


def choose(
    rows: list[dict[str, Any]], given: Mapping[str, Any], task: str | None = None, labelled: bool = True
) -> tuple[str, dict[str, Any]]:
    """(task, {role: column}) of rows: the given mapping, then the names; the given task, then the values.

    `labelled=False` asks for no label, for rows that are only predicted. Raises BadData for a missing column.
    """
    present = list(dict.fromkeys(column for row in rows[:100] for column in row))
    if task is not None and task not in FORMS:
        raise UnknownName(
            f"no task is called {task!r}.",
            nearest=nearest(task, FORMS),
            next_step=f"one of {', '.join(FORMS)}",
        )
    _hold_given(given, present)
    candidates: tuple[str, ...] = TASKS if task is None else (task,)
    for candidate in candidates:
        for needed, welcome in FORMS[candidate]:
            roles = (
                needed
                if labelled
                else tuple(r for r in needed if r not in ("label", "tags", "target", "output"))
            )
            mapping = _mapping(roles, welcome, given, present)
            if mapping is not None and (task or _plausible(candidate, mapping, given)):
                return (candidate if task else _by_values(candidate, mapping, rows)), mapping
    raise _missing_column(task, given, present)


def _hold_given(given: Mapping[str, Any], present: list[str]) -> None:
    for role, column in given.items():
        for one in column if isinstance(column, list) else [column]:
            if one not in present:
                raise BadData(
                    f"columns names {one!r} as {role}, but the data has no such column.",
                    nearest=nearest(one, present) or present,
                    next_step=f"columns: {', '.join(map(str, present)) or 'none'}",
                )


def _mapping(
    needed: Iterable[str], welcome: Iterable[str], given: Mapping[str, Any], present: list[str]
) -> dict[str, Any] | None:
    """{role: column} with every needed role, no column twice; None where one is not there."""
    lowered: dict[str, str] = {}
    for column in present:
        lowered.setdefault(str(column).lower(), column)
    mapping: dict[str, Any] = {r: given[r] for r in (*needed, *welcome) if r in given}
    used = {c for column in mapping.values() for c in (column if isinstance(column, list) else [column])}
    for role in (*needed, *welcome):
        if role in mapping:
            continue
        found = next((lowered[n] for n in NAMES[role] if n in lowered and lowered[n] not in used), None)
        if found is not None:
            mapping[role] = found
            used.add(found)
        elif role in needed:
            return None
    return mapping


def _plausible(task: str, mapping: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether a mapping that names alone suggest is meant: all roles that a person gave are used by it."""
    return all(role in mapping for role in given)


def _by_values(task: str, mapping: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """classify, multilabel or regress, by what the label column holds."""
    if task != "classify" or "label" not in mapping:
        return task
    column = mapping["label"]
    if isinstance(column, list):
        return "multilabel"
    values = [row.get(column) for row in rows if row.get(column) not in (None, "")]
    if any(isinstance(value, list) for value in values):
        return "multilabel"
    numbers = [number(value) for value in values]
    if not values or any(n is None for n in numbers) or all(isinstance(v, bool) for v in values):
        return "classify"
    fractions = any(n != round(n) for n in numbers if n is not None)
    return "regress" if fractions or len(set(numbers)) > MOST_CLASSES_OF_NUMBERS else "classify"


def number(value: Any) -> float | None:
    """A finite number, also where it is written as text; None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _missing_column(task: str | None, given: Mapping[str, Any], present: list[str]) -> BadData:
    has = f"the data has {', '.join(map(repr, present)) or 'no columns'}"
    if task is None:
        return BadData(
            f"no task fits the columns: {has}.",
            next_step="--columns text=COLUMN,label=COLUMN, or a task: " + ", ".join(FORMS),
        )
    needed = FORMS[task][0][0]
    absent = [
        r
        for r in needed
        if r not in given and not any(n in map(str.lower, map(str, present)) for n in NAMES[r])
    ]
    names = absent or list(needed)
    return BadData(
        f"the task {task!r} needs the column{'s' * (len(names) > 1)} {', '.join(map(repr, names))}; {has}.",
        nearest=list(dict.fromkeys(near for r in names for near in nearest(r, map(str, present)))),
        next_step="--columns " + ",".join(f"{role}=COLUMN" for role in names),
    )
