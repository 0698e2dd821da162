"""Budgets of memory for one model: its adapters, and what is kept of their edits; and what both take at present."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from veneer.errors import BadOption

from ._attach import host_of
from ._pages import CPU, DEVICE, DISK

_UNITS = {"": 1, "b": 1} | {
    f"{p}{i}b": (1024 if i else 1000) ** n for n, p in enumerate("kmgt", 1) for i in ("", "i")
}
UNSET: Any = object()


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. `adapters` are on the model's device, `cpu` and `disk` those that left it; `edits`: kept weights."""

    adapters: int
    cpu: int
    disk: int
    edits: int
    adapters_limit: int | None
    cpu_limit: int | None
    edits_limit: int
    away: tuple[str, ...]  # names of the adapters that are not on the device

    def __str__(self) -> str:
        def line(what: str, used: int, limit: int | None) -> str:
            return f"{what:10} {used:>15,} of {'any' if limit is None else f'{limit:,}':>15} bytes"

        return "\n".join([
            line("adapters", self.adapters, self.adapters_limit), line("cpu", self.cpu, self.cpu_limit),
            line("disk", self.disk, None), line("edits", self.edits, self.edits_limit),
        ])  # fmt: skip


def memory_budget(
    model: nn.Module,
    adapters: int | str | None = UNSET,
    *,
    cpu: int | str | None = UNSET,
    edits: int | str | None = UNSET,
    folder: str | os.PathLike[str] | None = None,
) -> MemoryUse:
    """Set how many bytes a model's adapters may take; return what they take. What is not named stays as it is.

    adapters: on the model's device; None for no limit (the start). Beyond it those used longest ago leave: to CPU
    memory up to `cpu` bytes (where the device is another; 0 at the start, None for no limit), then to files under
    `folder` (default: a temporary folder), and they come back when used. Adapters that are active, in use or in
    training stay; a call that needs more than the budget gets it, and the next other call gives it back.
    edits: for weights that settled edits made; None for as many as the base's own tensors have.
    A number of bytes, or a text such as "1.5 GiB". Raises BadOption, UnknownAdapter.
    """
    host = host_of(model)
    with host.lock:
        pages = host.pages
        if folder is not None:
            pages.folder = Path(folder)
        if cpu is not UNSET:
            pages.cpu_limit = None if cpu is None else _bytes("cpu", cpu)
        if edits is not UNSET:
            host.dense.limit = None if edits is None else _bytes("edits", edits)
        if adapters is not UNSET:
            pages.limit = None if adapters is None else _bytes("adapters", adapters)
            if pages.limit is None:
                pages.all_back()
        if adapters is not UNSET or cpu is not UNSET:
            pages.shrink()
        return MemoryUse(
            pages.bytes_at(DEVICE), pages.bytes_at(CPU), pages.bytes_at(DISK), host.dense.bytes, pages.limit,
            pages.cpu_limit, host.dense.limit, tuple(n for n in host.names if pages.where(n) != DEVICE),
        )  # fmt: skip


def _bytes(what: str, given: int | str) -> int:
    found = given
    if isinstance(given, str):
        parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", given)
        if parts and parts[2].lower() in _UNITS:
            found = round(float(parts[1]) * _UNITS[parts[2].lower()])
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise BadOption(
            f"memory_budget: {what}={given!r}: expected a number of bytes that is not negative.",
            next_step=f'{what}="512 MiB", {what}=2**29, or {what}=None for no limit of its own',
        )
    return found
