"""Conversations as tokens, and which of them the assistant says.

The spans come from the template itself: the conversation is rendered turn by turn, and what a turn of the
assistant adds behind the prompt for it is what the model has to say. No string is searched for, so that any
template works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import BadData

Message = dict[str, Any]
Span = tuple[int, int]  # characters of a rendered conversation

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' and eos_token else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers without a template: `User: ...`, `Assistant: ...`, the end token behind each answer."""


def messages_in(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a row: `messages`, `prompt` and `completion`, or `instruction` and `output`."""
    if row.get("messages"):
        return [dict(m) for m in row["messages"]]
    if "prompt" in row and "completion" in row:
        asked, answer = row["prompt"], row["completion"]
    elif "instruction" in row and "output" in row:
        asked = "\n\n".join(t for t in (row["instruction"], row.get("input")) if t)
        answer = row["output"]
    else:
        raise BadData(
            f"a row of a conversation has the columns {', '.join(row)}.",
            next_step="give messages, or prompt and completion, or instruction and output",
        )
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def render(tokenizer: Any, messages: Sequence[Message], *, prompt: bool = False) -> str:
    """The conversation as text; `prompt` opens a turn of the assistant."""
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=prompt,
        chat_template=getattr(tokenizer, "chat_template", None) or PLAIN_TEMPLATE,
    )  # fmt: skip


def assistant_spans(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """(text, spans of characters that the assistant says, with the mark that ends a turn)."""
    text = render(tokenizer, messages)
    spans = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _start(tokenizer, messages, at, text)
        end = _end(tokenizer, messages, at, text)
        end = _without_blanks_behind_a_mark(tokenizer, text, start, end)
        if end > start:
            spans.append((start, end))
    return text, spans


def _start(tokenizer: Any, messages: Sequence[Message], at: int, text: str) -> int:
    """Where the model begins to speak: behind the prompt that the template makes for it.

    Where a template has no such prompt, or renders a spoken turn in another way than it asks for one, the
    start is where two conversations begin to differ that differ in this answer alone.
    """
    before = render(tokenizer, messages[:at])
    prompt = render(tokenizer, messages[:at], prompt=True)
    if prompt != before and text.startswith(prompt):
        return len(prompt)
    other = _another(messages[at])
    return _shared(text, render(tokenizer, [*messages[:at], other, *messages[at + 1 :]]))


def _end(tokenizer: Any, messages: Sequence[Message], at: int, text: str) -> int:
    """Where the turn ends, its mark included.

    A template may show a turn in another way once others follow. Then the end of the content is where two
    conversations begin to be equal again, and the mark is what stands behind it when the turn is the last.
    """
    if at + 1 == len(messages):
        return len(text)
    until = render(tokenizer, messages[: at + 1])
    if text.startswith(until):
        return len(until)
    content = messages[at].get("content") or ""
    longer = {**messages[at], "content": content + ("x" if content.rstrip()[-1:] != "x" else "y")}
    behind = _shared(text[::-1], render(tokenizer, [*messages[:at], longer, *messages[at + 1 :]])[::-1])
    mark = _shared(until[::-1], render(tokenizer, [*messages[:at], longer])[::-1])
    said = len(text) - behind
    return said + _shared(text[said:], until[len(until) - mark :])


def _another(message: Message) -> Message:
    """The same turn with a content that begins with another letter."""
    content = message.get("content") or ""
    return {**message, "content": ("x" if content.lstrip()[:1] != "x" else "y") + content}


def _shared(one: str, two: str) -> int:
    """Length of the common beginning."""
    most = min(len(one), len(two))
    return next((i for i in range(most) if one[i] != two[i]), most)


def _without_blanks_behind_a_mark(tokenizer: Any, text: str, start: int, end: int) -> int:
    """Blanks behind the mark that ends a turn belong to the template, not to what is said."""
    bare = text[start:end].rstrip()
    marks = tuple(t for t in getattr(tokenizer, "all_special_tokens", ()) if t)
    return start + len(bare) if bare.endswith(marks) and marks else end


def tokens_and_labels(
    tokenizer: Any, text: str, spans: Sequence[Span], ignored: int
) -> tuple[list[int], list[int]]:
    """Token ids of the text, and labels: the id within a span, `ignored` elsewhere.

    A token that begins before a span is not the assistant's. Tokenizers that give no offsets are run piece
    by piece.
    """
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        inside = [any(a <= s and e <= b for a, b in spans) and e > s for s, e in offsets]
        return ids, [i if said else ignored for i, said in zip(ids, inside)]
    ids, labels = list[int](), list[int]()
    at = 0
    for start, end in [*spans, (len(text), len(text))]:
        for piece, said in ((text[at:start], False), (text[start:end], True)):
            found = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            ids += found
            labels += found if said else [ignored] * len(found)
        at = end
    return ids, labels


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], ignored: int
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation; the last answer ends with a mark that the model learns to stop at."""
    text, spans = assistant_spans(tokenizer, messages)
    ids, labels = tokens_and_labels(tokenizer, text, spans, ignored)
    eos = getattr(tokenizer, "eos_token_id", None)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    said = [i for i in labels if i != ignored]
    ends_open = bool(labels) and labels[-1] != ignored and said[-1] not in special
    if eos is not None and ends_open:
        ids, labels = [*ids, eos], [*labels, eos]
    return ids, labels


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation that the assistant is to go on with."""
    text = render(tokenizer, messages, prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
