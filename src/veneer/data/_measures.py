"""What a row is known by, and how long it is, in words and in tokens."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from veneer.data._chat import prompt_text

Row = dict[str, Any]


def text_of(row: Row, task: str) -> str:
    """What a row is known by, when splits are made and copies are looked for."""
    if task == "instruct":
        return prompt_text(row["messages"])
    if task == "tag":
        return " ".join(row["tokens"])
    if task in ("qa", "vqa"):
        return f"{row['question']}\n{row['context'] if task == 'qa' else _fingerprint(row['image'])}"
    if task in ("image-classify", "speech"):
        return _fingerprint(row["image" if task == "image-classify" else "audio"])
    if task == "rank":
        return row["query"]
    if task == "seq2seq":
        return row["source"]
    return f"{row['text']}\n{row['text_pair']}" if row.get("text_pair") else row["text"]


def length_of(row: Row, task: str) -> int:
    """The words of what a model reads of a row."""
    if task == "instruct":
        return sum(len(m["content"].split()) for m in row["messages"])
    if task in ("image-classify", "speech"):
        return 0
    texts = (
        row[k]
        for k in ("text", "text_pair", "source", "question", "context", "query", "document")
        if row.get(k)
    )
    return len(row["tokens"]) if task == "tag" else sum(len(t.split()) for t in texts if isinstance(t, str))


def tokens_of(row: Row, task: str, tokenizer: Any) -> int:
    """The tokens of what a model reads of a row, special ones too."""
    if task == "instruct":
        if getattr(tokenizer, "chat_template", None):
            return len(
                tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
            )
        return len(tokenizer("\n".join(m["content"] for m in row["messages"]))["input_ids"])
    if task == "tag":
        return len(tokenizer(row["tokens"], is_split_into_words=True)["input_ids"])
    pair = {"qa": ("question", "context"), "rank": ("query", "document"), "seq2seq": ("source", "")}
    first, second = pair.get(task, ("text", "text_pair"))
    length = len(tokenizer(row[first], row.get(second))["input_ids"])
    return (
        max(length, len(tokenizer(row["target"])["input_ids"]))
        if task == "seq2seq" and "target" in row
        else length
    )


def _fingerprint(value: Any) -> str:
    """SHA-1 of an image or a sound, by its bytes."""
    if isinstance(value, dict):
        array = value.get("array")
        value = (value.get("bytes") or value.get("path")) if array is None else array
    if isinstance(value, (str, os.PathLike)):
        value = Path(value).read_bytes()
    if isinstance(value, (list, tuple)):
        value = repr(value).encode()
    return hashlib.sha1(value if isinstance(value, bytes) else value.tobytes()).hexdigest()
