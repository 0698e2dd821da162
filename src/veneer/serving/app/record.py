"""What is known of one HTTP request, gathered while it is answered, and the line that the log gets of it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import Request

from .keys import ANYBODY, Key

LOGGER = logging.getLogger("veneer.serving")
PLACE = "veneer.record"  # in the scope of the request


@dataclass
class Record:
    id: str
    method: str = ""
    path: str = ""
    key: Key = ANYBODY
    began: float = field(default_factory=time.perf_counter)
    status: int = 0
    facts: dict[str, Any] = field(
        default_factory=dict
    )  # model, version, tokens, ...; added as they are known
    outcome: str = ""

    def line(self) -> bytes:
        """One JSON object, without a word of what was said unless a handler put it into `facts`."""
        said = {
            "time": round(time.time(), 3),
            "request_id": self.id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(time.perf_counter() - self.began, 4),
            "key": self.key.name or None,
            "outcome": self.outcome or None,
            **self.facts,
        }
        return orjson.dumps({k: v for k, v in said.items() if v is not None}, default=str)

    def log(self, level: int) -> None:
        if LOGGER.isEnabledFor(level):
            LOGGER.log(level, "%s", self.line().decode())


def record_of(request: Request) -> Record:
    return request.scope[PLACE]
