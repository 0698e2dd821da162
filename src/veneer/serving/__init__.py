"""Adapters of any method behind one running base: the engine, the registry of versions, and the server over both."""

from __future__ import annotations

from ._engine import Engine
from ._request import (
    Answer,
    Event,
    Finish,
    Logprob,
    PromptTooLong,
    QueueFull,
    Request,
    Sampling,
    UnknownVersion,
)

__all__ = [
    "Answer",
    "Engine",
    "Event",
    "Finish",
    "Logprob",
    "PromptTooLong",
    "QueueFull",
    "Request",
    "Sampling",
    "UnknownVersion",
]
