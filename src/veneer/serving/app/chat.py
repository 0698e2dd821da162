"""`/v1/chat/completions`: the next message of a conversation, by the base's own chat template."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from veneer.errors import VeneerError

from .bodies import ChatRequest, Message
from .completions import STREAM
from .errors import REFUSALS, ApiError, as_api_error
from .generate import answer, use, warnings_of
from .keys import Key
from .record import record_of
from .service import Service
from .wire import ChatCompletion, ChatShape


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={**REFUSALS, 200: {"content": STREAM, "description": "The answer, or its events"}},
        summary="The next message of a conversation",
    )
    async def chat(body: ChatRequest, http: Request, key: Key = Depends(use)) -> Any:  # noqa: B008
        body.refuse_what_is_not_there()
        warned = warnings_of(service, body)
        target = await service.target(body.asked, key)
        service.check_writes()
        prompt = await chat_prompt(service, body.messages, body.template_options())
        if service.settings.log_prompts:
            record_of(http).facts["messages"] = [m.plain(i) for i, m in enumerate(body.messages)]
        wanted = body.max_completion_tokens or body.max_tokens
        return await answer(
            service, http, body, [prompt], target, shape=ChatShape, prefix="chatcmpl", max_tokens=wanted,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None, warned=warned,
        )  # fmt: skip

    return routes


async def chat_prompt(service: Service, messages: list[Message], options: dict[str, Any]) -> list[int]:
    """Token ids of a conversation.

    Raises:
        ApiError: 400 where the base has no template, or its template refuses the conversation.
    """
    plain = [message.plain(i) for i, message in enumerate(messages)]
    if getattr(service.engine.tokenizer, "chat_template", None) is None:
        raise ApiError(
            400, f"{service.base} has no chat template: it was not made for conversations. "
            "Use /v1/completions with a prompt.", param="messages", code="no_chat_template",
        )  # fmt: skip
    try:
        found = list(await service.in_texts(service.engine.encode_chat, plain, **options))
    except VeneerError as error:
        raise ApiError(400, as_api_error(error).message, param="messages") from error
    except Exception as error:
        # Templates raise what they like: mostly that roles have to alternate.
        raise ApiError(
            400, f"The chat template of {service.base} refuses these messages: {error}", param="messages"
        ) from error
    if not found:
        raise ApiError(400, "The chat template makes no tokens of these messages.", param="messages")
    return found
