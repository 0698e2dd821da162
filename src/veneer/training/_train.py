"""`train`: one adapter, from what a person types to a folder and its figures; the same call resumes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from veneer.errors import BadOption, TrainingFailed
from veneer.tasks import Task
from veneer.training import _arm, _open
from veneer.training._checkpoint import Checkpoints, locked, to_device, write_json
from veneer.training._loop import Run
from veneer.training._progress import Progress, progress_for
from veneer.training._result import TrainResult
from veneer.training._seeds import derived, own_randomness, seed_all
from veneer.training._settings import Settings, check_options, hold_same
from veneer.training._subject import Adapted, Subject

STATE = ("adapter", "optimizer", "own", "position")
ADAPTER = "trained"  # its name on the model
STATISTICS_ROWS = 256


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
    the method's range), epochs=3, max_steps, batch_size=16 rows a step, accumulate=1 parts of it, seed,
    weight_decay=0.01, warmup=0.06 (a part, or steps from 1 on), schedule="linear"|"cosine"|"constant",
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
        return finished if finished is not None else go()


class Job:
    """The method and the recipe that an arm names."""

    def __init__(self, method: Any, options: dict[str, Any], recipe: Any) -> None:
        self.recipes: list[Any] = [] if recipe is None else [recipe]
        if isinstance(method, str):
            arm = _arm.parsed(method)
            method, options = arm.method[0], {**arm.method[1], **options}
            self.recipes = [*arm.recipes, *self.recipes]
        self.is_trained = method != "untrained"
        self.method: Any = None
        if self.is_trained:
            from veneer.edits import build

            self.method = build(method, **options)

    @property
    def method_text(self) -> str:
        return _arm.text((self.method.key, self.method.non_default())) if self.is_trained else "untrained"

    @property
    def recipe_text(self) -> str:
        shown = (
            r if isinstance(r, str) else _arm.text(r) if isinstance(r, tuple) else str(r)
            for r in self.recipes
        )
        return "+".join(shown)

    def recipe(self) -> Any:
        """The recipe by its name and options; several become one."""
        if not self.recipes:
            return None
        from veneer import recipes

        if len(self.recipes) > 1:
            raise BadOption(
                f"the arm names {len(self.recipes)} recipes: {self.recipe_text}; one makes the optimiser.",
                next_step="name one recipe",
            )
        (only,) = self.recipes
        return recipes.parse(only[0], **only[1]) if isinstance(only, tuple) else recipes.parse(only)

    def rate(self, given: float | None, recipe: Any) -> float:
        """The given rate, or two thirds up the range (of logarithms) that the recipe or the method
        declares.
        """
        if given is not None:
            return given
        low, high = getattr(recipe, "rates", None) or getattr(self.method, "facts", _NoFacts).rates
        return math.exp((math.log(low) + 2 * math.log(high)) / 3)


class _NoFacts:
    rates = (1e-5, 1e-3)


def _finished(folder: Path, settings: Settings) -> TrainResult | None:
    """The result of a finished run of the same settings; an error where the folder holds another run."""
    begun = folder / "run.json"
    if begun.is_file():
        import json

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
            return _untrained(base, task, encoded, feeder, settings, accelerator, folder, notes)
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
        data = _statistics_data(job, task, encoded["train"], feeder, base.model, accelerator.device, notes)
        subject = _attach(base.model, job, [*fresh, *whole], settings.seed, members, data)
        if settings.gradient_checkpointing:
            _checkpoint_blocks(base.model)
        checkpoints = None if folder is None else Checkpoints(folder)
        run = Run(
            subject, task, encoded, feeder, settings, learning_rate=job.rate(settings.learning_rate, recipe),
            accelerator=accelerator, recipe=recipe, hooks=hooks, method=job.method, checkpoints=checkpoints,
            progress=listener,
        )  # fmt: skip
        saved = checkpoints.last(*STATE) if checkpoints is not None else None
        if saved is not None:
            run.restore(saved)
            listener.note(f"going on from step {run.step_now} of {run.total_steps}")
        _reset_peak(accelerator.device)
        run.train()
        run.take_best()
        described = {**opens, "members": {n: _lasting(str(p)) for n, p in members.items()}}
        return _finish(run, base, job, rows, folder, notes, described)


def _attach(
    model: torch.nn.Module,
    job: Job,
    whole: Sequence[str],
    seed: int,
    members: Mapping[str, str | Path],
    data: list[dict[str, Any]] | None,
) -> Subject:
    from veneer import engine

    for name, place in members.items():
        engine.load(model, place, name, activate=False)
    given = {"whole": list(whole), "of": list(members), "data": data}
    options: dict[str, Any] = {k: v for k, v in given.items() if v}
    engine.attach(model, job.method, name=ADAPTER, seed=derived(seed, "attach") % 2**31, **options)
    return Adapted(model, ADAPTER)


def _statistics_data(
    job: Job, task: Task, encoded: Any, feeder: Any, model: torch.nn.Module, device: Any, notes: list[str]
) -> list[dict[str, Any]] | None:
    """Batches with labels for methods whose start is made from data: the first training rows, at most 256."""
    if job.method.facts.data != "squared_gradients":
        return None
    rows = encoded.features[:STATISTICS_ROWS]
    notes.append(f"the start of {job.method.key} is made from {len(rows)} training rows")
    batches = [task.collate(rows[at : at + 16], feeder, model) for at in range(0, len(rows), 16)]
    return [task.with_labels(batch.to(device)) for batch in batches]


def _checkpoint_blocks(model: torch.nn.Module) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise TrainingFailed(
            f"{type(model).__name__} does not offer gradient checkpointing.",
            next_step="gradient_checkpointing=False, and accumulate=N to save memory",
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _finish(
    run: Run,
    base: Any,
    job: Job,
    rows: _open.Rows,
    folder: Path | None,
    notes: list[str],
    opens: Mapping[str, Any],
) -> TrainResult:
    """Evaluate, save, and only then say that the run is finished."""
    peak = _peak(run.device)
    predictions = {s: run.predictions(s) for s in run.settings.evaluate_on if s in run.encoded}
    metrics = {s: run.task.metrics(found) for s, found in predictions.items()}
    count = sum(p.numel() for p in run.subject.parameters())
    size = 0
    if folder is not None:
        size = run.subject.save(folder, _described(run, base, job, rows, metrics, opens))
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
        peak_memory_bytes=peak,
        folder="" if folder is None else str(folder),
        learning_rate=run.learning_rate,
        steps=run.step_now,
        seed=run.settings.seed,
        train_seconds=run.seconds,
        trained_tokens=run.tokens,
        history=run.history,
        notes=notes,
    )
    if folder is not None:
        result.write(folder)
        Checkpoints(folder).clear()
    return result


def _described(
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
            "spec": _lasting(base.spec), "name": base.name, "fresh": list(base.fresh),
            **{k: v for k, v in opens.items() if v},
        },
        "training": {
            "steps": run.step_now, "learning_rate": run.learning_rate, "seed": run.settings.seed,
            "data": rows.spec, "recipe": job.recipe_text, "metrics": dict(metrics),
        },
    }  # fmt: skip


def _lasting(spec: str) -> str:
    """A spec that means the same from another folder."""
    path = Path(spec).expanduser()
    return str(path.resolve()) if spec and path.exists() else spec


def _untrained(
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
    from veneer.training._evaluate import predictions_of

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
        _peak(accelerator.device),
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


def _reset_peak(device: Any) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: Any) -> int:
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


__all__ = ["ADAPTER", "Job", "to_device", "train"]
