"""The JSON that leaves: OpenAI's completions, chat completions and their chunks, as plain dicts and as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from pydantic import BaseModel
from starlette.responses import Response

from veneer.serving import Logprob

from .pieces import Pieces


class Json(Response):
    """A body by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def usage(
    prompts: Sequence[int], completions: Sequence[int], cached: Sequence[int], n: int
) -> dict[str, Any]:
    """Token counts over rows. Of the `n` rows of one prompt the prompt counts once."""
    prompt, completion = sum(prompts[::n]), sum(completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(cached[::n])},
    }


class Shape:
    """How one kind of answer is written. `offset` of a row is where its next token stands in its text."""

    def __init__(self, name: str, created: int, model: str, pieces: Pieces) -> None:
        self.name, self.created, self.model, self.pieces = name, created, model, pieces

    def whole(self, choices: list[dict[str, Any]], counts: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(self.kind), "choices": choices, "usage": counts}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._head(self.chunk_kind), "choices": choices, **more}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}

    kind = chunk_kind = ""

    def choice(self, place: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def piece(self, place: int, text: str, logprobs: Any, finish: str | None) -> list[dict[str, Any]]:
        """The chunks' choices for what came; text and finish may be two of them."""
        raise NotImplementedError

    def opening(self, place: int) -> dict[str, Any] | None:
        return None

    def logprobs(self, found: Sequence[Logprob], offset: int) -> dict[str, Any]:
        raise NotImplementedError


class CompletionShape(Shape):
    kind = chunk_kind = "text_completion"

    def choice(self, place: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def piece(self, place: int, text: str, logprobs: Any, finish: str | None) -> list[dict[str, Any]]:
        return [self.choice(place, text, logprobs, finish)]

    def logprobs(self, found: Sequence[Logprob], offset: int) -> dict[str, Any]:
        tokens = [self.pieces.get(one.token) for one in found]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += token.length
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{self.pieces.get(t).text: p for t, p in one.top} for one in found],
            "text_offset": offsets,
        }


class ChatShape(Shape):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def choice(self, place: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": place, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, place: int) -> dict[str, Any]:
        return self._delta(place, {"role": "assistant", "content": ""}, None, None)

    def piece(self, place: int, text: str, logprobs: Any, finish: str | None) -> list[dict[str, Any]]:
        found = [self._delta(place, {"content": text}, logprobs, None)] if text or logprobs else []
        return found + ([self._delta(place, {}, None, finish)] if finish else [])

    def _delta(self, place: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def logprobs(self, found: Sequence[Logprob], offset: int) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            piece = self.pieces.get(token)
            return {"token": piece.text, "logprob": logprob, "bytes": list(piece.bytes)}

        content = [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(t, p) for t, p in one.top]}
            for one in found
        ]
        return {"content": content, "refusal": None}


# -- for the OpenAPI page alone: answers are written as dicts above ------------------------------------------


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str


class Completion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class AnswerMessage(BaseModel):
    role: str
    content: str
    refusal: str | None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: str


class ChatCompletion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
