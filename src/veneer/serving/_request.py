"""What is asked of the engine and what it answers: plain data that knows neither HTTP nor torch.

An adapter is named by its *version*, a string that never means anything else (the digest of its content). Which
version a client's name means is settled before a request is made, so that a request ends with what it began with.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from veneer.errors import BadOption, UnknownAdapter, VeneerError

Finish = Literal["stop", "length", "cancelled", "error"]

_arrivals = itertools.count()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 takes the likeliest; above, tokens are drawn from `seed`."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    seed: int | None = None  # None: a fresh one for each request
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: of the chosen token and of the k likeliest


@dataclass(frozen=True)
class Request:
    """One row: one prompt, one answer. `n` answers are `n` requests."""

    prompt: tuple[int, ...]  # token ids
    sampling: Sampling = field(default_factory=Sampling)
    version: str | None = None  # of an adapter; None is the bare base
    key: str = ""  # whose request this is, for fairness and for the prefix cache's separation
    salt: str = ""  # separates the prefix cache once more, within one key
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrival: int = field(default_factory=lambda: next(_arrivals))


@dataclass(frozen=True)
class Logprob:
    """Of one chosen token: its own log probability and the likeliest tokens' at that place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """What one step brought to one request. The last event of a request has a `finish`, whatever happened."""

    id: str  # the request's
    text: str = ""  # whole characters alone, nothing that may yet become a stop text
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    finish: Finish | None = None
    error: Exception | None = None  # with finish="error": this request's failure, nobody else's
    prompt_tokens: int = 0  # with the finish, as the next two
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, that were not computed again


@dataclass(frozen=True)
class Answer:
    """What a request came to, whole."""

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    logprobs: tuple[Logprob, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class QueueFull(VeneerError):
    """As many requests wait as may wait. `retry_after`: seconds after which another try makes sense."""

    def __init__(self, length: int, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(
            f"{length} requests wait already, which is as many as may wait.",
            next_step=f"try again in {retry_after:.0f} s",
        )


class UnknownVersion(UnknownAdapter):
    """A request names an adapter's version that the engine does not have."""


class PromptTooLong(BadOption):
    """A prompt has more tokens than a row has positions."""


def check(request: Request, positions: int, vocabulary: int) -> None:
    """Raise where no row could run it: PromptTooLong, BadOption. positions: of a row."""
    s = request.sampling
    if not request.prompt:
        raise BadOption("the prompt has no tokens.", next_step="give at least one")
    if len(request.prompt) >= positions:
        raise PromptTooLong(
            f"the prompt has {len(request.prompt)} tokens; a row has {positions} positions, and one of them "
            "is for the answer.",
            next_step="a shorter prompt, or a larger max_length",
        )
    wrong = [i for i in request.prompt if not 0 <= i < vocabulary]
    if wrong:
        raise BadOption(
            f"token {wrong[0]} is none of this base's {vocabulary}.",
            next_step="engine.encode(text) makes token ids",
        )
    bounds = (
        ("max_tokens", s.max_tokens >= 1, "at least 1"),
        ("temperature", s.temperature >= 0, "at least 0"),
        ("top_p", 0 < s.top_p <= 1, "above 0 and at most 1"),
        ("top_k", s.top_k >= 0, "at least 0"),
        ("min_p", 0 <= s.min_p <= 1, "between 0 and 1"),
        ("repetition_penalty", s.repetition_penalty > 0, "above 0"),
    )
    for name, good, expected in bounds:
        if not good:
            raise BadOption(
                f"{name}={getattr(s, name)!r}: expected {expected}.",
                next_step="Sampling(max_tokens=64, temperature=0.7, top_p=0.9)",
            )
