"""What a run gives back, and how it lies on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import BadFile
from veneer.training._checkpoint import plain, write_bytes, write_json


@dataclass
class TrainResult:
    """One trained adapter.

    metrics: {split: {metric: value}}. predictions: {split: [{"item", "score", "prediction", "label",
    "probabilities"}]}, item being the row's number in its split. step_seconds: the median of a step.
    peak_memory_bytes: of the device, or of the whole process on the CPU. history: losses and evaluations by
    step.
    """

    method: str
    task: str
    primary_metric: str
    metrics: dict[str, dict[str, float]]
    predictions: dict[str, list[dict[str, Any]]]
    trainable_parameters: int
    bytes_on_disk: int
    step_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    folder: str
    learning_rate: float
    steps: int
    seed: int
    train_seconds: float
    trained_tokens: int
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, folder: Path) -> None:
        """result.json, and one predictions-SPLIT.jsonl a split; result.json is last, and says that all is
        there.
        """
        for split, found in self.predictions.items():
            lines = "".join(json.dumps(plain(p), ensure_ascii=False) + "\n" for p in found)
            write_bytes(folder / f"predictions-{split}.jsonl", lines.encode())
        saved = self.to_dict()
        saved["predictions"] = sorted(self.predictions)
        write_json(folder / "result.json", saved)

    @classmethod
    def read(cls, folder: Path) -> TrainResult | None:
        """The result of a finished run in `folder`, if there is one."""
        path = folder / "result.json"
        if not path.is_file():
            return None
        try:
            saved = json.loads(path.read_text())
            saved["predictions"] = {
                split: [
                    json.loads(line)
                    for line in (folder / f"predictions-{split}.jsonl").read_text().splitlines()
                ]
                for split in saved["predictions"]
            }
            saved["folder"] = str(folder)
            return cls(**saved)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadFile(
                f"{path} cannot be read: {error}.", next_step="delete it to evaluate the run again"
            ) from error

    def __str__(self) -> str:
        lines = [f"{self.method} on {self.task}: {self.steps} steps, {self.train_seconds:.1f} s"]
        for split, found in self.metrics.items():
            shown = ", ".join(f"{k} {v:.4f}" for k, v in found.items())
            lines.append(f"  {split:<10} {shown}")
        lines.append(
            f"  {self.trainable_parameters:,} trained parameters, {self.bytes_on_disk:,} bytes"
            f"{f' in {self.folder}' if self.folder else ''}; "
            f"{self.step_seconds * 1000:.1f} ms a step, {self.tokens_per_second:,.0f} tokens a second"
        )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
