"""Laws: what every method promises, by number and name.

A law is a function of a `Subject` (a method on a tiny base). It returns, or raises `Broken` with the
number that broke it. Laws are registered by `@law(number, name)`; `LAWS` lists them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.errors import UnknownName, nearest

if TYPE_CHECKING:
    from ._subject import Subject
    from .bases import TinyBase

EXACT = 1e-9  # largest relative difference in float64 of two ways to compute one thing


class Broken(AssertionError):
    """A law does not hold. `value` is the number that broke it, where there is one."""

    def __init__(self, what: str, value: float | None = None) -> None:
        super().__init__(what)
        self.value = value


class DoesNotApply(Exception):
    """A law, or a method, says nothing about this base."""


class NotClaimed(Exception):
    """The method declares, with a reason, that a law does not hold for it."""


@dataclass(frozen=True)
class Law:
    """One law: its function, and which bases it speaks about."""

    number: int
    name: str
    check: Callable[[Subject], str | None]
    speaks_of: Callable[[TinyBase], bool] = lambda base: True

    @property
    def meaning(self) -> str:
        """The first line of the docstring."""
        return (self.check.__doc__ or "").strip().splitlines()[0]


LAWS: dict[str, Law] = {}


def law(number: int, name: str, speaks_of: Callable[[TinyBase], bool] | None = None) -> Callable[[Any], Any]:
    """Register a law under its number and name."""

    def register(check: Callable[[Subject], str | None]) -> Callable[[Subject], str | None]:
        LAWS[name] = Law(number, name, check, speaks_of or (lambda base: True))
        return check

    return register


def chosen(laws: Iterable[str | int] | str | int | None) -> list[Law]:
    """Laws by name or number, in their order; None is all. Raises UnknownName."""
    every = sorted(LAWS.values(), key=lambda each: each.number)
    if laws is None:
        return every
    wanted = [laws] if isinstance(laws, (str, int)) else list(laws)
    by_number = {str(each.number): each.name for each in every}
    found = [by_number.get(str(w), str(w)) for w in wanted]
    for name in found:
        if name not in LAWS:
            raise UnknownName(
                f"no law is called '{name}'.",
                nearest=nearest(name, LAWS) or tuple(LAWS),
                next_step="veneer laws",
            )
    return [each for each in every if each.name in found]


# What no method may decline, by the port that it uses. Identity can be declared away at any port, by
# `starts_as_identity=False` with a reason. `around` stands where an output edit does, so it answers for
# the same.
_OUTPUT = (
    "identity",
    "equation",
    "trains",
    "detach",
    "save",
    "rows",
    "cohort",
    "padding",
    "cache",
    "compile",
    "precision",
)
MANDATORY: dict[str, tuple[str, ...]] = {
    "weight": ("identity", "equation", "one_form", "trains", "detach", "merge", "save", "rows", "cohort",
               "precision"),
    "input": _OUTPUT,
    "output": _OUTPUT,
    "around": _OUTPUT,
    "attention": tuple(n for n in _OUTPUT if n != "cohort"),
    "tokens": tuple(n for n in _OUTPUT if n != "cohort"),
    "exit": ("equation", "trains", "detach", "save", "rows", "padding", "precision"),
}  # fmt: skip


def mandatory(ports: Iterable[str]) -> set[str]:
    """Laws that a method of these ports may not decline. Forms and merging are for pure weight edits only:
    a gate at another port may depend on the input, and then nothing can be merged."""
    ports = tuple(ports)
    found = {name for port in ports for name in MANDATORY.get(port, ())}
    return found if set(ports) <= {"weight"} else found - {"one_form", "merge"}


# -- comparing -----------------------------------------------------------------------------------------------


def flat(values: Any) -> Tensor:
    """One vector of a tensor, or of a list or dict of them."""
    if isinstance(values, Tensor):
        return values.detach().flatten()
    parts = list(values.values()) if isinstance(values, dict) else list(values)
    return torch.cat([p.detach().flatten() for p in parts]) if parts else torch.zeros(0)


def difference(found: Any, expected: Any) -> float:
    """Largest difference over the largest expected value; infinite where shapes differ or NaN."""
    a, b = flat(found), flat(expected)
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.double(), b.double()
    worst = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-300)
    return worst if worst == worst and bool(a.isfinite().all()) else float("inf")


def agree(found: Any, expected: Any, what: str, tolerance: float = EXACT) -> float:
    """Raise Broken where the relative difference is above the tolerance; return it otherwise."""
    worst = difference(found, expected)
    if not worst <= tolerance:
        raise Broken(f"{what}: relative difference {worst:.3g}, allowed {tolerance:.0e}", worst)
    return worst


def same_bits(found: Any, expected: Any, what: str) -> None:
    """Raise Broken where tensors are not equal bit for bit."""
    a, b = flat(found), flat(expected)
    if a.shape != b.shape or not torch.equal(a, b):
        raise Broken(
            f"{what}: not bit for bit the same (relative difference {difference(a, b):.3g})", difference(a, b)
        )


def differ(found: Any, other: Any, what: str, least: float = 1e-5) -> None:
    """Raise Broken where two outputs that should differ do not: comparing equal things shows nothing."""
    worst = difference(found, other)
    if worst < least:
        raise Broken(
            f"{what}: relative difference {worst:.3g}, at least {least:.0e} is needed to see anything", worst
        )
