"""What a call of `train` asks for, checked and opened up to the base: method, rows, task, settings, folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.bases.matmul import check_form
from veneer.errors import TrainingFailed
from veneer.tasks import Task
from veneer.training import _open
from veneer.training._checkpoint import write_json
from veneer.training._job import Job
from veneer.training._matmul import MeasureMatmul
from veneer.training._result import TrainResult
from veneer.training._settings import Settings, check_options, hold_same

BESIDE = ("task", "output", "method_options", "data_options", "max_length", "device")


@dataclass
class Wanted:
    """One adapter that is to be trained. opens: what another process needs to open the same base."""

    job: Job
    rows: _open.Rows
    task: Task
    settings: Settings
    folder: Path | None
    whole: tuple[str, ...]
    members: Mapping[str, str | Path]
    hooks: tuple[Any, ...]
    opens: Mapping[str, Any]

    @property
    def look_at(self) -> list[str]:
        """The splits that it evaluates on."""
        s = self.settings
        looks = s.early_stopping is not None or s.evaluate_every is not None
        return [*s.evaluate_on, *(["validation"] if looks else [])]

    def finished(self) -> TrainResult | None:
        """The result of a finished run of the same settings; an error where the folder holds another run."""
        if self.folder is None:
            return None
        begun = self.folder / "run.json"
        if begun.is_file():
            hold_same(json.loads(begun.read_text()), self.settings, str(self.folder))
        elif (self.folder / "veneer.json").exists():
            raise TrainingFailed(
                f"{self.folder} holds an adapter that no run of `train` wrote.",
                next_step="choose another output",
            )
        else:
            write_json(begun, self.settings.decides())
        return TrainResult.read(self.folder)


def wanted(
    *,
    model: Any,
    data: Any,
    method: Any = "lora",
    task: str | None = None,
    output: str | Path | None = None,
    max_length: int | None = None,
    recipe: Any = None,
    method_options: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    task_options: Mapping[str, Any] | None = None,
    whole: Sequence[str] = (),
    members: Mapping[str, str | Path] | None = None,
    hooks: Sequence[Any] = (),
    dtype: Any = None,
    quantise: str | None = None,
    matmul: str | None = None,
    **settings: Any,
) -> Wanted:
    """The options of `train`, checked. Reads the data; opens no base."""
    check_options(settings, also=BESIDE)
    if "evaluate_on" in settings:
        given = settings["evaluate_on"]
        settings["evaluate_on"] = (given,) if isinstance(given, str) else tuple(given or ())
    job = Job(method, dict(method_options or {}), recipe)
    job.recipe()  # everything that needs no data is told before data is read
    Settings(**settings)
    rows = _open.open_rows(data, task, **(data_options or {}))
    made_task = _open.task_for(rows, max_length, **(task_options or {}))
    named = model if isinstance(model, (str, Path)) else getattr(model, "spec", "") or type(model).__name__
    named_dtype = None if dtype is None else str(dtype)
    form = check_form(matmul)
    changed = (
        {} if form == "plain" else {"matmul": form}
    )  # a run from before there were forms goes on as plain
    identity = {
        "method": job.method_text, "recipe": job.recipe_text, "base": str(named), "data": rows.digest,
        "task": made_task.to_dict(), "whole": list(whole), "quantise": quantise,
        "members": {name: str(place) for name, place in (members or {}).items()}, "dtype": named_dtype,
        **changed,
    }  # fmt: skip
    return Wanted(
        job, rows, made_task, Settings(**settings, identity=identity),
        None if output is None else Path(output).expanduser(), tuple(whole), dict(members or {}),
        (*([MeasureMatmul()] if changed else []), *hooks), {"quantise": quantise, "dtype": named_dtype, **changed},
    )  # fmt: skip
