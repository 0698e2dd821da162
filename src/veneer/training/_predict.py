"""Prediction from an adapter's folder, in any process: the folder says which base and which task it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from veneer.errors import BadData, BadFile, Unsupported
from veneer.tasks import Task, task_from_dict
from veneer.training import _open
from veneer.training._evaluate import predictions_of

TEXT_COLUMN = {"seq2seq": "source", "lm": "text"}  # where a bare text goes; the others have `text`


@dataclass
class Evaluation:
    """metrics and predictions of one split, as `train` gives them."""

    split: str
    metrics: dict[str, float]
    predictions: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Predictor:
    """An adapter on its base, ready to predict. Opening it is what takes time; predictions are cheap."""

    def __init__(self, model: torch.nn.Module, task: Task, feeder: Any, name: str, device: Any) -> None:
        self.model, self.task, self.feeder, self.name, self.device = model, task, feeder, name, device

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        model: Any = None,
        task: str | None = None,
        tokenizer: Any = None,
        device: Any = None,
        dtype: Any = None,
        matmul: str | None = None,
    ) -> Predictor:
        """From a folder that `train` wrote. model: another spec, or an open base, in place of the recorded
        one.

        task: for folders that name none (adapters that were saved by hand, or come from elsewhere). matmul: None
        multiplies as in its training.
        """
        from veneer import engine

        folder = engine.folder_of(folder)
        record = engine.read_record(folder) if (folder / "veneer.json").is_file() else {}
        made = _task_of(record, task, folder)
        opens = record.get("opens") or {}
        spec = model if model is not None else opens.get("spec") or record.get("base", {}).get("spec")
        if not spec:
            raise BadFile(
                f"{folder} does not say which base it is for.", next_step="give it: model=SPEC (--model SPEC)"
            )
        base = _open.open_model(
            spec, made, tokenizer=tokenizer, seed=0, dtype=dtype or opens.get("dtype"),
            quantise=opens.get("quantise"), matmul=matmul or opens.get("matmul"),
        )  # fmt: skip
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        base.model.to(where)
        for name, place in (opens.get("members") or {}).items():
            engine.load(base.model, place, name, activate=False)
        adapter = engine.load(base.model, folder)
        base.model.eval()
        feeder = tokenizer if tokenizer is not None else _open.feeder_of(base, made)
        return cls(base.model, made, feeder, adapter.name, where)

    def predict(self, rows: Any, *, batch_size: int = 64, **options: Any) -> list[dict[str, Any]]:
        """A prediction a row: item, prediction, probabilities, and score and label where rows have labels.

        rows: a text, texts, rows as dicts, or anything that `veneer.data.read` reads (options go there).
        """
        found = self._rows(rows, options)
        return self._predictions(found, batch_size)

    def evaluate(self, data: Any, *, split: str = "test", batch_size: int = 64, **options: Any) -> Evaluation:
        """Predictions and metrics of one split of `data`; labels are those that the adapter was trained
        with.
        """
        if self.task.labels:
            options.setdefault("labels", list(self.task.labels))
        rows = _open.open_rows(data, self.task.name, **options).splits
        if not rows.get(split):
            raise BadData(
                f"the data has no rows in {split!r}.",
                nearest=[s for s, found in rows.items() if found],
                next_step="split= one of these",
            )
        predictions = self._predictions(rows[split], batch_size)
        return Evaluation(split, self.task.metrics(predictions), predictions)

    def _predictions(self, rows: Sequence[Mapping[str, Any]], batch_size: int) -> list[dict[str, Any]]:
        encoded = self.task.encode(rows, self.feeder, self.model)
        return predictions_of(
            self.model, self.task, encoded, self.feeder, batch_size=batch_size, device=self.device
        )

    def _rows(self, rows: Any, options: dict[str, Any]) -> Sequence[Mapping[str, Any]]:
        if (isinstance(rows, str) and (options or _is_data(rows))) or isinstance(rows, Path):
            from veneer import data

            return data.read(str(rows), task=self.task.name, labelled=False, **options).test
        listed = [rows] if isinstance(rows, (str, Mapping)) else list(rows)
        return [self._row(row) if isinstance(row, str) else row for row in listed]

    def _row(self, text: str) -> dict[str, Any]:
        if not text.strip():
            raise BadData(
                "there is nothing to predict for: the text is empty.",
                next_step="veneer predict --adapter FOLDER 'a sentence'",
            )
        if self.task.name == "tag":
            return {"tokens": text.split()}
        if self.task.name in ("image-classify", "speech"):
            return {"image" if self.task.name == "image-classify" else "audio": text}
        if self.task.name in ("qa", "rank", "instruct"):
            raise Unsupported(
                f"a bare text is not enough for the task {self.task.name!r}.",
                next_step={
                    "qa": 'rows such as {"question": ..., "context": ...}',
                    "rank": 'rows such as {"query": ..., "document": ...}',
                    "instruct": "veneer generate answers it; predict scores rows of messages",
                }[self.task.name],
            )
        return {TEXT_COLUMN.get(self.task.name, "text"): text}


def _is_data(text: str) -> bool:
    """A file that is there, or a builtin set: not a text to predict for."""
    if text.startswith("builtin:"):
        return True
    try:
        return len(text) < 1024 and "\n" not in text and Path(text).suffix != "" and Path(text).is_file()
    except OSError:
        return False


def _task_of(record: Mapping[str, Any], task: str | None, folder: Path) -> Task:
    from veneer.tasks import make_task

    saved = record.get("task")
    if isinstance(saved, Mapping) and task in (None, saved.get("name")):
        return task_from_dict(saved)
    if task is None:
        raise BadFile(
            f"{folder} does not say which task it is for.", next_step="give it: task=NAME (--task NAME)"
        )
    return make_task(task)


def predict(folder: str | Path, rows: Any, **options: Any) -> list[dict[str, Any]]:
    """Predictions of an adapter's folder for a text, texts, rows or a file. See `Predictor`."""
    opening = {
        k: options.pop(k) for k in ("model", "task", "tokenizer", "device", "dtype", "matmul") if k in options
    }
    return Predictor.open(folder, **opening).predict(rows, **options)


def evaluate(folder: str | Path, data: Any, **options: Any) -> Evaluation:
    """Metrics and predictions of an adapter's folder on a split of `data`. See `Predictor`."""
    opening = {
        k: options.pop(k) for k in ("model", "task", "tokenizer", "device", "dtype", "matmul") if k in options
    }
    return Predictor.open(folder, **opening).evaluate(data, **options)
