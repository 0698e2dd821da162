"""Conversations in every written form, as one: a list of {"role", "content"} messages.

Read are `messages`, ShareGPT's `conversations` (from, value), Alpaca's instruction, input and output, and a
prompt with its completion. A form that cannot be learned from says why.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip

Message = dict[str, Any]


class BadRow(Exception):
    """A row that cannot be used: (kind of problem, message)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def messages_of(row: dict[str, Any]) -> list[Message]:
    """The messages of a row whose columns carry the names of roles; raises BadRow.

    A row holds `messages`, or `instruction` (with `input`) and `output`, or `prompt` and `completion`;
    `system` goes before any of them.
    """
    if "messages" in row:
        messages = [_message(m, at) for at, m in enumerate(_listed(row["messages"]), 1)]
    elif "instruction" in row:
        asked = "\n\n".join(
            _string(row.get(name), name) for name in ("instruction", "input") if row.get(name)
        )
        messages = _pair(asked, row.get("output"), "instruction", "output")
    elif isinstance(row.get("prompt"), list):  # the conversational form of prompt and completion
        spoken = [*row["prompt"], *_listed(row.get("completion"))]
        messages = [_message(m, at) for at, m in enumerate(spoken, 1)]
    else:
        messages = _pair(row.get("prompt"), row.get("completion"), "prompt", "completion")
    if row.get("system") and messages[:1] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _string(row["system"], "system")})
    _hold_turns(messages)
    return messages


def prompt_text(messages: list[Message]) -> str:
    """What is asked in a conversation: its user and system messages, for telling conversations apart."""
    return "\n".join(m["content"] for m in messages if m["role"] in ("system", "user"))


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):  # lists travel through CSV as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow("bad chat", "messages are text that is not JSON") from error
    if not isinstance(value, list) or not value:
        raise BadRow("bad chat", f"messages are {value!r:.60}; expected a list of messages")
    return value


def _message(message: Any, at: int) -> Message:
    """{"role", "content"} of one message in either vocabulary; what else it carries (tool calls) stays."""
    if not isinstance(message, dict):
        raise BadRow("bad chat", f"message {at} is a {type(message).__name__}; expected a role and a content")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow("bad chat", f"message {at} has the role {role!r}; expected one of {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts: [{"type": "text", "text": ...}]
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise BadRow("bad chat", f"message {at} has parts that are not text")
        content = "".join(texts)  # type: ignore[arg-type]
    extra = {k: v for k, v in message.items() if k in ("tool_calls", "tool_call_id", "name") and v}
    if content is None and "tool_calls" in extra:
        content = ""
    if not isinstance(content, str):
        raise BadRow("bad chat", f"message {at} has no content")
    if not content.strip() and "tool_calls" not in extra:
        kind = "nothing to learn" if ROLES[role.lower()] == "assistant" else "empty text"
        raise BadRow(kind, f"message {at} ({role}) is empty")
    return {"role": ROLES[role.lower()], "content": content, **extra}


def _pair(asked: Any, answered: Any, asked_name: str, answered_name: str) -> list[Message]:
    question, answer = _string(asked, asked_name), _string(answered, answered_name)
    if not question.strip():
        raise BadRow("empty text", f"the {asked_name} is empty")
    if not answer.strip():
        raise BadRow("nothing to learn", f"the {answered_name} is empty")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _string(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow("bad chat", f"{name} is a {type(value).__name__}; expected text")
    return value


def _hold_turns(messages: list[Message]) -> None:
    """Chat templates need turns: an optional system message, then user and assistant in alternation."""
    spoken = [m["role"] for m in messages]
    if "assistant" not in spoken:
        raise BadRow("nothing to learn", "no message is of the assistant")
    if "system" in spoken[1:]:
        raise BadRow("bad chat", "a system message stands behind the beginning")
    turns = [role for role in spoken if role != "system"]
    if turns[0] != "user":
        raise BadRow("bad chat", f"the conversation begins with the {turns[0]}, not with the user")
    for at, (one, two) in enumerate(pairwise(turns), 1):
        if one == two and one in ("user", "assistant"):
            raise BadRow("bad chat", f"turns {at} and {at + 1} are both of the {one}")
