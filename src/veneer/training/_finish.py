"""The end of a run: its figures, its folder, and the word that all is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from veneer.tasks import Task
from veneer.training import _open
from veneer.training._checkpoint import Checkpoints, plain
from veneer.training._evaluate import predictions_of
from veneer.training._job import Job
from veneer.training._loop import Run
from veneer.training._result import TrainResult
from veneer.training._settings import Settings


def finish(
    run: Run,
    base: Any,
    job: Job,
    rows: _open.Rows,
    folder: Path | None,
    notes: list[str],
    opens: Mapping[str, Any],
) -> TrainResult:
    """Evaluate, save, and only then say that the run is finished."""
    highest = peak(run.device)
    predictions = {s: run.predictions(s) for s in run.settings.evaluate_on if s in run.encoded}
    metrics = {s: run.task.metrics(found) for s, found in predictions.items()}
    count = sum(p.numel() for p in run.subject.parameters())
    size = 0
    if folder is not None:
        size = run.subject.save(folder, described(run, base, job, rows, metrics, opens))
    result = TrainResult(
        method=job.method_text + (f"+{job.recipe_text}" if job.recipe_text else ""),
        task=run.task.name,
        primary_metric=run.task.primary_metric,
        metrics=metrics,
        predictions=predictions,
        trainable_parameters=count,
        bytes_on_disk=size,
        step_seconds=run.median_step_seconds,
        tokens_per_second=run.tokens / max(run.seconds, 1e-9),
        peak_memory_bytes=highest,
        folder="" if folder is None else str(folder),
        learning_rate=run.learning_rate,
        steps=run.step_now,
        seed=run.settings.seed,
        train_seconds=run.seconds,
        trained_tokens=run.tokens,
        history=run.history,
        notes=[*notes, *run.notes],
    )
    if folder is not None:
        result.write(folder)
        Checkpoints(folder).clear()
    return result


def described(
    run: Run,
    base: Any,
    job: Job,
    rows: _open.Rows,
    metrics: Mapping[str, Any],
    opens: Mapping[str, Any],
) -> dict[str, Any]:
    """What the adapter's folder says beside the adapter, so that another process can predict with it."""
    return {
        "task": run.task.to_dict(),
        "opens": {
            "spec": lasting(base.spec), "name": base.name, "fresh": list(base.fresh),
            **{k: v for k, v in opens.items() if v},
        },
        "training": {
            "steps": run.step_now, "learning_rate": run.learning_rate, "seed": run.settings.seed,
            "data": rows.spec, "recipe": job.recipe_text, "metrics": plain(metrics),
        },
    }  # fmt: skip


def lasting(spec: str) -> str:
    """A spec that means the same from another folder."""
    path = Path(spec).expanduser()
    return str(path.resolve()) if spec and path.exists() else spec


def untrained(
    base: Any,
    task: Task,
    encoded: Mapping[str, Any],
    feeder: Any,
    settings: Settings,
    accelerator: Any,
    folder: Path | None,
    notes: list[str],
) -> TrainResult:
    """The base as it is: no adapter, no step. A head that no file filled predicts by chance."""
    predictions = {
        s: predictions_of(
            base.model, task, encoded[s], feeder, batch_size=settings.evaluate_batch_size,
            device=accelerator.device, autocast=accelerator.autocast, seed=settings.seed,
        )
        for s in settings.evaluate_on if s in encoded
    }  # fmt: skip
    result = TrainResult(
        "untrained",
        task.name,
        task.primary_metric,
        {s: task.metrics(p) for s, p in predictions.items()},
        predictions,
        0,
        0,
        0.0,
        0.0,
        peak(accelerator.device),
        "" if folder is None else str(folder),
        0.0,
        0,
        settings.seed,
        0.0,
        0,
        [],
        notes,
    )
    if folder is not None:
        result.write(folder)
    return result


def reset_peak(device: Any) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: Any) -> int:
    """Bytes at the highest: of the device's allocator, or of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:  # not a POSIX system
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
