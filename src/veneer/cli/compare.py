"""`veneer compare`: several methods alike, one table with intervals, a report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
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
    extra_options,
    note,
    result,
    say,
    still,
)
from veneer.errors import BadOption, UnknownOption, nearest

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

        found = analyse_files(ctx.params, [_pair(text) for text in contrast or ()])
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
    from veneer.comparing.planning.design import duration

    is_person = sys.stdin.isatty() and sys.stderr.isatty() and not STATE.quiet
    if not is_person or expected.seconds is None or expected.seconds < LONG:
        return
    say(str(expected))
    if not typer.confirm(f"This takes about {duration(expected.seconds)}. Begin?", default=True, err=True):
        note("nothing was begun; --budget, --seeds, --trials and fewer arms make it shorter")
        raise typer.Exit(1)


def fields_of(ctx: Any) -> dict[str, Any]:
    """The fields of the comparison: of the file, then of the flags that were typed."""
    from veneer.comparing.planning.file import FIELDS, checked, read_comparison

    file, arguments = split_file(ctx.args)
    found: dict[str, Any] = (
        {} if file is None else {"output": f"runs/{Path(file).stem}", **read_comparison(file)}
    )
    typed = [p.name for p in ctx.command.params if ctx.get_parameter_source(p.name).name == "COMMANDLINE"]
    flags = {name: ctx.params[name] for name in typed if name in FIELDS}
    if "contrast" in typed:
        flags["contrasts"] = [_pair(text) for text in ctx.params["contrast"]]
    options = training_options(
        extra_options(arguments, "compare"), [o for p in ctx.command.params for o in p.opts]
    )
    if "model" in flags:
        found.pop("models", None)
    return found | checked(flags | options, "veneer compare")


def split_file(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the comparison file, the other arguments): the file is what no flag stands before."""
    for at, text in enumerate(arguments):
        is_value = at > 0 and arguments[at - 1].startswith("--") and "=" not in arguments[at - 1]
        if not text.startswith("-") and not is_value:
            return text, [*arguments[:at], *arguments[at + 1 :]]
    return None, list(arguments)


def _pair(text: str) -> tuple[str, str]:
    from veneer.comparing.planning.arms import split_arms

    pair = split_arms(text)
    if len(pair) != 2:
        raise BadOption(f"--contrast {text!r} is not a pair of arms.", next_step="--contrast lora,dora")
    return pair[0], pair[1]


def training_options(given: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    """Options of every training, after their names were looked up."""
    from veneer.comparing.planning.file import training_fields

    known = training_fields()
    for name in given:
        if name not in known:
            typed = "--" + name.replace("_", "-")
            names = [*flags, *("--" + n.replace("_", "-") for n in sorted(known))]
            raise UnknownOption(
                f"veneer compare has no option '{typed}'.", nearest=nearest(typed, names),
                next_step="options of a method belong to its arm: --methods lora:rank=16,dora",
            )  # fmt: skip
    if isinstance(given.get("whole"), str):
        given["whole"] = [given["whole"]]
    return given


def finish(found: Any) -> None:
    """The card of the winner."""
    from veneer.cli._card import write_card

    if found.best_folder is not None and (found.best_folder / "veneer.json").is_file():
        write_card(found.best_folder)
    else:
        note("note: the winner has no adapter to keep")


def text_of(found: Any, width: int) -> str:
    """The conclusion, the table as wide as the terminal, and where the report is."""
    import textwrap

    from veneer.cli._table import table
    from veneer.comparing.reporting.words import Scale, bytes_text, count, p_text, seconds_text

    summary = found.to_dict()
    scale = Scale(summary["analysed"], 1.0 if summary["higher_is_better"] else -1.0, summary["in_percent"])
    recommended = summary["recommendation"]["arm"]
    rows = [
        (
            arm["arm"] + (" *" if arm["arm"] == recommended else ""),
            scale.value(arm["mean"]),
            f"{scale.value(arm['low'])} to {scale.value(arm['high'])}",
            "yes" if arm["tied_with_best"] else "no",
            p_text(arm["p_adjusted"]),
            count(arm["trainable_parameters"]),
            bytes_text(arm["bytes_on_disk"]),
            seconds_text(arm["step_seconds"]),
        )
        for arm in summary["arms"]
    ]
    head = ("arm", scale.unit, "95 % interval", "tied", "p", "trained", "on disk", "step")
    lines = [
        *textwrap.wrap(found.sentence, width),
        "",
        table(head, rows, width=width, drop=("on disk", "p", "step", "tied", "trained"), right=head[1:]),
        "",
        *textwrap.wrap("* the cheapest arm that cannot be told apart from the best; tied: not separable from the best; "
                       "p: of being the best, corrected for all arms", width, subsequent_indent="  "),
    ]  # fmt: skip
    for other in summary["not_measured"]:
        status, reason = other["status"].replace("_", " "), other["reason"].rstrip(".")
        lines += textwrap.wrap(f"{other['arm']}: {status} ({reason})", width, subsequent_indent="  ")
    for told in summary.get("claims", ()):
        lines += textwrap.wrap(f"{told['id']}: {told['says']}", width, subsequent_indent="  ")
        lines += textwrap.wrap(f"{told['verdict']}: {told['because']}", width, subsequent_indent="  ")
    if summary["claim"]:
        lines.append(summary["claim"])
    lines += ["", f"report: {found.report}"]
    if found.best_folder is not None:
        lines.append(f"winner: {found.best_folder}")
    return "\n".join(lines)
