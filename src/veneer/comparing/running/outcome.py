"""What becomes of a run that has ended: its place, its status, and lines of plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.comparing.measures.calibration import confidence_of
from veneer.comparing.planning.arms import Arm
from veneer.comparing.running.ledger import write_atomic
from veneer.errors import (
    BadData,
    BadOption,
    NoSiteFound,
    NotPrepared,
    TrainingFailed,
    UnknownOption,
    Unsupported,
    VeneerError,
)


def run_folder(folder: Path, stage: str, arm: Arm, seed: int, rate: float | None, share: float = 1.0) -> Path:
    """Where a run lies."""
    name = f"seed-{seed}" if stage == "confirm" else f"tune-seed-{seed}-rate-{rate:g}"
    return folder / "runs" / arm.slug / (name if share == 1 else f"{name}-share-{share:g}")


def forget_test(folder: Path) -> None:
    """Take out what a trainer wrote of its evaluation: test scores are in the sealed file alone."""
    import json

    for path in (*folder.glob("predictions-*.jsonl"), folder / "result.json"):
        path.unlink(missing_ok=True)
    record = folder / "veneer.json"
    if record.is_file():
        said = json.loads(record.read_text(encoding="utf-8"))
        metrics = (said.get("training") or {}).get("metrics") or {}
        if metrics.keys() - {"validation"}:
            said["training"]["metrics"] = {key: of for key, of in metrics.items() if key == "validation"}
            write_atomic(record, json.dumps(said, indent=2, ensure_ascii=False) + "\n")


def reason_of(error: Exception) -> str:
    first = str(error).split("\n")[0]
    return first if isinstance(error, VeneerError) else f"{type(error).__name__}: {first}"


def status_of(error: Exception) -> str:
    """diverged is a result; not_applicable: no such arm here; failed: tried again at the next start."""
    text = str(error).lower()
    if getattr(error, "diverged", False) or isinstance(error, FloatingPointError):
        return "diverged"
    if isinstance(error, TrainingFailed):
        return "diverged" if "finite" in text or "nan" in text.split() else "failed"
    never = (Unsupported, NoSiteFound, NotPrepared, BadOption, UnknownOption)
    return "not_applicable" if isinstance(error, never) else "failed"


def item_line(line: Mapping[str, Any], arm: Arm) -> dict[str, Any]:
    if "item" not in line or "score" not in line:
        raise BadData(
            f"a test prediction of '{arm}' has {sorted(line)}: expected 'item' and 'score'.",
            next_step="a trainer returns a line an item: {'item': id, 'score': number, ...}",
        )
    kept = {
        key: plain(value) for key, value in line.items() if key in ("score", "prediction", "label", "query")
    }
    return kept | confidence_of(line) | {"item": str(line["item"]), "score": float(line["score"])}


def plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's; what is not finite as None; the rest as it is."""
    if hasattr(value, "item") and not isinstance(value, float | int):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def is_inside(path: Any, folder: Path) -> bool:
    return Path(path).resolve().is_relative_to(folder.resolve())
