"""What a design will cost, measured on a few steps before it runs, or read from the runs that have ended.

A few steps of the cheapest arm are timed. The others follow by the passes that a step takes through the base: one
where only the head is trained, two (forward, and back to the edits) for adapters, three (the weights' own gradients
too) for `full`. It is a forecast of the order of magnitude: it says minutes, hours or days.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from veneer.comparing.planning.arms import Arm
from veneer.comparing.planning.design import Comparison
from veneer.comparing.planning.few_steps import for_few_steps
from veneer.comparing.planning.halving import share_of

PASSES = {"linear_probe": 1.0, "full": 3.0}
OTHERS = 2.0
STEPS = 4


@dataclass(frozen=True)
class Measured:
    """Seconds of one run and trained parameters (the head apart) by arm; the largest memory of a step and its arm.

    how: where the seconds come from. cannot: arms that this base cannot have, with the reason. done: runs that have
    ended, by arm.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    how: str = ""
    parameters: Mapping[str, int] = field(default_factory=dict)
    memory: tuple[int, str] | None = None
    cannot: Mapping[str, str] = field(default_factory=dict)
    done: Mapping[str, int] = field(default_factory=dict)


def from_ledger(design: Comparison, lines: Sequence[Mapping[str, Any]]) -> Measured | None:
    """The mean seconds of the runs that have ended, by arm; an arm without one takes what its passes took elsewhere.

    None where nothing that is trained has ended: the untrained base says nothing of what training takes.
    """
    passes = {str(arm): _passes(arm) for arm in design.parsed_arms if arm.is_trained}
    known: dict[str, list[float]] = {}
    done = Counter(line["arm"] for line in lines if line["status"] != "failed")
    for line in lines:
        if line["status"] == "ok" and line.get("seconds") and line["arm"] in passes:
            known.setdefault(line["arm"], []).append(line["seconds"] / share_of(line))
    if not known:
        return None
    of_pass = fmean(seconds / passes[arm] for arm, of_arm in known.items() for seconds in of_arm)
    count = sum(map(len, known.values()))
    return Measured(
        {arm: fmean(known.get(arm, [of_pass * times])) for arm, times in passes.items()},
        f"from {count} runs that have ended",
        done=done,
    )


def measure(runner: Any, arms: Sequence[Arm], known: Measured | None = None) -> Measured:
    """Plans of all arms on the base, and a few timed steps. What cannot be measured is left out, with a word.

    known: the seconds, where they need not be timed.
    """
    try:
        found = _planned(runner, arms)
    except Exception as error:  # a forecast is never the reason why a comparison does not run
        found = Measured(how=f"unknown ({_first_line(error)})")
    if known is not None:
        return replace(known, parameters=found.parameters, memory=found.memory, cannot=found.cannot)
    able = [arm for arm in arms if arm.is_trained and str(arm) not in found.cannot]
    for arm in sorted(able, key=_passes):
        try:
            seconds, how = _timed(runner, arm, able)
        except Exception as error:
            found = replace(found, how=f"unknown ({_first_line(error)})")
            continue
        return replace(found, seconds=seconds, how=how)
    return found


def _planned(runner: Any, arms: Sequence[Arm]) -> Measured:
    from veneer import engine
    from veneer.errors import VeneerError

    base, task, options = runner.open_base(), runner.task, runner.options
    head = getattr(base, "fresh", ())
    rows = math.ceil(options.get("batch_size", 16) / options.get("accumulate", 1))
    length = options.get("max_length") or task.max_length or 256
    parameters, cannot, memory = {}, {}, None
    for arm in arms:
        method = runner.method_of(arm)
        if method is None:
            continue
        try:
            plan = engine.plan(base.model, method)
        except VeneerError as error:
            cannot[str(arm)] = _first_line(error)
            continue
        parameters[str(arm)] = 0 if arm.method == "random_direction" else trained_beside_head(plan, head)
        needs = plan.memory(batch_size=rows, length=length)["total"]
        memory = max(memory or (0, ""), (needs, str(arm)))
    return Measured(parameters=parameters, memory=memory, cannot=cannot)


def trained_beside_head(plan: Any, fresh: Sequence[str]) -> int:
    """Trained parameters of a plan, without those of `fresh`: the names that no file filled."""
    head = [s for s in plan.sites if f"{s.site.module}.{s.site.parameter}" in set(fresh)]
    counted = sum(spec.size for s in head for spec in s.specs.values() if spec.trained)
    return plan.trainable_parameters - counted


def _timed(runner: Any, arm: Arm, arms: Sequence[Arm]) -> tuple[dict[str, float], str]:
    """Seconds of a whole run of every arm, from a few steps of one."""
    from veneer.data import Splits
    from veneer.training import Settings, train

    data, options = runner.data, for_few_steps(runner.options)
    batch = options.get("batch_size", 16)
    few = Splits(
        data.train[: STEPS * batch], data.validation[: 2 * batch], [], data.task, data.columns, data.labels,
        None, data.spec,
    )  # fmt: skip
    for count in (1, STEPS):  # the first imports what all later runs find loaded
        began = time.perf_counter()
        with _as_before(runner.model):
            found = train(
                model=runner.model, data=few, method=runner.method_of(arm), task=data.task, max_steps=count,
                progress=False, **options,
            )  # fmt: skip
        whole = time.perf_counter() - began
    one_pass = found.step_seconds / _passes(arm)
    opening = max(0.0, whole - found.train_seconds - one_pass * len(few.validation) / batch)
    looks = one_pass * (len(data.validation) + len(data.test) + runner.beyond.count) / batch
    opening *= 2 if runner.beyond.off_task else 1  # for these the saved run is opened again
    known = {k: v for k, v in runner.options.items() if k in Settings.__dataclass_fields__}
    steps = _steps(Settings(**known), len(data.train), found.trained_tokens / max(1, found.steps))
    minutes = runner.budget.amount if runner.budget.kind == "minutes" else None
    seconds = {
        str(each): opening + looks + (60 * minutes if minutes else steps * one_pass * _passes(each))
        for each in arms
    }
    return seconds, f"a step of {arm} took {1000 * found.step_seconds:.3g} ms"


@contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """A model that was given in memory loses the adapters that timing it put on."""
    from veneer import engine

    model = model[0] if isinstance(model, tuple) else getattr(model, "model", model)
    before = set() if isinstance(model, str | Path) else set(engine.adapters(model))
    yield
    if not isinstance(model, str | Path):
        for name in set(engine.adapters(model)) - before:
            engine.detach(model, name)


def _steps(settings: Any, rows: int, tokens_a_step: float) -> float:
    if settings.max_steps is not None:
        return settings.max_steps
    if settings.max_tokens is not None:
        return settings.max_tokens / max(1.0, tokens_a_step)
    return settings.epochs * math.ceil(rows / settings.batch_size)


def _passes(arm: Arm) -> float:
    return PASSES.get(arm.method, OTHERS)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
