"""`veneer plan`: what attaching a method would do, before anything runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from veneer.cli._common import (
    OPEN,
    AsJson,
    Debug,
    Dtype,
    Matmul,
    Option,
    Quiet,
    arm_of,
    extra_options,
    human,
    method_options,
    note,
    result,
    still,
    typed_options,
)  # fmt: skip
from veneer.cli._table import facts, table

EXAMPLES = (
    "veneer plan builtin:minilm lora --rank 8",
    'veneer plan builtin:smollm2 "lora:rank=8,sites=block[-4:].mlp.down" --json',
)
SETTINGS = OPEN


def plan(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="what is opened as a base")],
    method: Annotated[str, typer.Argument(help="a method, with options or without: lora, lora:rank=16")],
    option: Option = None,
    batch_size: Annotated[int, typer.Option(help="rows of a step, for the memory forecast")] = 8,
    length: Annotated[int, typer.Option(help="tokens of a row, for the memory forecast")] = 256,
    task: Annotated[
        str | None, typer.Option(help="the task whose head the base gets; default: the one of its files")
    ] = None,
    dtype: Dtype = None,
    matmul: Matmul = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Sites, trained parameters, bytes and memory of a method on a model, before anything runs.

    Options of the method are given by their names: --rank 8 --sites block[-4:].mlp.down
    """
    from veneer import engine
    from veneer.bases import open_base
    from veneer.bases.matmul import matmul_of
    from veneer.training.forecast import step_memory

    key, options = arm_of(method)
    flags = [f"--{name}" for name in ("batch-size", "length", "task", "dtype", "matmul", "option")]
    options |= method_options(
        key, {**extra_options(ctx.args, "plan"), **typed_options(option)}, "plan", flags
    )
    still()
    base = open_base(model, task=task, dtype=dtype, matmul=matmul)
    for text in base.notes:
        note(f"note: {text}")
    made = engine.plan(base.model, key, **options)
    copies = matmul_of(base.model).copies_in_training
    parts = step_memory(base.model, key, options, rows=batch_size, length=length, copies=copies)
    total = sum(p.numel() for p in base.model.parameters())
    plain = made.to_dict() | {
        "model": base.name, "parameters": total, "share": made.trainable_parameters / max(1, total),
        "memory": {**parts, "batch_size": batch_size, "length": length},
    }  # fmt: skip
    result(plain, _text(made, plain, parts))


def _text(made: Any, plain: dict[str, Any], parts: dict[str, int]) -> str:
    groups: dict[tuple[str, str], list[Any]] = {}
    for sp in made.sites:
        groups.setdefault((sp.site.role or sp.site.kind, sp.site.port), []).append(sp)
    rows = [
        (role, port, str(len(members)), shapes(members[0].specs), members[0].site.module)
        for (role, port), members in groups.items()
    ]  # fmt: skip
    needs = ", ".join(f"{name} {human(n)}" for name, n in parts.items() if n and name != "total")
    head = facts(
        [
            ("method", str(made.method)),
            ("model", f"{plain['model']}, {plain['parameters']:,} parameters"),
            ("trained", f"{plain['trainable_parameters']:,} parameters ({100 * plain['share']:.3g} %) "
                        f"at {len(made.sites)} sites"),
            ("on disk", f"{human(made.bytes_on_disk)}, float32"),
            ("memory", f"about {human(parts['total'])} a step of "
                       f"{plain['memory']['batch_size']} x {plain['memory']['length']} tokens ({needs})"),
        ]
    )  # fmt: skip
    sites = table(
        ("role", "port", "sites", "tensors of the first", "for example"), rows,
        drop=("for example", "port"), right=("sites",),
    )  # fmt: skip
    return f"{head}\n\n{sites}"


def shapes(specs: dict[str, Any]) -> str:
    """`A 8x384 B 384x8`."""
    return " ".join(f"{name} {'x'.join(map(str, spec.shape))}" for name, spec in specs.items())
