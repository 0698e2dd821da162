"""Errors: the thing, the value, the nearest valid names, the next step.

Every message of veneer is built here, so that all of them have the same four parts, and a test can read each.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VeneerError(Exception):
    """Base of all errors that a user can cause and mend.

    `what` says what is wrong (the thing, the value, what was expected); `nearest` lists valid names;
    `next_step` is what to type next.
    """

    default_next = "veneer --help    shows the commands; veneer doctor what is installed"

    def __init__(self, what: str, *, nearest: Iterable[str] = (), next_step: str = "") -> None:
        next_step = next_step or self.default_next
        self.what, self.nearest, self.next_step = what, tuple(nearest), next_step
        lines = [what]
        if self.nearest:
            lines.append("  nearest: " + ", ".join(self.nearest))
        if next_step:
            lines.append("  next:    " + next_step)
        super().__init__("\n".join(lines))


class UnknownMethod(VeneerError):
    """No method has this key."""

    default_next = "veneer methods    lists all of them"


class UnknownOption(VeneerError):
    """A method, task or command has no option of this name."""

    default_next = "take one of the names above, or leave it out: every option has a default"


class BadOption(VeneerError):
    """An option has a value outside of what it accepts."""

    default_next = "give a value of that kind, or leave it out: every option has a default"


class UnknownAdapter(VeneerError):
    """No adapter of this name is on the model."""

    default_next = "veneer.adapters(model)    lists those that are on it"


class UnknownName(VeneerError):
    """A task, metric, file format, model or data set of this name does not exist."""

    default_next = "check the spelling and the path; names are case-sensitive"


class NoSiteFound(VeneerError):
    """A selector matches nothing, or only part of what it lists."""

    default_next = "veneer anatomy MODEL    shows every role and its modules"


class Unsupported(VeneerError):
    """A combination that cannot be expressed exactly, with the reason."""

    default_next = "choose another method or base, or leave that site out with exclude="


class NotPrepared(VeneerError):
    """A method needs data, or the number of steps, before it can be used."""

    default_next = "give what the message names when the adapter is attached"


class NoGradient(VeneerError):
    """A trained tensor got no gradient."""


class ShapeDiffers(VeneerError):
    """A file and a model disagree about a tensor or about the base."""

    default_next = "load it on the base that it was trained on"


class BadFile(VeneerError):
    """A file is truncated, of a refused kind, or reaches outside of its folder."""

    default_next = "save it again where it was made, or copy it again"


class BadData(VeneerError):
    """Data that cannot be trained on, with counts and line numbers."""

    default_next = "veneer check DATA    lists every problem with its line"


class MissingPackage(VeneerError):
    """An optional package is needed; the message names the install line."""


class TrainingFailed(VeneerError):
    """Training stopped by itself: a loss that is not finite, nothing to train, a folder in use."""


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """The valid names that look most like `name`, best first."""
    return difflib.get_close_matches(str(name), list(valid), n=count, cutoff=0.4)


def missing_package(package: str, extra: str, what_for: str) -> MissingPackage:
    return MissingPackage(
        f"{what_for} needs the package '{package}', which is not installed.",
        next_step=f"pip install 'veneer[{extra}]'",
    )
