"""`make demo`: which method, for a small encoder and a few film sentences? A whole comparison in minutes.

The budget is small on purpose, and the result is a screen: of sentences of at most 10 words 190 to train on,
twice; 200 to choose rates on, 300 to test on; three rates an arm, six seeds. `make study` asks the same
question in earnest.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODEL, DATA = "builtin:minilm", "builtin:movie-sentences"
WORDS = 10  # of a sentence at most: a third of the work, and nothing is cut off
ARMS = (
    "lora", "vera", "bitfit", "fish_mask", "serial_adapter", "ia3", "loreft", "prefix_tuning", "unipelt",
    "ladder_side_tuning",
)  # fmt: skip
SIZES = "validation=2000,test=2000"  # of all sentences, so that enough of them are short
SEEDS, TRIALS = 6, 3
# Four rows a step: 190 rows give 96 steps, enough for a rate schedule to matter.
# Frozen weights multiply in bfloat16 where the processor can: two thirds of the time, and a rounding far below what
# 300 sentences can tell. The base drops nothing, for no arm: so runs can be trained together, and what is frozen is
# computed once.
OPTIONS = {
    "batch_size": 4,
    "evaluate_batch_size": 16,
    "max_length": 48,
    "device": "cpu",
    "base_dropout": False,
    "matmul": "bf16",
}
OUTPUT = Path("runs/demo")
SENTENCES = ("a warm, funny film that stays with you", "two hours of noise and not one idea")


def run(
    output: Path = OUTPUT,
    model: Any = MODEL,
    data: Any = DATA,
    arms: tuple[str, ...] = ARMS,
    seeds: int = SEEDS,
    workers: int | None = None,
) -> Any:
    """The comparison; returns its result. A run that was stopped goes on."""
    from veneer.cli._ahead import Ahead, processors
    from veneer.cli._watch import Watch
    from veneer.comparing import compare, parse_arms, parse_budget
    from veneer.comparing.planning.design import choose_seeds
    from veneer.comparing.planning.rates import grids
    from veneer.comparing.running.runner import default_runner
    from veneer.tasks import find_metric

    runner = default_runner(model, short(data), task=None, budget=parse_budget("demo"), options=OPTIONS)
    parsed = parse_arms(arms, runner.families, runner.recipes, runner.families)
    rates = grids(parsed, TRIALS, None, runner.ranges, runner.families)
    output.mkdir(parents=True, exist_ok=True)
    many = workers or min(4, processors())
    ahead = Ahead(runner, output, rates, parsed, (0,), choose_seeds(seeds), many)
    with ahead, Watch(ahead.finished) as watch:
        return compare(
            model, data, parsed, output=output, task=runner.data.task, metric=runner.task.primary_metric,
            higher_is_better=find_metric(runner.task.primary_metric).greater_is_better, budget="demo", seeds=seeds,
            trials=TRIALS, rates=rates, controls="random_direction", correction="fdr_bh", run_arm=ahead,
            known_methods=runner.families,
            known_recipes=runner.recipes, families=runner.families, sizes=runner.sizes,
            data_sha256=runner.data_sha256, progress=watch, **runner.options,
        )  # fmt: skip


def short(data: Any) -> Any:
    """The splits with their sentences of at most `WORDS` words."""
    from veneer.data import Splits, read

    splits = data if isinstance(data, Splits) else read(data, sizes=SIZES)
    for name, rows in splits.parts.items():
        setattr(splits, name, [row for row in rows if len(row["text"].split()) <= WORDS])
    return splits


def main(output: Path = OUTPUT, **given: Any) -> None:
    """Run it, print the table, and let the winner speak. given: for `run`."""
    from veneer.cli._common import say, still
    from veneer.cli._compare_text import finish, text_of
    from veneer.cli._table import terminal_width

    began = time.monotonic()
    fresh = "--again" in sys.argv
    if fresh:
        shutil.rmtree(output, ignore_errors=True)
    say(f"{len(ARMS)} methods and four controls, on {DATA} with {MODEL}.")
    say("A screen of some minutes; stop it at any moment, the same command goes on.")
    still()
    found = run(output, **given)
    finish(found)
    print(text_of(found, terminal_width()))
    if found.best_folder is None or not (found.best_folder / "veneer.json").is_file():
        say("the winner has no adapter, so there is nothing to predict with")
        return
    command = [sys.executable, "-m", "veneer", "predict", "--adapter", str(found.best_folder), *SENTENCES]
    shown = " ".join(repr(sentence) for sentence in SENTENCES)
    print(
        f"\nthe winner, in a process of its own:\n  veneer predict --adapter {found.best_folder} {shown}",
        flush=True,
    )
    subprocess.run(command, check=True)
    print(
        f"\n{time.monotonic() - began:.0f} s. A screen of a small budget, no claims: see {found.report}.\n"
        "Give the same command again and it ends at once; python -m veneer.cli.demo --again begins anew."
    )


def run_as_program() -> None:
    """`main`, with the messages and exit codes of all commands."""
    from veneer.cli._app import print_error
    from veneer.cli._common import say
    from veneer.errors import VeneerError

    try:
        main()
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
        sys.exit(130)
    except VeneerError as error:
        print_error(error)
        sys.exit(1)


if __name__ == "__main__":
    run_as_program()
