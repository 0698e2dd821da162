"""What an export did: files, sites, tensors, how far the written adapter is from the one on the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class ExportReport:
    """The outcome of `veneer.export`. `largest_difference` is of outputs on `probe=`, None where none was given."""

    format: str
    folder: Path
    method: str
    kind: str  # what the other program calls the method
    sites: int = 0
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    files: list[str] = field(default_factory=list)
    largest_difference: float | None = None
    notes: list[str] = field(default_factory=list)  # what is the same function but not the same form

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "folder": str(self.folder)}

    def __str__(self) -> str:
        lines = [
            f"{self.method} written as {self.kind} ({self.format}) to {self.folder}: {self.sites} sites, "
            f"{self.tensors} tensors, {self.parameters:,} numbers, {self.bytes:,} bytes"
        ]
        if self.largest_difference is not None:
            lines.append(f"  read back, outputs differ by at most {self.largest_difference:.3g}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
