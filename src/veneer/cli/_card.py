"""The model card beside a saved adapter: what it is, what it was trained on, how good it was, how to use it.

Short and honest: every figure has its n, and what was not measured is not there.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from veneer.training import TrainResult

CARD = "README.md"


def write_card(folder: str | Path, splits: Any = None) -> Path:
    """Write README.md from what lies in an adapter's folder. A card that a person has changed is left alone."""
    folder = Path(folder).expanduser()
    target = folder / CARD
    mark = "<!-- written by veneer -->"
    if target.is_file() and mark not in target.read_text(encoding="utf-8"):
        return target
    record = json.loads((folder / "veneer.json").read_text(encoding="utf-8"))
    found = TrainResult.read(folder)
    # Of the adapter, not of the card: a card that is written again is the same.
    written = (folder / "veneer.json").stat().st_mtime
    day = datetime.fromtimestamp(written, UTC).date().isoformat()
    target.write_text(card(record, found, str(folder), day, splits) + f"\n{mark}\n", encoding="utf-8")
    return target


def card(record: dict[str, Any], found: Any, folder: str, day: str, splits: Any = None) -> str:
    """The text of the card."""
    from veneer.edits import lookup

    base, task = _base(record), record.get("task") or {}
    lines = [
        "---",
        f"base_model: {base}",
        "library_name: veneer",
        f"tags: [{record['method']}]",
        "---",
        "",
        f"# {lookup(record['method']).__name__} adapter for {base}",
        "",
        f"An adapter: it needs its base, {base}, to run.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(record, splits, day)),
        "",
        "## Results",
        "",
        *_metrics((record.get("training") or {}).get("metrics") or {}, found),
        "",
        "## Use",
        "",
        "```sh",
        *_use(task.get("name", ""), folder),
        "```",
    ]  # fmt: skip
    return "\n".join(lines)


def _facts(record: dict[str, Any], splits: Any, day: str) -> list[tuple[str, str]]:
    from veneer.edits import lookup

    training, versions = record.get("training") or {}, record.get("versions") or {}
    base = record.get("base") or {}
    options = ", ".join(f"{k} = {v}" for k, v in sorted((record.get("options") or {}).items()))
    recipe = f", recipe {training['recipe']}" if training.get("recipe") else ""
    return [
        ("base", f"{_base(record)}, fingerprint {base.get('fingerprint', {}).get('values', 'not recorded')}"),
        ("method", f"{record['method']}, {lookup(record['method']).facts.paper}"),
        ("options", options or "defaults"),
        ("task", _task(record.get("task") or {})),
        ("data", f"{training.get('data') or 'not recorded'}{_counts(splits)}"),
        ("training", f"{training.get('steps', '?')} steps, rate {training.get('learning_rate', 0):.3g}, "
                     f"seed {training.get('seed', '?')}{recipe}"),
        ("size", f"{sum(map(math.prod, record.get('tensors', {}).values())):,} numbers saved"),
        ("made", f"{day}, veneer {versions.get('veneer', '?')}, torch {versions.get('torch', '?')}"),
    ]  # fmt: skip


def _base(record: dict[str, Any]) -> str:
    opens = record.get("opens") or {}
    return opens.get("spec") or record.get("base", {}).get("spec") or opens.get("name") or "not recorded"


def _task(task: dict[str, Any]) -> str:
    labels = task.get("labels") or ()
    return task.get("name", "not recorded") + (f": {', '.join(map(str, labels))}" if labels else "")


def _counts(splits: Any) -> str:
    return (
        ""
        if splits is None
        else " (" + ", ".join(f"{n} {len(rows):,}" for n, rows in splits.parts.items()) + ")"
    )


def _metrics(metrics: dict[str, dict[str, float]], found: Any) -> list[str]:
    if not metrics:
        return ["None was measured."]
    lines = ["| split | n | metric | value |", "|---|---|---|---|"]
    for split, values in metrics.items():
        n = len(found.predictions[split]) if found is not None and split in found.predictions else "?"
        lines += [f"| {split} | {n} | {name} | {value:.4g} |" for name, value in values.items()]
    lines += ["", "One run with one seed; another seed gives other figures."]
    if "validation" in metrics:
        lines.append("Where a run stops early, it is chosen by its validation score, which is then too kind.")
    return lines


def _use(task: str, folder: str) -> list[str]:
    if task in ("instruct", "lm"):
        return [f'veneer generate --adapter {folder} "a prompt"']
    if task in ("qa", "rank"):
        return [f"veneer predict --adapter {folder} --input FILE"]
    return [f'veneer predict --adapter {folder} "a text"']
