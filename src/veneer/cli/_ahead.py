"""Runs of a comparison in worker processes, begun before they are asked for.

`compare` asks for one run after the other. While it waits for the runs of one arm, the workers go on with what
the design says will be asked next: the rates of the next arm, the other seeds of this one. What a run gives
does not depend on when or where it ran.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from veneer.comparing.planning.arms import Arm
from veneer.comparing.planning.control_hooks import anchors_of
from veneer.comparing.running.ledger import Ledger
from veneer.comparing.running.outcome import run_folder
from veneer.comparing.running.together import is_able, look_at, members_at_once, train_runs

# One thread each. Large blocks stay in the heap: the gradients of a whole base, given back to the system and
# taken anew at every step, are a third of the time of `full` (glibc reads these).
WORKERS = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}

_runner: Any = None


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(runner: Any) -> None:
    global _runner
    import signal

    import torch

    from veneer.cli._common import still

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that began this one
    torch.set_num_threads(1)  # as many runs at once as there are processors
    still()
    _runner = runner


def _run(runs: list[dict[str, Any]]) -> list[Any]:
    """The results of some runs, or their errors; trained together where that gives the same."""
    return train_runs(_runner, runs)


class Ahead:
    """A trainer for `compare` over a trainer. Used as a context: leaving it ends the workers."""

    def __init__(
        self,
        runner: Any,
        folder: Path,
        rates: Mapping[str, Sequence[float]],
        arms: Sequence[Arm],
        tuning_seeds: Sequence[int],
        seeds: Sequence[int],
        workers: int,
    ) -> None:
        self.runner, self.folder, self.rates, self.seeds = runner, folder, rates, seeds
        self.tuning_seeds, self.arms = tuning_seeds, [arm for arm in arms if arm.is_trained]
        runner.anchors = anchors_of(arms)  # before the workers have their copies
        lines = Ledger(folder).of_kind("run") if (folder / "ledger.jsonl").is_file() else []
        self.done = {
            (x["stage"], x["arm"], x["seed"], x["learning_rate"]) for x in lines if x["status"] != "failed"
        }
        self.begun: dict[tuple[Any, ...], tuple[Future[Any], int]] = {}
        self.workers, self.together = workers, members_at_once(getattr(runner, "options", {}))
        if self.together > 1:
            look_at(runner, self.arms)
        self.tuned = 0
        self.environment = {name: os.environ.get(name) for name in WORKERS}
        os.environ |= WORKERS  # read by new processes alone
        self.others = multiprocessing.active_children()
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, context, initializer=_open, initargs=(runner,))

    def __enter__(self) -> Ahead:
        self._tune_until(2)
        return self

    def __exit__(self, *error: Any) -> None:
        mine = [child for child in multiprocessing.active_children() if child not in self.others]
        self.pool.shutdown(wait=error[0] is None, cancel_futures=True)
        for name, value in self.environment.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        for child in mine if error[0] is not None else ():
            child.terminate()  # what they were at is done again

    def __call__(
        self, *, arm: Arm, seed: int, learning_rate: float | None, splits: tuple[str, ...], output: Path
    ) -> Any:
        if not arm.is_trained:
            return self.runner(arm=arm, seed=seed, learning_rate=learning_rate, splits=splits, output=output)
        stage = "confirm" if "test" in splits else "tune"
        if stage == "confirm":
            self._begin([("confirm", arm, each, learning_rate) for each in self.seeds])
        self._tune_until(self._place(arm) + 3)
        self._begin([(stage, arm, seed, learning_rate)], again=True)
        future, place = self.begun[stage, str(arm), seed, learning_rate]
        result = future.result()[place]
        if isinstance(result, Exception):
            raise result
        return result

    def alone(self, arm: Arm, learning_rate: float | None) -> Any:
        """For costs, which are measured when the workers are done: never from runs beside others."""
        return self.runner.alone(arm, learning_rate)

    def show(self, items: Sequence[str]) -> Any:
        return self.runner.show(items)

    def finished(self) -> int:
        """Runs that have ended, asked for or not."""
        return sum(future.done() for future, _ in self.begun.values())

    def _place(self, arm: Arm) -> int:
        return next((i for i, each in enumerate(self.arms) if str(each) == str(arm)), 0)

    def _tune_until(self, count: int) -> None:
        """Begin the trials of the first `count` arms; of all where runs are trained together, so that many are."""
        if self.tuned < count and self.together > 1 and any(is_able(self.runner, arm) for arm in self.arms):
            count = len(self.arms)
        self._begin(
            [
                ("tune", arm, seed, rate)
                for arm in self.arms[self.tuned : count]
                for rate in self.rates.get(str(arm), ())  # a control may take the rate of its anchor
                for seed in self.tuning_seeds
            ]
        )
        self.tuned = max(self.tuned, min(count, len(self.arms)))

    def _begin(self, wanted: Sequence[tuple[str, Arm, int, float | None]], again: bool = False) -> None:
        """These runs, begun now unless they are already; what the ledger holds only when it is asked for again."""
        able: list[Any] = []
        others: list[Any] = []
        for stage, arm, seed, rate in wanted:
            key = (stage, str(arm), seed, rate)
            if key in self.begun or (key in self.done and not again):
                continue
            given = {
                "arm": arm, "seed": seed, "learning_rate": rate,
                "splits": ("validation", "test") if stage == "confirm" else ("validation",),
                "output": run_folder(self.folder, stage, arm, seed, rate),
            }  # fmt: skip
            small = self.together > 1 and len(wanted) > 1 and is_able(self.runner, arm)
            (able if small else others).append((key, given))
        size = max(1, min(self.together, math.ceil(len(able) / self.workers)))
        units = [able[at : at + size] for at in range(0, len(able), size)]
        for unit in [*units, *([one] for one in others)]:
            future = self.pool.submit(_run, [given for _, given in unit])
            self.begun |= {key: (future, place) for place, (key, _) in enumerate(unit)}
