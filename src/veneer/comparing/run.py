"""`compare`: the experiment from design to report, resumable at every moment.

The order is the protocol. Rates are chosen on validation data with the tuning seed; then every arm is
confirmed on the same new seeds; only then the test split is opened, by a step of its own, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.comparing.measures.costs import measured_costs, put_into
from veneer.comparing.planning.arms import Arm
from veneer.comparing.planning.budget import parse_budget
from veneer.comparing.planning.design import Comparison, canonical_json, same_question
from veneer.comparing.planning.file import write_comparison
from veneer.comparing.planning.forecast import Forecast, forecast
from veneer.comparing.planning.halving import best_rates, last_rung, trials_of
from veneer.comparing.planning.prepare import Prepared, prepare
from veneer.comparing.planning.rates import extension
from veneer.comparing.publishing.records import Record
from veneer.comparing.results import CompareResult, publish
from veneer.comparing.running.ledger import Ledger, locked, write_atomic
from veneer.comparing.running.live import LivePage
from veneer.comparing.running.runs import Progress, RunArm, Runs, print_progress
from veneer.comparing.running.together import together
from veneer.errors import BadOption, TrainingFailed


def compare(
    model: Any = None,
    data: Any = None,
    methods: str | Iterable[str | Arm] = (),
    *,
    output: str | Path,
    extend: bool = False,
    costs: bool = True,
    progress: Callable[[Progress], None] | None = print_progress,
    **question: Any,
) -> CompareResult:
    """Compare `methods` on `data`, and say how sure the answer is.

    methods: arms (`"lora:rank=16+lora_plus"`) or families, in a list or separated by commas; `untrained`,
    `linear_probe`, `full` and `lora` are always added. extend: add arms or seeds to a comparison that is in `output`
    already. costs: measure each arm alone in a process of its own when the runs are done. question: the fields of
    a comparison file (`veneer.comparing.FIELDS`), such as

    seeds (6), budget ("published"), task, metric, contrasts, smallest_effect (0.01); rates: learning rates by arm
    or method, else evenly spaced over the range that the method declares; trials: rates for each arm (7; in the
    demo budget 3); halving: a part of the budget for each rate, more for the better ones (off; see
    `veneer.comparing.planning.halving`); extend_rates: further rates on each side where the best lies on the edge
    (2; demo 0); controls: see `veneer.comparing.planning.controls`; match_parameters: see
    `veneer.comparing.planning.match`; what is
    no field is an option of every training. run_arm: a trainer (see `runs`); without it `veneer.training` is used.

    Writes comparison.toml, design.json, ledger.jsonl, results.jsonl, scores.jsonl, trials.jsonl, summary.json,
    report.html and best/ into `output`. The same call goes on after a kill. Errors: BadOption where the folder
    holds another design; TrainingFailed where another process is at it, or where no arm could be measured.
    """
    prepared = prepare(model, data, methods, **question).measure(output)
    say = progress or (lambda event: None)
    return run_prepared(prepared, output, extend=extend, costs=costs, progress=say)


def run_prepared(
    prepared: Prepared,
    output: str | Path,
    *,
    extend: bool = False,
    costs: bool = True,
    progress: Callable[[Progress], None] = print_progress,
) -> CompareResult:
    """Run what was prepared, with its comparison file beside the results."""

    def write() -> None:
        for note in prepared.notes:
            progress(Progress(note))
        write_comparison(Path(output) / "comparison.toml", prepared.fields, prepared.design.sha256)

    return run(
        prepared.design,
        prepared.run_arm,
        output,
        extend=extend,
        costs=costs,
        progress=progress,
        expected=prepared.forecast,
        settled=write,
    )


def run(
    design: Comparison,
    run_arm: RunArm,
    output: str | Path,
    *,
    extend: bool = False,
    costs: bool = True,
    progress: Callable[[Progress], None] = print_progress,
    expected: Forecast | None = None,
    settled: Callable[[], None] = lambda: None,
) -> CompareResult:
    """Run a design that is written down, or what of it is missing in `output`, and publish it.

    expected: what was forecast. settled: called once the folder is known to be that of this design.
    """
    folder = Path(output)
    with locked(folder):
        ledger = Ledger(folder)
        _settle_design(ledger, design, folder, extend)
        settled()
        expected = expected or forecast(design, design.sizes)
        with LivePage(folder, progress) as live:
            live(Progress(f"comparison {design.sha256[:12]} ({parse_budget(design.budget).label})"))
            live(Progress(str(expected)))
            run_arm = together(run_arm, design, folder, ledger.of_kind("run"))
            runs = Runs(folder, design, ledger, run_arm, live, of=expected.runs)
            records = _run_all(runs)
            if not any(record.lines for record in records):
                reasons = "; ".join(f"{record.arm}: {record.reason}" for record in records)
                raise TrainingFailed(
                    f"no arm could be measured ({reasons}).",
                    next_step="mend the first of them; the same command then goes on",
                )
            if costs:
                identity = canonical_json([design.model, design.data_sha256, design.options])
                put_into(records, measured_costs(folder, run_arm, records, identity, live))
            reads = _read_test_once(runs, records, live)
            show = getattr(run_arm, "show", None)
            return publish(folder, design, expected, records, reads, source="veneer", show=show)


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


def _run_all(runs: Runs) -> list[Record]:
    """A record of every arm, in the order of the design; those that take their anchor's rate run last."""
    done: dict[Arm, Record] = {}
    for arm in sorted(runs.design.parsed_arms, key=lambda arm: arm.takes_rate_of_anchor):
        anchor = done.get(arm.anchor) if arm.takes_rate_of_anchor else None
        done[arm] = _run_arm_through(runs, arm, anchor)
    return [done[arm] for arm in runs.design.parsed_arms]


def _run_arm_through(runs: Runs, arm: Arm, anchor: Record | None = None) -> Record:
    """Tune and confirm one arm. It stops at the first run that shows that the arm cannot be measured."""
    design = runs.design
    record = Record(arm)
    if arm.takes_rate_of_anchor:
        if anchor is None or anchor.status != "ok":
            record.status, record.reason = "not_applicable", "its anchor was not measured"
            return record
        record.learning_rate = anchor.learning_rate
    elif arm.is_trained:
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


def _tuning(runs: Runs, arm: Arm) -> Iterator[dict[str, Any]]:
    """The trials of an arm: its grid (halved, where the design says so), then the allowance on the side where the
    best lies on the edge."""
    design = runs.design
    rates, seeds = list(design.rates[str(arm)]), design.tuning_seeds
    ladder = trials_of(len(rates), design.halving)
    left = {"low": design.extension, "high": design.extension}

    def rung(share: float) -> Iterator[dict[str, Any]]:
        wanted = [(rate, seed) for rate in rates for seed in seeds]
        runs.expect(arm, [(seed, rate, share) for rate, seed in wanted])
        for rate, seed in wanted:
            yield runs.once("tune", arm, seed, rate, share)

    last: list[dict[str, Any]] = []
    for size, share in ladder:
        rates = best_rates(last, size, design.higher_is_better) if last else rates
        last = []
        for line in rung(share):
            last.append(line)
            yield line
    tried = list(design.rates[str(arm)])
    while True:
        best = choose_rate(last, design.higher_is_better)
        further = extension(tried, best, left)
        if further is None:
            return
        left["low" if further < best else "high"] -= 1
        rates, tried = [further], [*tried, further]
        for _, share in ladder:  # as every rate had it
            for line in rung(share):
                last += [line] if share == ladder[-1][1] else []
                yield line


def choose_rate(trials: Sequence[Mapping[str, Any]], higher_is_better: bool = True) -> float:
    """The rate with the best mean validation score over the tuning seeds; of equal ones the smallest.

    A rate at which any run diverged is worse than every rate at which none did. Of halved trials those of the last
    rung decide.
    """
    return best_rates(last_rung(trials), 1, higher_is_better)[0]


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
