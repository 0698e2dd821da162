"""Runs of a comparison trained together, wherever that gives what training them apart gives.

`compare` asks for one run after the other. What it will ask next is written in the design: the other rates of this
arm and of the arms behind it, the other seeds at the chosen rate. They are trained in one cohort, in the folders in
which they would have been trained by themselves, so that ledger, resume and report do not see the difference. Costs
are never taken from a cohort.

Runs are apart where the base draws dropout (in a cohort it would not), and arms that train a large part of the base,
for which a shared forward saves nothing, are apart as well.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.comparing.planning.arms import Arm
from veneer.comparing.planning.control_hooks import (
    Norms,
    anchors_of,
    changes,
    fixed_numbers,
    keep_norms,
    kept_norms,
)
from veneer.comparing.planning.design import Comparison
from veneer.comparing.planning.halving import share_of, trials_of
from veneer.comparing.running.outcome import run_folder
from veneer.errors import VeneerError

ROWS = 64  # of a shared forward: beyond that, rows in one batch gain little and take memory
MEMBERS = 16
SHARE = 0.05  # of the base's parameters that an arm may train in a cohort

Key = tuple[str, str, int, float | None, float]  # stage, arm, seed, rate, share of the budget


def members_at_once(options: Mapping[str, Any]) -> int:
    """How many runs a cohort has, from the rows of a step."""
    rows = options.get("batch_size", 16) / max(1, options.get("accumulate", 1))
    return int(max(1, min(MEMBERS, ROWS // max(1, rows))))


def train_runs(runner: Any, runs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What `runner(**run)` gives for each run, or the error that it raises: together where that is the same."""
    able = [i for i, run in enumerate(runs) if is_able(runner, run["arm"])]
    found: dict[int, Any] = {}
    if len(able) > 1:
        with contextlib.suppress(
            VeneerError
        ):  # of the cohort as a whole: each then says for itself what is wrong
            found = dict(zip(able, _cohort(runner, [runs[i] for i in able])))
    for i, run in enumerate(runs):
        if i not in found:
            found[i] = _alone(runner, run)
    return [found[i] for i in range(len(runs))]


def _alone(runner: Any, run: Mapping[str, Any]) -> Any:
    began = time.monotonic()
    try:
        result = runner(**run)
    except Exception as error:
        return error
    result.run_seconds = time.monotonic() - began
    return result


def is_able(runner: Any, arm: Arm) -> bool:
    """Whether a run of this arm may be a member: a gradient of few parameters, over a base that draws nothing."""
    if not arm.is_trained or not _opens(runner):
        return False
    known = runner.__dict__.setdefault("_together", {})
    if str(arm) not in known:
        look_at(runner, [arm])
    return bool(known[str(arm)])


def look_at(runner: Any, arms: Sequence[Arm]) -> None:
    """Find out which arms may be members, with one opening of the base for all of them."""
    if not _opens(runner):
        return
    known = runner.__dict__.setdefault("_together", {})
    try:
        if "base" not in known:
            known["base"] = _facts(runner)
        still, parameters = known["base"]
        draws = runner.options.get("base_dropout", True) and not still
        for arm in arms:
            if arm.is_trained and str(arm) not in known:
                known[str(arm)] = not draws and _is_small(runner, arm, parameters)
    finally:
        runner.close_base()


def _opens(runner: Any) -> bool:
    if not hasattr(runner, "open_base") or runner.options.get("mixed_precision") == "fp16":
        return False
    return isinstance(runner.model, str | Path)


def _facts(runner: Any) -> tuple[bool, int]:
    """(whether the base draws nothing in training, its parameters)."""
    from veneer import engine

    if runner._base is None:
        runner._base = runner.open_base()
    model = runner._base.model
    return engine.is_still(model), sum(p.numel() for p in model.parameters())


def _is_small(runner: Any, arm: Arm, parameters: int) -> bool:
    from veneer.recipes import parse

    try:
        recipes = [parse(r.name, **dict(r.options)) for r in arm.recipes]
        if any(getattr(recipe, "backward", True) is False for recipe in recipes):
            return False
        if arm.method == "random_direction":
            runner.check_norms(arm)
        return runner.count(arm) <= SHARE * parameters
    except VeneerError:
        return False  # the run itself says why it cannot be


def _cohort(runner: Any, runs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The runs as members of one cohort, in the folders that they would have by themselves."""
    from veneer.training import train_cohort

    began = time.monotonic()
    norms, failed = _norms_of_anchors(runner, runs)
    changed = [changes(run["arm"], run["seed"], norms.get(i)) for i, run in enumerate(runs)]
    keeps = {
        i: kept for i, run in enumerate(runs) if (kept := runner.norms_to_keep(run["arm"], run["splits"]))
    }
    data: dict[Any, Any] = {}
    members = {}
    for i, run in enumerate(runs):
        if i in failed:
            continue
        inside = tuple(split for split in run["splits"] if split not in runner.beyond.off_task)
        if inside not in data:
            data[inside] = runner.beyond.beside(runner.data, inside)
        members[str(i)] = {
            **_options(run), "output": run["output"], "evaluate_on": inside, "data": data[inside], **changed[i],
            **({"hooks": [keeps[i]]} if i in keeps else {}),
            **(runner.shared(run["share"]) if "share" in run else {}),
        }  # fmt: skip
    found = train_cohort(members, model=runner.model, task=runner.data.task, progress=False, **runner.options)
    took = (time.monotonic() - began) / len(runs)
    results: list[Any] = []
    for i, run in enumerate(runs):
        result = found.results.get(str(i))
        if result is None:
            results.append(failed[i] if i in failed else found.failed[str(i)])
            continue
        if i in keeps:
            keep_norms(keeps[i], run["output"], run["seed"], run["learning_rate"])
        result = runner.with_off_task(result, run["splits"], run["output"])
        result.trainable_parameters -= fixed_numbers(changed[i])
        # Shares of a cohort are no costs; measured ones take their place where costs are measured.
        result.step_seconds = result.tokens_per_second = result.peak_memory_bytes = None
        result.run_seconds = took
        results.append(result)
    return results


def _options(run: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": str(run["arm"].anchor), "seed": run["seed"], "learning_rate": run["learning_rate"]}


def _norms_of_anchors(
    runner: Any, runs: Sequence[Mapping[str, Any]]
) -> tuple[dict[int, Norms], dict[int, Exception]]:
    """({place of a random direction: the norms that its anchor's update has after the same training}, errors)."""
    from veneer.training import train_cohort

    known: dict[int, Norms] = {}
    norms: dict[int, Norms] = {}
    for i, run in enumerate(runs):
        if run["arm"].method == "random_direction":
            kept = kept_norms(run["arm"], run["output"], run["seed"], run["learning_rate"])
            (norms if kept is None else known)[i] = kept or Norms()
    if not norms:
        return known, {}
    members = {str(i): {**_options(runs[i]), "hooks": [hook], "evaluate_on": ()} for i, hook in norms.items()}
    found = train_cohort(
        members, model=runner.model, data=runner.data, task=runner.data.task, progress=False, **runner.options
    )
    return known | norms, {int(name): error for name, error in found.failed.items()}


class Together:
    """A trainer for `compare` over a trainer: asked for one run, it trains with it what will be asked for next."""

    def __init__(self, runner: Any, design: Comparison, folder: Path, done: set[Key]) -> None:
        self.runner, self.design, self.folder, self.done = runner, design, folder, done
        self.found: dict[Key, Any] = {}
        self.expected: list[tuple[Arm, int, float, float]] = []
        look_at(runner, design.parsed_arms)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def __call__(
        self,
        *,
        arm: Arm,
        seed: int,
        learning_rate: float | None,
        splits: tuple[str, ...],
        output: Path,
        share: float = 1.0,
    ) -> Any:
        run = {"arm": arm, "seed": seed, "learning_rate": learning_rate, "splits": splits, "output": output}
        run |= _part(share)
        stage = "confirm" if "test" in splits else "tune"
        key = (stage, str(arm), seed, learning_rate, share)
        if key not in self.found:
            runs = {key: run}
            if is_able(self.runner, arm):
                runs |= self._next(stage, arm, learning_rate, splits)
            some = dict(list(runs.items())[: members_at_once(self.runner.options)])
            self.found |= zip(some, train_runs(self.runner, list(some.values())))
        result = self.found.pop(key)
        self.done.add(key)
        if isinstance(result, Exception):
            raise result
        return result

    def expect(self, arm: Arm, trials: Sequence[tuple[int, float, float]]) -> None:
        """Trials (seed, rate, share) that will be asked for, which the design alone does not say."""
        self.expected = [(arm, *trial) for trial in trials]

    def _next(
        self, stage: str, arm: Arm, rate: float | None, splits: tuple[str, ...]
    ) -> dict[Key, dict[str, Any]]:
        """The runs that will be asked for, in the order in which they will be."""
        found: dict[Key, dict[str, Any]] = {}
        if stage == "confirm":
            for seed in self.design.seeds:
                self._add(found, stage, arm, seed, rate, splits)
        if stage == "tune":
            for other, seed, tried, share in self.expected:
                self._add(found, "tune", other, seed, tried, ("validation",), share)
        arms = list(self.design.parsed_arms)
        for other in arms[arms.index(arm) :] if arm in arms else ():
            rates = self.design.rates.get(str(other), ())
            share = trials_of(len(rates), self.design.halving)[0][1]
            for tried in rates:
                for seed in self.design.tuning_seeds:
                    self._add(found, "tune", other, seed, tried, ("validation",), share)
        return found

    def _add(
        self,
        found: dict[Key, dict[str, Any]],
        stage: str,
        arm: Arm,
        seed: int,
        rate: Any,
        splits: Any,
        share: float = 1.0,
    ) -> None:
        key = (stage, str(arm), seed, rate, share)
        if key in self.done or key in self.found or not is_able(self.runner, arm):
            return
        found[key] = {
            "arm": arm, "seed": seed, "learning_rate": rate, "splits": splits,
            "output": run_folder(self.folder, stage, arm, seed, rate, share), **_part(share),
        }  # fmt: skip


def _part(share: float) -> dict[str, float]:
    return {} if share == 1 else {"share": share}


def together(run_arm: Any, design: Comparison, folder: Path, lines: Sequence[Mapping[str, Any]]) -> Any:
    """The trainer, made to train runs together where it can; others stay as they are."""
    if hasattr(run_arm, "anchors"):
        run_arm.anchors = anchors_of(design.parsed_arms)
    if not hasattr(run_arm, "open_base") or members_at_once(run_arm.options) < 2:
        return run_arm
    done = {
        (x["stage"], x["arm"], x["seed"], x["learning_rate"], share_of(x))
        for x in lines
        if x["status"] != "failed"
    }
    return Together(run_arm, design, folder, done)
