"""`train`: one adapter, from what a person types to a folder and its figures; the same call resumes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.training import _open
from veneer.training._attach import attached, checkpointed, statistics_data
from veneer.training._checkpoint import Checkpoints, locked
from veneer.training._finish import finish, lasting, reset_peak, untrained
from veneer.training._kept import Kept
from veneer.training._loop import Run
from veneer.training._progress import Progress, progress_for
from veneer.training._result import TrainResult
from veneer.training._seeds import own_randomness, seed_all
from veneer.training._wanted import Wanted, wanted

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
    matmul: str | None = None,
    device: Any = None,
    progress: bool | Progress = True,
    **settings: Any,
) -> TrainResult:
    """Train one adapter, with its head where the head is fresh; evaluate it; save it in `output`.

    model: a spec ("builtin:minilm", a folder, a hub id, ...), a Base, a module, or (module, tokenizer).
    data: a spec, rows by split, or `veneer.data.read`'s Splits. method: an arm
    (`method[:option=value,...][+recipe]`), a Method, or "untrained". whole: modules that are trained whole,
    beside fresh ones. members: {name: folder} of adapters that the method combines (adapter_fusion).
    matmul: how frozen weights multiply, "plain" (float32), "packed", "bf16" or "int8"; the error of the form is
    measured on the first rows, and noted, before it trains.
    data_options, task_options: for `veneer.data.read` and for the task. Settings: learning_rate (None: from
    the method's range), epochs=3, max_steps, max_tokens (real ones), max_seconds (of steps), batch_size=16 rows a
    step, accumulate=1 parts of it, seed, weight_decay=0.01,
    warmup=0.06 (a part, or steps from 1 on), schedule="linear"|"cosine"|"constant",
    clip=1.0, base_dropout=True (False: as in a cohort), frozen_prefix="memory"|"disk"|"off" and
    frozen_prefix_bytes (of what the base computes below the lowest edit), flat=True (no padding is computed, where
    that was seen to be exact), offload_optimizer="cpu"|"disk" (its state between steps), gradient_checkpointing,
    mixed_precision="bf16"|"fp16", early_stopping (looks without gain),
    evaluate_every and save_every (steps; None: an epoch), evaluate_on=("validation",), evaluate_batch_size.
    The same call with the same output goes on where a killed one stopped, bit for bit on the CPU, and
    returns at once where it is finished. Raises TrainingFailed, BadData, UnknownOption, and what bases and
    methods raise.
    """
    made = wanted(
        model=model, data=data, method=method, task=task, output=output, max_length=max_length, recipe=recipe,
        method_options=method_options, data_options=data_options, task_options=task_options, whole=whole,
        members=members, hooks=hooks, dtype=dtype, quantise=quantise, matmul=matmul,
        **settings,
    )  # fmt: skip
    listener = progress_for(progress)

    def open_base() -> Any:
        return _open.open_model(
            model, made.task, tokenizer=tokenizer, seed=made.settings.seed, dtype=dtype, quantise=quantise,
            matmul=matmul,
        )  # fmt: skip

    if made.folder is None:
        return _run(made, listener, device, open_base)
    with locked(made.folder):
        finished = made.finished()
        if finished is None:
            return _run(made, listener, device, open_base)
        Checkpoints(made.folder).clear()  # where a run was killed behind its last word
        return finished


def _run(made: Wanted, listener: Progress, device: Any, open_base: Any) -> TrainResult:
    job, task, settings, folder = made.job, made.task, made.settings, made.folder
    recipe = job.recipe()
    exchanges = any(hasattr(h, "exchange") for h in made.hooks)
    accelerator = _open.accelerator_for(device, settings.mixed_precision, exchanges)
    with own_randomness():
        seed_all(settings.seed, "head")
        base = open_base()
        base.model.to(accelerator.device)
        feeder = _open.feeder_of(base, task)
        encoded, notes = _open.encode_splits(task, made.rows.splits, made.look_at, feeder, base.model)
        notes = [*base.notes, *notes]
        if not job.is_trained:
            return untrained(base, task, encoded, feeder, settings, accelerator, folder, notes)
        fresh, said = fresh_of(base)
        notes += said
        for note in notes:
            listener.note(f"note: {note}")
        seed_all(settings.seed, "attach")
        data = statistics_data(job, task, encoded["train"], feeder, base.model, accelerator.device, notes)
        checkpoints = None if folder is None else Checkpoints(folder)
        with (
            attached(base.model, job, [*fresh, *made.whole], settings.seed, made.members, data) as subject,
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
                hooks=made.hooks,
                method=job.method,
                checkpoints=checkpoints,
                progress=listener,
            )
            run.frozen.tables = Kept(
                base.model, accelerator, settings.frozen_prefix, settings.frozen_prefix_bytes
            )
            go_on(run, listener)
            reset_peak(accelerator.device)
            run.train()
            run.take_best()
            notes += run.frozen.tables.notes
            return finish(run, base, job, made.rows, folder, notes, opening_of(made))


def go_on(run: Run, listener: Progress) -> None:
    """Put a run where its last checkpoint was taken, if there is one."""
    saved = run.checkpoints.last(*STATE) if run.checkpoints is not None else None
    if saved is not None:
        run.restore(saved)
        listener.note(f"going on from step {run.step_now} of {run.total_steps}")


def opening_of(made: Wanted) -> dict[str, Any]:
    """What the adapter's folder says of how to open its base."""
    return {**made.opens, "members": {n: lasting(str(p)) for n, p in made.members.items()}}


def fresh_of(base: Any) -> tuple[list[str], list[str]]:
    """The modules whose values no file gave, which are trained whole, and what to say of them."""
    fresh, notes = _open.fresh_modules(base.model, base.fresh), []
    if fresh:
        notes.append(
            f"the file has no values for {', '.join(fresh)}: trained whole, and saved in the adapter"
        )
    loose = [n for n in base.fresh if "." not in n]
    if loose:
        notes.append(f"the file has no values for {', '.join(loose)}, which no module holds: not trained")
    return fresh, notes
