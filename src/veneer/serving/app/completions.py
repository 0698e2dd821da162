"""`/v1/completions`: text, or tokens, behind a prompt."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from .bodies import CompletionRequest
from .errors import REFUSALS, ApiError
from .generate import answer, use, warnings_of
from .keys import Key
from .record import record_of
from .service import Service
from .wire import Completion, CompletionShape

STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post(
        "/v1/completions",
        response_model=Completion,
        responses={**REFUSALS, 200: {"content": STREAM, "description": "The answer, or its events"}},
        summary="Text behind a prompt",
    )
    async def completions(body: CompletionRequest, http: Request, key: Key = Depends(use)) -> Any:  # noqa: B008
        body.refuse_what_is_not_there()
        warned = warnings_of(service, body)
        target = await service.target(body.asked, key)
        service.check_writes()
        texts, prompts = await _prompts(service, body)
        if service.settings.log_prompts:
            record_of(http).facts["prompts"] = texts or prompts
        echoes: list[str] = []
        if body.echo:
            echoes = texts or [await service.in_texts(service.engine.decode, p) for p in prompts]
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        return await answer(
            service, http, body, prompts, target, shape=CompletionShape, prefix="cmpl",
            max_tokens=max_tokens, logprobs=body.logprobs, echoes=echoes, warned=warned,
        )  # fmt: skip

    return routes


async def _prompts(service: Service, body: CompletionRequest) -> tuple[list[str], list[list[int]]]:
    """(texts, token ids) of the prompts; no texts where tokens were sent."""
    given: Any = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    if len(given) > service.settings.max_rows:
        raise ApiError(
            400,
            f"{len(given)} prompts were sent; at most {service.settings.max_rows} are taken.",
            param="prompt",
        )
    if isinstance(given[0], str):
        ids = [list(await service.in_texts(service.engine.encode, text)) for text in given]
        for text, one in zip(given, ids):
            if not one:
                raise ApiError(400, f"The prompt {text[:20]!r} has no tokens.", param="prompt")
        return given, ids
    vocabulary = len(service.engine.tokenizer)
    for one in given:
        if max(one) >= vocabulary:
            raise ApiError(
                400,
                f"Token {max(one)} is not one of the {vocabulary:,} that this base knows.",
                param="prompt",
            )
    return [], given
