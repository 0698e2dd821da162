"""Adapters of any method behind one running base: the engine, the registry of versions, and the server over both."""

from __future__ import annotations

from ._request import Event, Finish, Logprob, Request, Sampling

__all__ = ["Event", "Finish", "Logprob", "Request", "Sampling"]
