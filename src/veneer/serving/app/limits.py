"""What one key may have at a time: requests in flight, and tokens a minute.

Tokens are a bucket that fills evenly and holds one minute's worth. A request is let in while the bucket is not
empty, and pays for what it used: nobody has to guess the length of an answer beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .errors import ApiError
from .keys import Key
from .settings import Settings


@dataclass
class _Account:
    running: int = 0
    tokens: float = 0.0  # left in the bucket; below zero after a long answer
    at: float = 0.0
    is_new: bool = True


class Limits:
    """Counts of every key. All calls are made on the event loop."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._accounts: dict[str, _Account] = {}

    def enter(self, key: Key) -> None:
        """Count a request in, or refuse it with 429 and the seconds to wait."""
        account = self._accounts.setdefault(key.name, _Account())
        most = self._settings.in_flight if key.in_flight is None else key.in_flight
        if most is not None and account.running >= most:
            raise ApiError(
                429, f"This key has {account.running} requests in flight, its limit is {most}.",
                code="too_many_requests", retry_after=1,
            )  # fmt: skip
        rate = self._rate(key)
        if rate is not None:
            self._fill(account, rate)
            if account.tokens <= 0:
                raise ApiError(
                    429, f"This key has used its {rate:,} tokens a minute.",
                    code="tokens_per_minute", retry_after=(1 - account.tokens) / rate * 60,
                )  # fmt: skip
        account.running += 1

    def pay(self, key: Key, tokens: int) -> None:
        """Take what a request used out of its key's bucket."""
        rate = self._rate(key)
        if rate is not None:
            account = self._accounts.setdefault(key.name, _Account())
            self._fill(account, rate)
            account.tokens -= tokens

    def leave(self, key: Key) -> None:
        self._accounts[key.name].running -= 1

    def _rate(self, key: Key) -> int | None:
        return self._settings.tokens_per_minute if key.tokens_per_minute is None else key.tokens_per_minute

    def _fill(self, account: _Account, rate: int) -> None:
        now = self._clock()
        if account.is_new:
            account.tokens, account.is_new = rate, False
        else:
            account.tokens = min(rate, account.tokens + rate * (now - account.at) / 60)
        account.at = now
