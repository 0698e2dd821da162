"""Which task an adapter's folder is for, and with which labels: by its own record, or by what HF PEFT writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer import engine
from veneer.tasks import Task, make_task, task_from_dict

from ._registry_content import CONFIG, CONFIG_TENSORS, RECORD

HF_TASKS = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag", "SEQ_2_SEQ_LM": "seq2seq", "CAUSAL_LM": "lm"}


def task_of(folder: Path) -> Task | None:
    """The task of an adapter's folder; None where it names none.

    A folder of HF PEFT does not name its labels: they are called LABEL_0 and so on, as transformers calls them, as
    many as its head has rows. A head of one row gives a number.
    """
    if (folder / RECORD).is_file():
        saved = engine.read_record(folder).get("task")
        return task_from_dict(saved) if isinstance(saved, Mapping) and "name" in saved else None
    if not (folder / CONFIG).is_file():
        return None
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever reads the folder says what is wrong with it
    name = HF_TASKS.get(str(config.get("task_type"))) if isinstance(config, dict) else None
    if name not in ("classify", "tag"):
        return None if name is None else make_task(name)
    count = _rows_of_head(folder, config)
    if count is None:
        return None
    if name == "classify" and count == 1:
        return make_task("regress")
    return make_task(name, labels=[f"LABEL_{i}" for i in range(count)])


def _rows_of_head(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Rows of the last matrix of the modules that are saved whole: the output layer has the fewest."""
    from safetensors import SafetensorError, safe_open

    saved = tuple(config.get("modules_to_save") or ())
    try:
        with safe_open(str(folder / CONFIG_TENSORS), "pt") as file:
            shapes = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    heads = [
        shape[0] for key, shape in shapes.items()
        if len(shape) == 2 and key.endswith(".weight") and any(m in key.split(".") for m in saved)
    ]  # fmt: skip
    return min(heads, default=None)
