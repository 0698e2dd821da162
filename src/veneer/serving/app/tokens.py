"""`/tokenize` and `/detokenize`, in vLLM's form."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from .bodies import DetokenizeRequest, TokenizeRequest
from .chat import chat_prompt
from .entry import authorise
from .errors import REFUSALS, ApiError
from .keys import Key
from .service import Service
from .wire import Json


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    prompt: str


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    use = authorise("use")

    @routes.post("/tokenize", response_model=Tokenized, responses=REFUSALS, summary="Token ids of a text")
    async def tokenize(body: TokenizeRequest, key: Key = Depends(use)) -> Any:  # noqa: B008
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Either prompt or messages is needed.", param="prompt")
        if body.model is not None:
            await service.target(body.model, key)
        service.check_words()
        if body.messages is not None:
            wanted = body.add_generation_prompt is not False
            ids = await chat_prompt(service, body.messages, {"add_generation_prompt": wanted})
        else:
            ids = list(await service.in_texts(_encode, service, body))
        strings = None
        if body.return_token_strs:
            strings = [str(t) for t in service.engine.tokenizer.convert_ids_to_tokens(ids)]
        return Json(
            {
                "count": len(ids),
                "max_model_len": service.engine.max_length,
                "tokens": ids,
                "token_strs": strings,
            }
        )

    @routes.post(
        "/detokenize", response_model=Detokenized, responses=REFUSALS, summary="The text of token ids"
    )
    async def detokenize(body: DetokenizeRequest, key: Key = Depends(use)) -> Any:  # noqa: B008
        if body.model is not None:
            await service.target(body.model, key)
        service.check_words()
        known = len(service.engine.tokenizer)
        if body.tokens and max(body.tokens) >= known:
            raise ApiError(
                400,
                f"Token {max(body.tokens)} is not one of the {known:,} that this base knows.",
                param="tokens",
            )
        return Json({"prompt": await service.in_texts(service.engine.decode, body.tokens)})

    return routes


def _encode(service: Service, body: TokenizeRequest) -> Any:
    if body.add_special_tokens is False:
        return service.engine.tokenizer.encode(body.prompt, add_special_tokens=False)
    return service.engine.encode(body.prompt)
