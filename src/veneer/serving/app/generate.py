"""A call answered: whole, as one JSON body, or as server-sent events while its rows run.

Both look at the client while they wait: when it goes away its rows are given back at once. A stream's status is sent
with its first event, so that what fails before the first token is still a plain error; after that an error is an event.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from veneer.serving import Event, Logprob, Request, Sampling

from .bodies import Body, Sampled
from .calls import Call, while_connected
from .entry import authorise
from .errors import ApiError, as_api_error
from .record import LOGGER, Record, record_of
from .service import Service, Target
from .wire import DONE, Json, Shape, event, usage

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
use = authorise("use")


@dataclass
class Asked:
    """One HTTP request, read: its rows and how its answer is to look."""

    call: Call
    shape: Shape
    n: int
    prefixes: list[str]  # of each row: the prompt's text where it is to be echoed
    headers: dict[str, str]
    include_usage: bool = False
    log_prompts: bool = False

    def counts(self) -> dict[str, Any]:
        call = self.call
        return usage(call.prompt_tokens, call.completion_tokens, call.cached_tokens, self.n)


class Rows:
    """What each row has said so far."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        size = len(asked.call.rows)
        self.texts = list(asked.prefixes)
        self.logprobs: list[list[Logprob]] = [[] for _ in range(size)]
        self.offsets = [len(prefix) for prefix in asked.prefixes]
        self.finish: list[str | None] = [None] * size

    def written(self, found: Sequence[Logprob], place: int) -> Any:
        """The log probabilities as the answer has them; None where none were asked for."""
        if self.asked.call.rows[place].sampling.logprobs is None:
            return None
        shape = self.asked.shape
        made = shape.logprobs(found, self.offsets[place])
        self.offsets[place] += sum(shape.pieces.get(one.token).length for one in found)
        return made


class Whole(Response):
    """One JSON body, when all rows have finished."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rows, call = Rows(self.asked), self.asked.call
        try:
            if not await while_connected(receive, self._gather(rows)):
                call.record.outcome = "disconnected"
                call.record.status = 499
                return
            call.record.outcome = "done"
            choices = [
                self.asked.shape.choice(i, rows.texts[i], rows.written(rows.logprobs[i], i), rows.finish[i])
                for i in range(len(call.rows))
            ]
            answer: Response = Json(
                self.asked.shape.whole(choices, self.asked.counts()), headers=self.asked.headers
            )
        except ApiError as error:
            call.record.outcome = "error"
            _log_failure(call.record, error)
            answer = error.response()
        finally:
            _close(self.asked, rows)
        await answer(scope, receive, send)

    async def _gather(self, rows: Rows) -> None:
        while found := await self.asked.call.more():
            for place, one in found:
                rows.texts[place] += one.text
                rows.logprobs[place] += one.logprobs
                rows.finish[place] = one.finish or rows.finish[place]


class EventStream(Response):
    """Server-sent events: one a row and step, at once."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rows, call = Rows(self.asked), self.asked.call
        self.started = False
        try:
            if await while_connected(receive, self._send_all(rows, scope, receive, send)):
                call.record.outcome = call.record.outcome or "done"
            else:
                call.record.outcome = "disconnected"
        finally:
            _close(self.asked, rows)

    async def _send_all(self, rows: Rows, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while found := await self.asked.call.more():
                made = b"".join(event(self._chunk(choice)) for choice in self._choices(rows, found))
                await self._send(send, self._opening() + made)
            tail = b""
            if self.asked.include_usage:
                tail = event(self.asked.shape.chunk([], usage=self.asked.counts()))
            await self._send(send, self._opening() + tail + DONE, last=True)
        except Exception as raised:
            error = as_api_error(raised)
            self.asked.call.record.outcome = "error"
            _log_failure(self.asked.call.record, error if isinstance(raised, ApiError) else raised)
            if self.started:
                await self._send(send, event(error.body()), last=True)
            else:
                await error.response()(scope, receive, send)

    async def _send(self, send: Send, body: bytes, last: bool = False) -> None:
        if not self.started:
            self.started = True
            headers = {**STREAM_HEADERS, **self.asked.headers}
            raw = [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": raw})
        if body or last:
            await send({"type": "http.response.body", "body": body, "more_body": not last})

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        more = {"usage": None} if self.asked.include_usage else {}
        return self.asked.shape.chunk([choice], **more)

    def _opening(self) -> bytes:
        if self.started:
            return b""
        made = [self.asked.shape.opening(place) for place in range(len(self.asked.call.rows))]
        first = [self._chunk(choice) for choice in made if choice is not None]
        if not first:  # of a completion, the echoed prompt
            shape = self.asked.shape
            for place, prefix in enumerate(self.asked.prefixes):
                first += [self._chunk(c) for c in shape.piece(place, prefix, None, None)] if prefix else []
        return b"".join(map(event, first))

    def _choices(self, rows: Rows, found: list[tuple[int, Event]]) -> list[dict[str, Any]]:
        """A slow reader gets what came meanwhile of one row in one piece."""
        merged: dict[int, tuple[str, list[Logprob], str | None]] = {}
        for place, one in found:
            text, logprobs, finish = merged.get(place, ("", [], None))
            merged[place] = (text + one.text, [*logprobs, *one.logprobs], one.finish or finish)
        made: list[dict[str, Any]] = []
        for place, (text, logprobs, finish) in merged.items():
            rows.texts[place] += text
            if text or logprobs or finish:
                written = rows.written(logprobs, place) if logprobs else None
                made += self.asked.shape.piece(place, text, written, finish)
        return made


def _close(asked: Asked, rows: Rows) -> None:
    call = asked.call
    call.record.outcome = call.record.outcome or "cancelled"
    counts = asked.counts()
    call.record.facts |= {
        "prompt_tokens": counts["prompt_tokens"] or sum(len(r.prompt) for r in call.rows[:: asked.n]),
        "completion_tokens": counts["completion_tokens"],
        "cached_tokens": counts["prompt_tokens_details"]["cached_tokens"],
    }
    if call.first is not None:
        call.record.facts["first_token_seconds"] = round(call.first - call.record.began, 4)
    if asked.log_prompts:
        call.record.facts["answers"] = rows.texts
    call.close()


def _log_failure(record: Record, error: BaseException) -> None:
    cause = error.__cause__
    LOGGER.error("request %s: %s", record.id, error, exc_info=cause if cause is not None else None)


async def answer(
    service: Service,
    http: HttpRequest,
    body: Sampled,
    prompts: Sequence[Sequence[int]],
    target: Target,
    *,
    shape: type[Shape],
    prefix: str,
    max_tokens: int | None,
    logprobs: int | None,
    echoes: Sequence[str] = (),
    warned: dict[str, str],
) -> Response:
    """Submit prompts times n rows and answer with them in the form of `shape`."""
    record = record_of(http)
    n, engine = body.n or 1, service.engine
    if len(prompts) * n > service.settings.max_rows:
        raise ApiError(
            400, f"{len(prompts)} prompts with n={n} are {len(prompts) * n} rows; at most "
            f"{service.settings.max_rows} are taken together.", param="n",
        )  # fmt: skip
    rows = []
    for prompt in prompts:
        sampling = body.sampling(_room(prompt, max_tokens, engine.max_length), logprobs)
        rows += [_row(service, record, body, prompt, sampling, i, target) for i in range(n)]
    record.facts |= {"model": target.name, "version": target.shown, "stream": bool(body.stream)}
    call = service.call(rows, record.key, record, target)
    made = shape(f"{prefix}-{record.id[:64]}", int(time.time()), target.name, service.pieces)
    asked = Asked(
        call, made, n, [echoes[i // n] if echoes else "" for i in range(len(rows))],
        {"x-veneer-adapter-version": target.shown, **warned},
        bool(body.stream_options and body.stream_options.include_usage), service.settings.log_prompts,
    )  # fmt: skip
    return EventStream(asked) if body.stream else Whole(asked)


def _row(
    service: Service,
    record: Record,
    body: Sampled,
    prompt: Sequence[int],
    sampling: Sampling,
    i: int,
    target: Target,
) -> Request:
    """The i-th of n answers: its own draw, the same one at every asking."""
    if sampling.seed is not None and i:
        sampling = Sampling(**{**vars(sampling), "seed": (sampling.seed + i) % (1 << 63)})
    salt = body.cache_salt or ""
    return Request(tuple(prompt), sampling, target.version, record.key.name, salt)


def _room(prompt: Sequence[int], wanted: int | None, longest: int) -> int:
    """How many tokens may follow the prompt."""
    room = longest - len(prompt)
    if room < 1 or (wanted is not None and wanted > room):
        asked = f" and max_tokens is {wanted:,}" if wanted is not None else ""
        raise ApiError(
            400, f"The prompt has {len(prompt):,} tokens{asked}; this server takes {longest:,} together.",
            param="max_tokens" if room >= 1 else "prompt", code="context_length_exceeded",
        )  # fmt: skip
    return room if wanted is None else wanted


def warnings_of(service: Service, body: Body) -> dict[str, str]:
    """The header that names fields which were passed over; in strict mode they are refused."""
    unknown = sorted(body.unknown)
    if not unknown:
        return {}
    named = ", ".join("".join(c for c in name[:40] if " " < c < "\x7f") for name in unknown[:20])
    if service.settings.strict:
        raise ApiError(400, f"Unknown fields: {named}.", param=unknown[0][:40], code="unknown_parameter")
    return {"x-veneer-warning": f"unknown fields were passed over: {named}"}
