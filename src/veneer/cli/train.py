"""`veneer train`: one adapter, with its head, into a folder."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from veneer.cli._common import (
    OPEN,
    AsJson,
    Columns,
    Debug,
    Device,
    Dtype,
    Matmul,
    Option,
    Quiet,
    Seed,
    extra_options,
    method_options,
    note,
    result,
    still,
    typed_options,
    value_of,
)  # fmt: skip
from veneer.errors import BadOption

EXAMPLES = (
    "veneer train --model builtin:minilm --data reviews.csv --method lora --rank 8 --output runs/one",
    "veneer train --model builtin:smollm2 --data builtin:dialog --method dora --max-steps 200 --output runs/two",
    "veneer train --cohort members.toml --output runs/members",
)
SETTINGS = OPEN


def train(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="folder, hub id, file.gguf, timm:NAME, builtin:NAME, module:PATH:FUNCTION"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="CSV, TSV, JSONL, Parquet, a folder, a hub id, builtin:NAME"),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="the folder of the run; the same command goes on in it")
    ] = None,
    cohort: Annotated[
        str | None,
        typer.Option("--cohort", help="a TOML file: a table for each of several adapters, trained together"),
    ] = None,
    method: Annotated[str, typer.Option("--method", help="method[:option=value,...][+recipe]")] = "lora",
    option: Option = None,
    recipe: Annotated[str | None, typer.Option(help="a recipe: lora_plus, lora_fa, galore, mezo")] = None,
    task: Annotated[str | None, typer.Option(help="default: found from the data")] = None,
    columns: Columns = None,
    group: Annotated[str | None, typer.Option(help="a column whose rows stay in one split")] = None,
    sizes: Annotated[str | None, typer.Option(help="of the splits: validation=500,test=0.1")] = None,
    skip_bad_rows: Annotated[
        str | None, typer.Option(help="a file that takes rows that cannot be trained on")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="default: from the method's range")] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the training rows; default 3")] = None,
    max_steps: Annotated[int | None, typer.Option(help="instead of passes")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows of a step; default 16")] = None,
    accumulate: Annotated[int | None, typer.Option(help="parts of a step, for less memory")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of a row that are read")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="default 0.01")] = None,
    warmup: Annotated[
        float | None, typer.Option(help="a part of the steps, or their number; default 0.06")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine, constant")] = None,
    clip: Annotated[float | None, typer.Option(help="the gradient's largest norm; default 1")] = None,
    base_dropout: Annotated[
        str | None, typer.Option(help="false: the base drops nothing, as in a cohort; default true")
    ] = None,
    frozen_prefix: Annotated[
        str | None, typer.Option(help="where what is frozen is kept: memory, disk, off; default memory")
    ] = None,
    offload_optimizer: Annotated[
        str | None,
        typer.Option(help="where the optimiser's state lies between steps: cpu, disk; default off"),
    ] = None,
    no_flat: Annotated[bool, typer.Option("--no-flat", help="compute padding, as other loops do")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="less memory, more time")
    ] = False,
    mixed_precision: Annotated[str | None, typer.Option(help="bf16, fp16")] = None,
    early_stopping: Annotated[int | None, typer.Option(help="stop after so many looks without gain")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="steps; default: a pass")] = None,
    evaluate_on: Annotated[str | None, typer.Option(help="splits: validation,test")] = None,
    save_every: Annotated[int | None, typer.Option(help="steps between checkpoints")] = None,
    whole: Annotated[
        list[str] | None, typer.Option(help="a module that is trained whole, beside a fresh head")
    ] = None,
    member: Annotated[
        list[str] | None, typer.Option(help="NAME=DIR, an adapter that the method combines")
    ] = None,
    quantise: Annotated[str | None, typer.Option(help="the base's form: nf4, int8")] = None,
    matmul: Matmul = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train one adapter, with a fresh head where the base has none; the same command resumes a stopped run.

    Options of the method are given by their names: --rank 8 --sites attention.query
    """
    from veneer import data as data_room
    from veneer.cli._announce import Announce, Gather
    from veneer.training import Job, Settings, progress_for
    from veneer.training import train as run_training

    given = {
        "learning_rate": learning_rate, "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size,
        "accumulate": accumulate, "weight_decay": weight_decay, "warmup": warmup, "schedule": schedule, "clip": clip,
        "gradient_checkpointing": gradient_checkpointing or None, "mixed_precision": mixed_precision,
        "early_stopping": early_stopping, "evaluate_every": evaluate_every, "save_every": save_every,
        "frozen_prefix": frozen_prefix, "offload_optimizer": offload_optimizer, "flat": False if no_flat else None,
        "base_dropout": None if base_dropout is None else value_of(base_dropout),
        "evaluate_on": tuple(evaluate_on.split(",")) if evaluate_on else None,
    }  # fmt: skip
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    extras = extra_options(ctx.args, "train")
    settings |= {name: extras.pop(name) for name in list(extras) if name in Settings.__dataclass_fields__}
    flags = [opt for p in ctx.command.params for opt in p.opts]
    reading = {"columns": columns, "group": group, "sizes": sizes, "skip_bad_rows": skip_bad_rows}
    reading = {k: v for k, v in reading.items() if v is not None}
    if cohort is not None:
        from veneer.cli._cohort import train_members

        typed = [f"--{name.replace('_', '-')}" for name in extras]
        typed += ["--option"] if option else []
        typed += ["--method"] if ctx.get_parameter_source("method").name != "DEFAULT" else []  # type: ignore[union-attr]
        if typed:
            raise BadOption(
                f"{typed[0]} is of one member of the cohort.", next_step=f"write it into {cohort}"
            )
        for_all: dict[str, Any] = {
            "model": model, "data": data, "output": output, "recipe": recipe, "task": task, "whole": whole,
            "members": _members(member) or None, "dtype": dtype, "device": device, "quantise": quantise,
            "matmul": matmul,
            "max_length": max_length, "data_options": reading or None, **settings,
            "seed": seed if ctx.get_parameter_source("seed").name != "DEFAULT" else None,  # type: ignore[union-attr]
        }  # fmt: skip
        if train_members(cohort, for_all, quiet):
            raise typer.Exit(1)
        return
    missing = [f"--{n}" for n, v in (("model", model), ("data", data), ("output", output)) if not v]
    if missing:
        raise BadOption(f"veneer train needs {', '.join(missing)}.", next_step="veneer train --help")
    model, data, output = str(model), str(data), str(output)
    key = method.partition(":")[0].partition("+")[0].strip()
    options = (
        {} if key == "untrained" else method_options(key, {**extras, **typed_options(option)}, "train", flags)
    )
    still()
    Job(method, options, recipe).recipe()  # told before data is read, which can take long
    Settings(**settings)
    splits = data_room.read(data, task=task, **reading)
    gathered = Gather(progress_for(not quiet))
    announce = Announce(splits, model, learning_rate is not None, gathered)
    found = run_training(
        model=model, data=splits, method=method, output=output, recipe=recipe, method_options=options,
        whole=whole or (), members=_members(member), hooks=[announce], dtype=dtype, device=device, quantise=quantise,
        matmul=matmul,
        max_length=max_length, seed=seed, progress=gathered, **settings,
    )  # fmt: skip
    if key != "untrained":
        from veneer.cli._card import write_card

        write_card(output, splits)
    result(summary(found), _text(found, output, announce, splits))
    if not announce.shown and key != "untrained":
        note("this run was finished before; nothing was trained")


def _members(given: list[str] | None) -> dict[str, str]:
    members = {}
    for text in given or ():
        name, equals, folder = text.partition("=")
        if not equals:
            raise BadOption(f"--member {text!r} is not NAME=DIR.", next_step="--member first=runs/first")
        members[name] = folder
    return members


def summary(found: Any) -> dict[str, Any]:
    """The result without its predictions, which lie in the run's folder."""
    plain = found.to_dict()
    plain["predictions"] = {split: len(rows) for split, rows in found.predictions.items()}
    plain.pop("history")
    return plain


def _text(found: Any, output: str, announce: Any, splits: Any) -> str:
    from veneer.cli._common import human
    from veneer.cli._page import folded
    from veneer.cli._table import facts, terminal_width

    pairs = []
    for split, metrics in found.metrics.items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        pairs.append((split, f"{shown}  (n = {len(found.predictions.get(split, [])):,})"))
    if not pairs:
        pairs.append(("metrics", "none: the data has no validation rows"))
    pairs += [
        ("trained", f"{found.steps:,} steps in {found.train_seconds:.1f} s, {1000 * found.step_seconds:.0f} ms a step, "
                    f"{found.tokens_per_second:,.0f} tokens a second"),
        ("saved", f"{output}, {human(found.bytes_on_disk)}"),
    ]  # fmt: skip
    if not found.bytes_on_disk:
        return facts(pairs)
    commands = next_commands(found.task, output, announce.can_merge)
    lines = [line for command in commands for line in folded(command, terminal_width())]
    return "\n".join([facts(pairs), "", "next:", *lines])


def next_commands(task: str, output: str, can_merge: bool) -> list[str]:
    """What a person would type now."""
    import shlex

    place = shlex.quote(output)
    asks = {
        "instruct": [f'veneer generate --adapter {place} "..."', f"veneer chat --adapter {place}"],
        "lm": [f'veneer generate --adapter {place} "..."'],
        "qa": [f"veneer predict --adapter {place} --input FILE"],
        "rank": [f"veneer predict --adapter {place} --input FILE"],
        "image-classify": [f"veneer predict --adapter {place} picture.png"],
        "speech": [f"veneer predict --adapter {place} sound.wav"],
    }.get(task, [f'veneer predict --adapter {place} "a text"'])
    merge = [f"veneer merge --adapter {place} --output {place}-merged"] if can_merge else []
    return [*asks, *merge, f"veneer export --adapter {place} --format peft --output {place}-peft"]
