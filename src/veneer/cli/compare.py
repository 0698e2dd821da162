"""`veneer compare`: several methods alike, one table with intervals, a report."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from veneer.cli._common import (
    OPEN,
    STATE,
    AsJson,
    Columns,
    Debug,
    Device,
    Dtype,
    Quiet,
    note,
    result,
    say,
    still,
)
from veneer.cli._compare_fields import fields_of, pair_of
from veneer.cli._compare_text import finish, text_of
from veneer.errors import BadOption

EXAMPLES = (
    "veneer compare which.toml --dry-run",
    "veneer compare --model builtin:minilm --data reviews.csv --methods lora,dora:rank=4,loreft --output runs/which",
    "veneer compare --from 'theirs/{arm}/seed-{seed}/scores.csv' --metric accuracy --output runs/theirs",
    "veneer compare --watch runs/which",
    "veneer compare --self-test",
)
SETTINGS = OPEN
LONG = 600  # seconds, from which on a person at a terminal is asked first


def compare(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option("--model", help="folder, hub id, file.gguf, builtin:NAME, module:PATH:FUNCTION"),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="CSV, TSV, JSONL, Parquet, a folder, a hub id, builtin:NAME")
    ] = None,
    methods: Annotated[str, typer.Option(help="arms separated by commas, families, or all")] = "",
    output: Annotated[
        str | None,
        typer.Option("--output", help="the folder of the comparison; the same command goes on in it"),
    ] = None,
    from_file: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            help="results made elsewhere: a table of scores, HF Trainer's or PEFT's files; "
            "may repeat, and hold {arm} and {seed}",
        ),
    ] = None,
    across: Annotated[
        list[str] | None,
        typer.Option(
            "--across", help="folders of finished comparisons: what several tasks and bases say together"
        ),
    ] = None,
    decide_in: Annotated[
        str | None,
        typer.Option(
            "--decide", help="the folder of a comparison with a [claim]: agrees, contradicts or cannot tell"
        ),
    ] = None,
    items: Annotated[
        int | None,
        typer.Option(help="with --from: test items behind each number, where it is a share of them"),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="try the statistics on simulated scores whose truth is known")
    ] = False,
    watch_in: Annotated[
        str | None, typer.Option("--watch", help="the folder of a comparison: how far it is; runs nothing")
    ] = None,
    report_of: Annotated[
        str | None, typer.Option("--report", help="the folder of a comparison: its report, made again")
    ] = None,
    task: Annotated[str | None, typer.Option(help="default: found from the data")] = None,
    metric: Annotated[str | None, typer.Option(help="default: the task's")] = None,
    lower_is_better: Annotated[
        bool, typer.Option("--lower-is-better", help="for results made elsewhere")
    ] = False,
    budget: Annotated[
        str, typer.Option(help="published, demo, examples=N, tokens=N, minutes=N")
    ] = "published",
    seeds: Annotated[int, typer.Option(help="runs of each arm")] = 6,
    trials: Annotated[int | None, typer.Option(help="learning rates of each arm; default 7")] = None,
    halving: Annotated[
        bool,
        typer.Option(
            "--halving", help="try every rate on a part of the budget, and the better half on twice as much"
        ),
    ] = False,
    contrast: Annotated[
        list[str] | None, typer.Option(help="a planned pair, lora,dora; default: all against the best")
    ] = None,
    correction: Annotated[str, typer.Option(help="holm (planned) or fdr_bh (screens)")] = "holm",
    smallest_effect: Annotated[float, typer.Option(help="the smallest difference that would matter")] = 0.01,
    controls: Annotated[
        str | None,
        typer.Option(help="further ones: duplicate,broken_scale; none leaves out random_direction too"),
    ] = None,
    match_parameters: Annotated[
        str | None, typer.Option(help="sizes so that each arm trains as many parameters as LoRA, within 2%")
    ] = None,
    match_to: Annotated[int | None, typer.Option(help="as many as this, instead of LoRA")] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="add arms or seeds to a comparison that is there")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="the design, its hash and what it will cost; trains nothing")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="begin without a question")] = False,
    groups: Annotated[
        str | None, typer.Option(help="a column: scores by its values, the worst and the gap")
    ] = None,
    shifted: Annotated[
        list[str] | None, typer.Option(help="another test set of the same task and labels; repeat it")
    ] = None,
    corrupt: Annotated[
        list[str] | None, typer.Option(help="corrupt the test split: all, or kinds such as typos,case:5")
    ] = None,
    forgetting: Annotated[
        list[str] | None, typer.Option(help="an off-task set: what is lost of what the base knew; repeat it")
    ] = None,
    costs: Annotated[
        bool, typer.Option("--costs/--no-costs", help="measure each arm alone in a process when all is done")
    ] = True,
    columns: Columns = None,
    group: Annotated[str | None, typer.Option(help="a column whose rows stay in one split")] = None,
    sizes: Annotated[str | None, typer.Option(help="of the splits: validation=500,test=0.1")] = None,
    near_duplicates: Annotated[
        float | None,
        typer.Option(help="leave out training rows that overlap so far with held-out ones; default 0.8"),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare methods on the same data with the same budget, and say how sure the answer is.

    The question stands in flags, or in a file: veneer compare FILE.toml (or .yaml), with the same names; flags go
    before it. The untrained base, a trained head alone and full fine-tuning are always among the arms. Other options
    are those of training, the same for all arms: --max-length 64 --batch-size 8
    """
    from veneer.cli._table import terminal_width

    if self_test:
        from veneer.cli._selftest import run_self_test

        run_self_test()
        return
    if watch_in is not None:
        from veneer.cli._live import watch_folder

        watch_folder(watch_in, as_json)
        return
    if report_of is not None:
        from veneer.comparing.reporting.report import write_again

        written = str(write_again(report_of))
        result({"report": written}, written)
        return
    if across:
        from veneer.cli._elsewhere import put_together

        put_together(across, output)
        return
    if decide_in is not None:
        from veneer.cli._elsewhere import decide_folder

        decide_folder(decide_in)
        return
    if from_file:
        from veneer.cli._elsewhere import analyse_files

        found = analyse_files(ctx.params, [pair_of(text) for text in contrast or ()])
        result(found, text_of(found, terminal_width()))
        return
    fields = fields_of(ctx)
    missing = [
        f"--{n}" for n in ("model", "data", "methods", "output") if not (fields.get(n) or fields.get(f"{n}s"))
    ]
    if missing and not (dry_run and missing == ["--output"]):
        raise BadOption(f"veneer compare needs {', '.join(missing)}.", next_step="veneer compare --help")
    from veneer.cli._watch import Watch
    from veneer.comparing import prepare_several, run_several
    from veneer.comparing.run import run_prepared

    still()
    where, costs = str(fields.pop("output", "")), fields.pop("costs", True)
    designs = prepare_several(fields).measure(where or None)
    single = designs.of.get("")
    if dry_run:
        result(single or designs)
        return
    if not yes:
        ask(single.forecast if single is not None else designs)
    how = {"extend": extend, "costs": costs}
    with Watch() as watch:
        listener = (lambda event: None) if quiet else watch
        if single is None:
            result(run_several(designs, where, **how, progress=listener))
            return
        found = run_prepared(single, where, **how, progress=listener)
    finish(found)
    result(found, text_of(found, terminal_width()))


def ask(expected: Any) -> None:
    """The question before a long comparison, where somebody sits at a terminal to answer it."""
    from veneer.comparing.planning.forecast import duration

    is_person = sys.stdin.isatty() and sys.stderr.isatty() and not STATE.quiet
    if not is_person or expected.seconds is None or expected.seconds < LONG:
        return
    say(str(expected))
    if not typer.confirm(f"This takes about {duration(expected.seconds)}. Begin?", default=True, err=True):
        note("nothing was begun; --budget, --seeds, --trials and fewer arms make it shorter")
        raise typer.Exit(1)
