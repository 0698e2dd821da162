"""A running row: one request, what it has read and said, and where its keys and values lie."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ._alone import Alone
from ._request import Event, Finish, Request
from ._sampling import Chooser
from ._text import Text
from ._traits import Traits

Sink = Callable[[list[Event]], None]


@dataclass(eq=False)
class Row:
    """todo: tokens of the prompt that are still to be read. length: positions in its slot, added ones included."""

    request: Request
    sink: Sink
    chooser: Chooser
    text: Text | None
    traits: Traits
    todo: list[int]
    eos: frozenset[int]
    limit: int  # tokens that it may say
    slot: int = -1
    length: int = 0
    said: list[int] = field(default_factory=list)
    cached: int = 0
    own: Alone | None = None  # its own cache, where it does not run in a slot
    chain: list[bytes] = field(default_factory=list)  # digests of the prompt's blocks
    kept: int = 0  # blocks of it that are known to others
    began: bool = False  # whether it has read anything itself
    aside: Any = None  # keys and values of a row that made way for another
    joined: float = field(default_factory=time.monotonic)
    ended: bool = False
    kind: tuple[bool, int] = (False, 0)  # rows of one kind of adapter lie next to one another

    @property
    def name(self) -> str | None:
        return self.request.version

    @property
    def last(self) -> int:
        return self.said[-1]

    def say(self, token: int, logprob: Any) -> Event:
        """Take the token that was chosen: the event that it makes, with a finish where it ends the answer."""
        s = self.request.sampling
        self.said.append(token)
        ends = (token in self.eos and not s.ignore_eos) or token in s.stop_tokens
        enough = len(self.said) >= s.min_tokens
        text = ""
        if self.text is not None and not (ends and enough):
            text = self.text.add(token, watch=enough)
        finish: Finish | None = None
        if enough and (ends or (self.text is not None and self.text.stopped)):
            finish = "stop"
        elif len(self.said) >= self.limit:
            finish = "length"
        if finish is not None and self.text is not None:
            text += self.text.finish()
            if self.text.stopped:
                finish = "stop"
        return self.event(text, (token,), () if logprob is None else (logprob,), finish)

    def event(
        self,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[Any, ...] = (),
        finish: Finish | None = None,
        error: Exception | None = None,
    ) -> Event:
        if finish is None:
            return Event(self.request.id, text, tokens, logprobs)
        return Event(
            self.request.id, text, tokens, logprobs, finish, error,
            len(self.request.prompt), len(self.said), self.cached,
        )  # fmt: skip
