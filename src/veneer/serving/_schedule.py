"""Who is next: a counter of tokens served for each account, and whoever has had least for its weight goes first.

An account is a key, or, for requests without one, an adapter. An account that comes back after it had nothing to do
starts where the others are, so that idling earns no credit. Within an account requests go in the order of arrival. A
request whose adapter is still being read is passed over and holds up nobody; one that has waited too long goes first.

After Sheng et al., 2024, arXiv:2401.00588 (virtual token counters).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ._request import QueueFull, Request

PRICE = (1.0, 2.0)  # of a prompt's token, of a generated one
QUANTUM = 64.0  # how far an account may be ahead of one that waits before a row of it makes way


def account_of(request: Request) -> str:
    return f"key {request.key}" if request.key else f"adapter {request.version or ''}"


@dataclass
class Account:
    """served: what it had, in tokens at their price over its weight."""

    weight: float
    served: float = 0.0
    running: int = 0
    waiting: list[tuple[Request, float]] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting


class Schedule:
    """limit: requests that may wait. weights: {key or version: share}; 1 where it is not named.

    patience: seconds after which a waiting request goes before all others.
    """

    def __init__(
        self, limit: int = 256, weights: Mapping[str, float] | None = None, patience: float = 30.0
    ) -> None:
        self.limit, self.patience = limit, patience
        self.weights = dict(weights or {})
        self.accounts: dict[str, Account] = {}
        self.length = 0
        self._paid: set[str] = set()  # waiting requests that ran before: their prompts are not charged again

    def check(self, rate: float = 0.0) -> None:
        """Raise QueueFull where there is no room. rate: requests a second that have lately been done."""
        if self.length >= self.limit:
            raise QueueFull(self.length, min(60.0, max(1.0, self.length / rate if rate > 0 else 1.0)))

    def push(self, request: Request) -> None:
        account = self._account(request)
        if account.idle:  # lifted to where the others are
            busy = [a.served for a in self.accounts.values() if not a.idle]
            account.served = max([account.served, min(busy)] if busy else [account.served])
        account.waiting.append((request, time.monotonic()))
        self.length += 1

    def pick(self, ready: Callable[[Request], bool | None]) -> Request | None:
        """The next request that `ready` says can run, taken out of the queue; its prompt is charged.

        ready: None says that it could, were there room for its adapter. One that has waited too long then has the
        others wait until there is.
        """
        now = time.monotonic()
        late = sorted(
            (since, name, i)
            for name, a in self.accounts.items()
            for i, (_, since) in enumerate(a.waiting)
            if now - since > self.patience
        )
        for _, name, i in late:
            able = ready(self.accounts[name].waiting[i][0])
            if able:
                return self._take(self.accounts[name], i)
            if able is None:
                return None
        for account in sorted(
            (a for a in self.accounts.values() if a.waiting), key=lambda a: (a.served, a.waiting[0][1])
        ):
            asked: set[str | None] = set()
            for i, (request, _) in enumerate(account.waiting):
                if request.version in asked:
                    continue
                if ready(request):
                    return self._take(account, i)
                asked.add(request.version)
        return None

    def owed(self, running: Sequence[Request], ready: Callable[[Request], bool | None]) -> Request | None:
        """Of running requests, one that should make way: its account has had more than somebody's who waits."""
        if not running:
            return None
        most = max(running, key=lambda r: self._account(r).served)
        ahead = self._account(most)
        for account in self.accounts.values():
            if account is ahead or not account.waiting or ahead.served <= account.served + QUANTUM:
                continue
            if any(ready(request) for request, _ in account.waiting[:1]):
                return most
        return None

    def put_back(self, request: Request) -> None:
        """A request that ran makes way for another; it is the first of its account to go on."""
        account = self._account(request)
        account.running -= 1
        account.waiting.insert(0, (request, time.monotonic()))
        self._paid.add(request.id)
        self.length += 1

    def charge(self, request: Request, generated: int) -> None:
        account = self._account(request)
        account.served += generated * PRICE[1] / account.weight

    def done(self, request: Request) -> None:
        """A request that was picked runs no more."""
        account = self._account(request)
        account.running -= 1
        self._forget(account_of(request))

    def remove(self, request_id: str) -> Request | None:
        """Take a waiting request out, by its id."""
        for name, account in self.accounts.items():
            for i, (request, _) in enumerate(account.waiting):
                if request.id == request_id:
                    del account.waiting[i]
                    self.length -= 1
                    self._paid.discard(request_id)
                    self._forget(name)
                    return request
        return None

    def waiting(self) -> list[Request]:
        return [r for a in self.accounts.values() for r, _ in a.waiting]

    def _take(self, account: Account, i: int) -> Request:
        request, _ = account.waiting.pop(i)
        self.length -= 1
        account.running += 1
        if request.id not in self._paid:
            account.served += len(request.prompt) * PRICE[0] / account.weight
        self._paid.discard(request.id)
        return request

    def _account(self, request: Request) -> Account:
        name = account_of(request)
        found = self.accounts.get(name)
        if found is None:
            weight = self.weights.get(request.key or request.version or "", 1.0)
            found = self.accounts[name] = Account(max(weight, 1e-6))
        return found

    def _forget(self, name: str) -> None:
        """An idle account that is not ahead of the others need not be remembered."""
        account = self.accounts[name]
        if account.idle:
            others = [a.served for a in self.accounts.values() if not a.idle]
            if not others or account.served <= min(others) or len(self.accounts) > 4096:
                del self.accounts[name]
