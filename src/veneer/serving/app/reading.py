"""Reading over HTTP: `/v1/classify`, `/v1/tag`, `/v1/translate` with an adapter's head, and `/v1/embeddings`.

A row is a text, or an object with the columns of the adapter's task (a pair for `text_pair`, `query` and `document`).
"""

from __future__ import annotations

import asyncio
import base64
import math
import re
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from veneer.errors import UnknownAdapter, VeneerError

from .._reading import ReadingEngine
from .._reading_rows import Found, Pooling
from .bodies import Named, Text, Tokens
from .entry import authorise
from .errors import REFUSALS, ApiError, as_api_error
from .keys import Key
from .record import record_of
from .service import Service, Target
from .wire import Json

MOST_ROWS = 2048
LONGEST_TEXT = 1 << 20  # characters
TASKS = {
    "classify": ("classify", "multilabel", "regress", "rank"),
    "tag": ("tag",),
    "translate": ("seq2seq",),
}
WORD = re.compile(r"\S+")
Columns = dict[Literal["text", "text_pair", "query", "document", "source"], Text]
Row = Text | Columns


class ReadingRequest(Named):
    """What is read, and with which adapter."""

    input: Row | Annotated[list[Row], Field(min_length=1, max_length=MOST_ROWS)] = Field(
        description="a text, or a list of texts; a row of columns where the task has several"
    )


class EmbeddingRequest(Named):
    """OpenAI's fields, and vLLM's way to say how states become one vector."""

    input: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_ROWS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_ROWS)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="the first of them alone, of unit length again")
    pooling: Pooling = "auto"


class ReadUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class ReadAnswer(BaseModel):
    object: str
    model: str
    data: list[dict[str, Any]]
    usage: ReadUsage


def router(service: Service, reading: ReadingEngine) -> APIRouter:
    """The four routes. reading: a `ReadingEngine`, or a `Late` one."""
    routes = APIRouter()
    use = Depends(authorise("use"))

    async def answered(
        kind: str,
        body: ReadingRequest,
        http: Request,
        key: Key,
        shape: Callable[[int, Any, Found], dict[str, Any]],
    ) -> Response:
        target = await _adapter(service, body, key)
        rows = _listed(body.input)
        try:
            task = reading.task(str(target.version))
            if task.name not in TASKS[kind]:
                raise ApiError(
                    400, f"'{target.name}' is an adapter for the task {task.name!r}, which {http.url.path} does not "
                    "answer.", param="model",
                )  # fmt: skip
            made = [_columns(task.name, row) for row in rows]
        except VeneerError as error:
            raise _refused(error) from None
        found = await _run(service, http, key, target, lambda: reading.read(str(target.version), made))
        data = [shape(i, row, one) for i, (row, one) in enumerate(zip(rows, found, strict=True))]
        return _sent(target, data, found)

    @routes.post(
        "/v1/classify", response_model=ReadAnswer, responses=REFUSALS, summary="Classes, numbers and ranks"
    )
    async def classify(body: ReadingRequest, http: Request, key: Key = use) -> Any:
        return await answered("classify", body, http, key, _class_of)

    @routes.post("/v1/tag", response_model=ReadAnswer, responses=REFUSALS, summary="A tag for every word")
    async def tag(body: ReadingRequest, http: Request, key: Key = use) -> Any:
        return await answered("tag", body, http, key, _tags_of)

    @routes.post("/v1/translate", response_model=ReadAnswer, responses=REFUSALS, summary="Text to text")
    async def translate(body: ReadingRequest, http: Request, key: Key = use) -> Any:
        return await answered(
            "translate", body, http, key, lambda i, row, one: {"index": i, "text": _said(one)}
        )

    @routes.post(
        "/v1/embeddings", response_model=ReadAnswer, responses=REFUSALS, summary="Vectors of unit length"
    )
    async def embeddings(body: EmbeddingRequest, http: Request, key: Key = use) -> Any:
        target = await service.target(body.asked, key)
        texts: Any = (
            [body.input] if isinstance(body.input, str) or isinstance(body.input[0], int) else body.input
        )
        _check_length(texts)
        found = await _run(
            service, http, key, target, lambda: reading.embed(target.version, texts, pooling=body.pooling)
        )
        width = len(found[0].vector)
        if body.dimensions is not None and body.dimensions > width:
            raise ApiError(
                400, f"dimensions={body.dimensions}: the vectors have {width}.", param="dimensions"
            )
        data = [
            {"object": "embedding", "index": i, "embedding": _written(one.vector, body)}
            for i, one in enumerate(found)
        ]
        return _sent(target, data, found)

    return routes


async def _adapter(service: Service, body: ReadingRequest, key: Key) -> Target:
    target = await service.target(body.asked, key)
    if target.version is None:
        raise ApiError(400, "The base has no head to read with: name an adapter.", param="model")
    return target


def _listed(given: Any) -> list[Any]:
    rows = given if isinstance(given, list) else [given]
    _check_length([text for row in rows for text in (row.values() if isinstance(row, dict) else (row,))])
    return rows


def _check_length(texts: Sequence[Any]) -> None:
    if any(not text for text in texts):
        raise ApiError(400, "An input is empty.", param="input")
    if any(len(text) > LONGEST_TEXT for text in texts):
        raise ApiError(400, f"An input has more than {LONGEST_TEXT:,} characters.", param="input")


def _columns(task: str, row: str | dict[str, str]) -> dict[str, Any]:
    """A row of the task's columns."""
    if isinstance(row, dict):
        return dict(row) if task != "tag" else {"tokens": WORD.findall(row.get("text", ""))}
    if task == "tag":
        return {"tokens": WORD.findall(row)}
    return {"source" if task == "seq2seq" else "text": row}


async def _run(
    service: Service, http: Request, key: Key, target: Target, ask: Callable[[], Future[list[Found]]]
) -> list[Found]:
    if service.draining:
        raise ApiError(503, "The server is stopping.", code="draining", retry_after=5)
    record = record_of(http)
    record.facts.update(model=target.name, version=target.version)
    service.limits.enter(key)
    record.outcome, tokens = "error", 0
    try:
        found = await asyncio.wrap_future(ask())
        tokens = sum(one.tokens for one in found)
        record.facts["prompt_tokens"] = tokens
        service.limits.pay(key, tokens)
        record.outcome = "done"
        return found
    except VeneerError as error:
        record.outcome = "refused"
        raise _refused(error) from None
    except asyncio.CancelledError:
        record.outcome = "disconnected"
        raise
    finally:
        service.limits.leave(key)
        service.metrics.read(target, record, tokens)


def _refused(error: VeneerError) -> ApiError:
    made = as_api_error(error, "model" if isinstance(error, UnknownAdapter) else "input")
    return made


def _sent(target: Target, data: list[dict[str, Any]], found: Sequence[Found]) -> Response:
    tokens = sum(one.tokens for one in found)
    counts = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = Json({"object": "list", "model": target.name, "data": data, "usage": counts})
    if target.version is not None:
        answer.headers["x-veneer-adapter-version"] = target.shown
    return answer


def _said(one: Found) -> Any:
    return (one.prediction or {}).get("prediction")


def _class_of(index: int, row: Any, one: Found) -> dict[str, Any]:
    """The likeliest label and its probability; of several labels all that hold; of a number no label."""
    label, scores = _said(one), (one.prediction or {}).get("probabilities")
    if scores is None or not isinstance(label, (str, list)):
        return {"index": index, "label": None, "score": label, "scores": scores}
    chosen = [label] if isinstance(label, str) else label
    score = scores[label] if isinstance(label, str) else min((scores[name] for name in chosen), default=None)
    return {"index": index, "label": label, "score": score, "scores": scores}


def _tags_of(index: int, row: Any, one: Found) -> dict[str, Any]:
    """A tag for every word, with the characters where it stands."""
    text = row if isinstance(row, str) else row.get("text", "")
    words = WORD.finditer(text)
    scores = (one.prediction or {}).get("probabilities") or ()
    tags = [
        {"start": word.start(), "end": word.end(), "label": label, "score": score}
        for word, label, score in zip(words, _said(one), scores)
    ]
    return {"index": index, "tags": tags}


def _written(vector: Sequence[float], body: EmbeddingRequest) -> Any:
    if body.dimensions is not None and body.dimensions < len(vector):
        vector = vector[: body.dimensions]
        length = math.sqrt(math.fsum(x * x for x in vector)) or 1.0
        vector = [x / length for x in vector]
    if body.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)
