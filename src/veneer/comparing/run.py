"""`compare`: the experiment from design to report, resumable at every moment.

The order is the protocol. Rates are chosen on validation data with the tuning seed; then every arm is
confirmed on the same new seeds; only then the test split is opened, by a step of its own, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.comparing.arms import Arm, parse_arm, parse_arms
from veneer.comparing.design import Comparison, choose_seeds, forecast, parse_budget, same_question
from veneer.comparing.ledger import Ledger, locked, write_atomic
from veneer.comparing.rates import extension, grids
from veneer.comparing.results import CompareResult, Record, publish
from veneer.comparing.runs import Progress, RunArm, Runs, print_progress
from veneer.errors import BadOption, TrainingFailed

DEMO_TRIALS, TRIALS = 3, 7


def compare(
    model: Any = None,
    data: Any = None,
    methods: str | Iterable[str | Arm] = (),
    *,
    output: str | Path,
    task: str | None = None,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    budget: str = "published",
    seeds: int | Sequence[int] = 6,
    tuning_seeds: Sequence[int] = (0,),
    trials: int | None = None,
    extend_rates: int | None = None,
    rates: Mapping[str, Sequence[float]] | None = None,
    contrasts: Sequence[tuple[str, str]] = (),
    correction: str = "holm",
    smallest_effect: float = 0.01,
    run_arm: RunArm | None = None,
    known_methods: Iterable[str] | None = None,
    known_recipes: Iterable[str] | None = None,
    families: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    data_sha256: str = "",
    extend: bool = False,
    progress: Callable[[Progress], None] | None = print_progress,
    **options: Any,
) -> CompareResult:
    """Compare `methods` on `data`, and say how sure the answer is.

    methods: arms (`"lora:rank=16+lora_plus"`) or families, in a list or separated by commas; `untrained`,
    `linear_probe` and `full` are always added. rates: learning rates by arm or method, else evenly spaced
    over the range that the method declares.
    trials: rates for each arm (7; in the demo budget 3). extend_rates: further rates on each side where the
    best lies on the edge (2; demo 0). run_arm: a trainer (see `runs`); without it `veneer.training` is used.
    extend: add arms or seeds to a comparison that is in `output` already. options: for every training.

    Writes ledger.jsonl, results.jsonl, scores.jsonl, summary.json, report.html and best/ into `output`. The
    same call goes on after a kill. Errors: BadOption where the folder holds another design; TrainingFailed
    where another process is at it, or where no arm could be measured.
    """
    ranges: Mapping[str, tuple[float, float]] = {}
    runner = None
    if run_arm is None:
        from veneer.comparing.runner import default_runner

        run_arm = runner = default_runner(
            model, data, task=task, budget=parse_budget(budget), options=options
        )
        sizes, options = runner.sizes, runner.options
        data_sha256, ranges, families = runner.data_sha256, runner.ranges, runner.families
        known_methods, known_recipes = runner.families, runner.recipes
        task, metric = runner.data.task, metric or runner.task.primary_metric
        if higher_is_better is None:
            from veneer.tasks import find_metric

            higher_is_better = find_metric(metric).greater_is_better
    say = progress or (lambda event: None)
    is_demo = parse_budget(budget).kind == "demo"
    arms = parse_arms(methods, known_methods, known_recipes, families)
    if runner is not None:
        for arm in arms:
            runner.check(arm)
    count = trials or (DEMO_TRIALS if is_demo else TRIALS)
    design = Comparison(
        model=name_of(model),
        data=name_of(data),
        arms=tuple(str(arm) for arm in arms),
        rates=grids(arms, count, rates, ranges, families),
        task=task,
        metric=metric or "accuracy",
        higher_is_better=True if higher_is_better is None else higher_is_better,
        budget=str(parse_budget(budget)),
        seeds=choose_seeds(seeds),
        tuning_seeds=tuple(tuning_seeds),
        extension=(0 if is_demo else 2) if extend_rates is None else extend_rates,
        contrasts=tuple((str(parse_arm(first)), str(parse_arm(second))) for first, second in contrasts),
        correction=correction,
        smallest_effect=smallest_effect,
        data_sha256=data_sha256,
        sizes=dict(sizes or {}),
        options=options,
    )
    return run(design, run_arm, output, extend=extend, progress=say)


def run(
    design: Comparison,
    run_arm: RunArm,
    output: str | Path,
    *,
    extend: bool = False,
    progress: Callable[[Progress], None] = print_progress,
) -> CompareResult:
    """Run a design that is written down, or what of it is missing in `output`, and publish it."""
    folder = Path(output)
    with locked(folder):
        ledger = Ledger(folder)
        _settle_design(ledger, design, folder, extend)
        expected = forecast(design, design.sizes)
        progress(Progress(f"comparison {design.sha256[:12]} ({parse_budget(design.budget).label})"))
        progress(Progress(str(expected)))
        runs = Runs(folder, design, ledger, run_arm, progress, of=expected.runs)
        records = [_run_arm_through(runs, arm) for arm in design.parsed_arms]
        if not any(record.lines for record in records):
            reasons = "; ".join(f"{record.arm}: {record.reason}" for record in records)
            raise TrainingFailed(
                f"no arm could be measured ({reasons}).",
                next_step="mend the first of them; the same command then goes on",
            )
        reads = _read_test_once(runs, records, progress)
        return publish(folder, design, expected, records, reads, source="veneer")


def _settle_design(ledger: Ledger, design: Comparison, folder: Path, extend: bool) -> None:
    """The first line of the ledger is the design; another design in the same folder is an error."""
    plain = design.to_dict()
    known = ledger.last("design")
    if known is not None and known["sha256"] != design.sha256:
        differing, only_adds = same_question(known["design"], plain)
        if not (extend and only_adds):
            raise BadOption(
                f"{folder} holds another comparison ({known['sha256'][:12]}, "
                f"this one is {design.sha256[:12]}): they differ in {', '.join(differing)}.",
                next_step="extend=True (--extend) adds the new arms or seeds and runs nothing twice"
                if only_adds
                else "give another output folder, or the design that the folder was begun with",
            )
    if known is None or known["sha256"] != design.sha256:
        ledger.append(
            {"kind": "design", "sha256": design.sha256, "design": json.loads(json.dumps(plain, default=str))}
        )
    write_atomic(
        folder / "design.json", json.dumps({"sha256": design.sha256, **plain}, indent=2, default=str) + "\n"
    )


def _run_arm_through(runs: Runs, arm: Arm) -> Record:
    """Tune and confirm one arm. It stops at the first run that shows that the arm cannot be measured."""
    design = runs.design
    record = Record(arm)
    if arm.is_trained:
        for line in _tuning(runs, arm):
            if line["status"] in ("not_applicable", "failed"):
                record.status, record.reason = line["status"], line["reason"]
                return record
            record.trials.append(line)
        record.learning_rate = choose_rate(record.trials, design.higher_is_better)
    for seed in design.seeds if arm.is_trained else design.seeds[:1]:
        line = runs.once("confirm", arm, seed, record.learning_rate)
        if line["status"] in ("not_applicable", "failed"):
            record.status, record.reason, record.lines = line["status"], line["reason"], []
            return record
        record.lines.append(line)
    if not arm.is_trained:  # nothing is drawn, so that every seed gives what the first one gave
        first = record.lines[0]
        record.lines = [{**first, "seed": seed, "drawn_from_seed": first["seed"]} for seed in design.seeds]
    record.best = runs.best_of(arm)
    return record


def _tuning(runs: Runs, arm: Arm) -> Iterable[dict[str, Any]]:
    """The trials of an arm: its grid, then the allowance on the side where the best lies on the edge."""
    design = runs.design
    rates = list(design.rates[str(arm)])
    left = {"low": design.extension, "high": design.extension}
    tried: list[dict[str, Any]] = []
    while rates:
        for rate in rates:
            for seed in design.tuning_seeds:
                line = runs.once("tune", arm, seed, rate)
                tried.append(line)
                yield line
        best = choose_rate(tried, design.higher_is_better)
        further = extension([line["learning_rate"] for line in tried], best, left)
        rates = [] if further is None else [further]
        if further is not None:
            left["low" if further < best else "high"] -= 1


def choose_rate(trials: Sequence[Mapping[str, Any]], higher_is_better: bool = True) -> float:
    """The rate with the best mean validation score over the tuning seeds; of equal ones the smallest.

    A rate at which any run diverged is worse than every rate at which none did.
    """
    sign = 1 if higher_is_better else -1
    values: dict[float, list[float]] = {}
    for trial in trials:
        value = sign * trial["validation"] if trial["status"] == "ok" else float("-inf")
        values.setdefault(trial["learning_rate"], []).append(value)
    return max(values, key=lambda rate: (round(sum(values[rate]) / len(values[rate]), 12), -rate))


def _read_test_once(runs: Runs, records: Sequence[Record], progress: Callable[[Progress], None]) -> int:
    """Open the sealed test predictions of all runs into `records`; returns how often that happened so far.

    The same predictions opened again, to publish the same report, are no new read: there is more than one
    only where runs were added after the first.
    """
    sealed = sorted(
        {line["sealed_sha256"] for record in records for line in record.lines if line["status"] == "ok"}
    )
    earlier = runs.ledger.of_kind("test_read")
    is_new = not earlier or earlier[-1]["sealed"] != sealed
    if is_new:
        runs.ledger.append({"kind": "test_read", "number": len(earlier) + 1, "sealed": sealed})
    reads = len(earlier) + is_new
    progress(Progress(f"test split read {reads} time{'s' if reads != 1 else ''}"))
    for record in records:
        for line in record.lines:
            if line["status"] == "ok":
                record.opened.append(
                    runs.open_test(record.arm, {**line, "seed": line.get("drawn_from_seed", line["seed"])})
                )
            else:
                record.opened.append(None)
    return reads


def name_of(thing: Any) -> str:
    """How a model or data set is written in the design: its name, its path, or its class."""
    if thing is None or isinstance(thing, str | Path):
        return str(thing or "")
    return str(getattr(thing, "name", "") or type(thing).__name__)
