"""`train`: one adapter, from what a person types to a folder and its figures; the same call resumes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.errors import TrainingFailed
from veneer.tasks import Task
from veneer.training import _open
from veneer.training._attach import attached, checkpointed, statistics_data
from veneer.training._checkpoint import Checkpoints, locked, write_json
from veneer.training._finish import finish, lasting, reset_peak, untrained
from veneer.training._job import Job
from veneer.training._loop import Run
from veneer.training._progress import Progress, progress_for
from veneer.training._result import TrainResult
from veneer.training._seeds import own_randomness, seed_all
from veneer.training._settings import Settings, check_options, hold_same

STATE = ("adapter", "optimizer", "own", "position")


def train(
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
    tokenizer: Any = None,
    dtype: Any = None,
    quantise: str | None = None,
    device: Any = None,
    progress: bool | Progress = True,
    **settings: Any,
) -> TrainResult:
    """Train one adapter, with its head where the head is fresh; evaluate it; save it in `output`.

    model: a spec ("builtin:minilm", a folder, a hub id, ...), a Base, a module, or (module, tokenizer).
    data: a spec, rows by split, or `veneer.data.read`'s Splits. method: an arm
    (`method[:option=value,...][+recipe]`), a Method, or "untrained". whole: modules that are trained whole,
    beside fresh ones. members: {name: folder} of adapters that the method combines (adapter_fusion).
    data_options, task_options: for `veneer.data.read` and for the task. Settings: learning_rate (None: from
    the method's range), epochs=3, max_steps, max_tokens (real ones), max_seconds (of steps), batch_size=16 rows a
    step, accumulate=1 parts of it, seed, weight_decay=0.01,
    warmup=0.06 (a part, or steps from 1 on), schedule="linear"|"cosine"|"constant",
    clip=1.0, gradient_checkpointing, mixed_precision="bf16"|"fp16", early_stopping (looks without gain),
    evaluate_every and save_every (steps; None: an epoch), evaluate_on=("validation",), evaluate_batch_size.
    The same call with the same output goes on where a killed one stopped, bit for bit on the CPU, and
    returns at once where it is finished. Raises TrainingFailed, BadData, UnknownOption, and what bases and
    methods raise.
    """
    check_options(settings, also=("task", "output", "method_options", "data_options", "max_length", "device"))
    if "evaluate_on" in settings:
        given = settings["evaluate_on"]
        settings["evaluate_on"] = (given,) if isinstance(given, str) else tuple(given or ())
    job = Job(method, dict(method_options or {}), recipe)
    rows = _open.open_rows(data, task, **(data_options or {}))
    made_task = _open.task_for(rows, max_length, **(task_options or {}))
    named = model if isinstance(model, (str, Path)) else getattr(model, "spec", "") or type(model).__name__
    identity = {
        "method": job.method_text, "recipe": job.recipe_text, "base": str(named), "data": rows.digest,
        "task": made_task.to_dict(), "whole": list(whole), "quantise": quantise,
        "members": {name: str(place) for name, place in (members or {}).items()},
        "dtype": None if dtype is None else str(dtype),
    }  # fmt: skip
    chosen = Settings(**settings, identity=identity)
    folder = None if output is None else Path(output).expanduser()
    listener = progress_for(progress)

    def go() -> TrainResult:
        return _run(
            job, rows, made_task, chosen, folder, listener, whole=whole, members=members or {}, hooks=hooks,
            device=device, opens={"quantise": quantise, "dtype": identity["dtype"]},
            open_base=lambda: _open.open_model(
                model, made_task, tokenizer=tokenizer, seed=chosen.seed, dtype=dtype, quantise=quantise
            ),
        )  # fmt: skip

    if folder is None:
        return go()
    with locked(folder):
        finished = _finished(folder, chosen)
        if finished is None:
            return go()
        Checkpoints(folder).clear()  # where a run was killed behind its last word
        return finished


def _finished(folder: Path, settings: Settings) -> TrainResult | None:
    """The result of a finished run of the same settings; an error where the folder holds another run."""
    begun = folder / "run.json"
    if begun.is_file():
        hold_same(json.loads(begun.read_text()), settings, str(folder))
    elif (folder / "veneer.json").exists():
        raise TrainingFailed(
            f"{folder} holds an adapter that no run of `train` wrote.", next_step="choose another output"
        )
    else:
        write_json(begun, settings.decides())
    return TrainResult.read(folder)


def _run(
    job: Job,
    rows: _open.Rows,
    task: Task,
    settings: Settings,
    folder: Path | None,
    listener: Progress,
    *,
    whole: Sequence[str],
    members: Mapping[str, str | Path],
    hooks: Sequence[Any],
    device: Any,
    opens: Mapping[str, Any],
    open_base: Any,
) -> TrainResult:
    recipe = job.recipe()
    exchanges = any(hasattr(h, "exchange") for h in hooks)
    accelerator = _open.accelerator_for(device, settings.mixed_precision, exchanges)
    with own_randomness():
        seed_all(settings.seed, "head")
        base = open_base()
        base.model.to(accelerator.device)
        feeder = _open.feeder_of(base, task)
        wanted = settings.evaluate_on
        needs_validation = settings.early_stopping is not None or settings.evaluate_every is not None
        look_at = [*wanted, *(["validation"] if needs_validation else [])]
        encoded, notes = _open.encode_splits(task, rows.splits, look_at, feeder, base.model)
        notes = [*base.notes, *notes]
        if not job.is_trained:
            return untrained(base, task, encoded, feeder, settings, accelerator, folder, notes)
        fresh = _open.fresh_modules(base.model, base.fresh)
        if fresh:
            notes.append(
                f"the file has no values for {', '.join(fresh)}: trained whole, and saved in the adapter"
            )
        loose = [n for n in base.fresh if "." not in n]
        if loose:
            notes.append(f"the file has no values for {', '.join(loose)}, which no module holds: not trained")
        for note in notes:
            listener.note(f"note: {note}")
        seed_all(settings.seed, "attach")
        data = statistics_data(job, task, encoded["train"], feeder, base.model, accelerator.device, notes)
        checkpoints = None if folder is None else Checkpoints(folder)
        with (
            attached(base.model, job, [*fresh, *whole], settings.seed, members, data) as subject,
            checkpointed(base.model, settings.gradient_checkpointing),
        ):
            run = Run(
                subject,
                task,
                encoded,
                feeder,
                settings,
                learning_rate=job.rate(settings.learning_rate, recipe),
                accelerator=accelerator,
                recipe=recipe,
                hooks=hooks,
                method=job.method,
                checkpoints=checkpoints,
                progress=listener,
            )
            saved = checkpoints.last(*STATE) if checkpoints is not None else None
            if saved is not None:
                run.restore(saved)
                listener.note(f"going on from step {run.step_now} of {run.total_steps}")
            reset_peak(accelerator.device)
            run.train()
            run.take_best()
            opening = {**opens, "members": {n: lasting(str(p)) for n, p in members.items()}}
            return finish(run, base, job, rows, folder, notes, opening)
