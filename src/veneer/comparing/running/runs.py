"""Running the arms: what a trainer must give, and what becomes of each run.

A trainer is a callable `run_arm(arm=, seed=, learning_rate=, splits=, output=) -> result`. Every call ends in
one line of the ledger. Predictions on the test split never stand in the ledger: they go to a sealed file,
whose digest the ledger keeps, and which only `Runs.open_test` reads, when every rate has been chosen.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from veneer.comparing.measures.further import TRAIN_SAMPLE
from veneer.comparing.planning.arms import Arm
from veneer.comparing.planning.design import Comparison, canonical_json
from veneer.comparing.planning.forecast import duration
from veneer.comparing.planning.halving import share_of
from veneer.comparing.running.history import compact
from veneer.comparing.running.ledger import Ledger, write_atomic
from veneer.comparing.running.outcome import (
    forget_test,
    is_inside,
    item_line,
    plain,
    reason_of,
    run_folder,
    status_of,
)
from veneer.errors import BadData

COSTS = ("trainable_parameters", "bytes_on_disk", "peak_memory_bytes", "step_seconds", "tokens_per_second")


class RunResult(Protocol):
    """What a trainer returns; `veneer.training.TrainResult` is one.

    metrics: {split: {name: value}}. predictions: {split: [{"item", "score", ...}]}. folder: what it saved.
    An item's score is better where it is higher (a squared error comes with its sign turned).
    """

    metrics: Mapping[str, Mapping[str, float]]
    predictions: Mapping[str, list[dict[str, Any]]]
    trainable_parameters: int
    bytes_on_disk: int
    step_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    folder: Any


RunArm = Callable[..., Any]


@dataclass(frozen=True)
class Progress:
    """One thing that happened: a message, or a run that ended as the `done`-th of about `of`."""

    message: str
    done: int = 0
    of: int = 0
    remaining_seconds: float | None = None


def print_progress(event: Progress) -> None:
    """The default: a line on standard error, which leaves standard output to results."""
    left = "" if event.remaining_seconds is None else f"  (about {duration(event.remaining_seconds)} left)"
    count = f"[{event.done}/{event.of}] " if event.of else ""
    print(f"{count}{event.message}{left}", file=sys.stderr, flush=True)


class Runs:
    """The runs of one comparison in one folder, done or still to do."""

    def __init__(
        self,
        folder: Path,
        design: Comparison,
        ledger: Ledger,
        run_arm: RunArm,
        progress: Callable[[Progress], None] = print_progress,
        of: int = 0,
    ) -> None:
        self.folder, self.design, self.ledger = folder, design, ledger
        self.run_arm, self.progress, self.of = run_arm, progress, of
        self.seconds: list[float] = []
        self.failed_now: set[str] = set()

    def find(
        self, stage: str, arm: Arm, seed: int, rate: float | None, share: float = 1.0
    ) -> dict[str, Any] | None:
        """The line of a run that has ended, or None. A run that failed is not done: it is tried again."""
        for line in reversed(self.ledger.of_kind("run")):
            same = line["stage"] == stage and line["arm"] == str(arm) and line["seed"] == seed
            same = same and line["learning_rate"] == rate and share_of(line) == share
            if same and line["status"] != "failed":
                return line
        return None

    def done(self) -> list[dict[str, Any]]:
        return [line for line in self.ledger.of_kind("run") if line["status"] != "failed"]

    def expect(self, arm: Arm, trials: Sequence[tuple[int, float, float]]) -> None:
        """Say which trials (seed, rate, share) will be asked for next, to a trainer that trains runs together."""
        expected = getattr(self.run_arm, "expect", None)
        if expected is not None:
            expected(arm, trials)

    def once(self, stage: str, arm: Arm, seed: int, rate: float | None, share: float = 1.0) -> dict[str, Any]:
        """The line of this run, from the ledger or by running it now. share: of the budget, for a halved trial."""
        found = self.find(stage, arm, seed, rate, share)
        if found is not None:
            return found
        further = tuple(getattr(self.run_arm, "beyond", ()))
        splits = ("validation",) if stage == "tune" else ("validation", "test", *further)
        output = run_folder(self.folder, stage, arm, seed, rate, share)
        # A trainer need not know of it where trials are not halved.
        part = {} if share == 1 else {"share": share}
        line: dict[str, Any] = {
            "kind": "run",
            "design": self.design.sha256,
            "stage": stage,
            "arm": str(arm),
            "seed": seed,
            "learning_rate": rate,
            **part,
        }
        start, took = time.monotonic(), None
        try:
            result = self.run_arm(
                arm=arm, seed=seed, learning_rate=rate, splits=splits, output=output, **part
            )
            line.update(self._outcome(result, stage, arm, seed))
            took = getattr(result, "run_seconds", None)  # of a trainer that began before it was asked
        except Exception as error:
            line |= {"status": status_of(error), "reason": reason_of(error)}
        line["seconds"] = round(time.monotonic() - start if took is None else took, 3)
        self.ledger.append(line)
        if stage == "tune":
            shutil.rmtree(output, ignore_errors=True)
        else:
            forget_test(output)
            self._keep_best(arm)
        self._report(line)
        return line

    def _outcome(self, result: RunResult, stage: str, arm: Arm, seed: int) -> dict[str, Any]:
        value = float(result.metrics["validation"][self.design.metric])
        if not math.isfinite(value):
            return {"status": "diverged", "reason": f"validation {self.design.metric} is {value}"}
        outcome: dict[str, Any] = {"status": "ok", "reason": "", "validation": value}
        outcome |= {key: plain(getattr(result, key, None)) for key in COSTS}
        if stage == "confirm":
            outcome["history"] = compact(getattr(result, "history", None) or (), self.design.metric)
            if TRAIN_SAMPLE in result.metrics:
                outcome["train"] = plain(result.metrics[TRAIN_SAMPLE][self.design.metric])
            sealed = self._to_seal(result, "test", arm)
            sets = [name for name in result.predictions if name not in ("validation", "test", TRAIN_SAMPLE)]
            sealed["further"] = {name: self._to_seal(result, name, arm) for name in sets}
            if any(not math.isfinite(item["score"]) for item in sealed["items"]):
                return {"status": "diverged", "reason": "scores on the test split are not finite"}
            text = canonical_json(sealed)
            write_atomic(self.sealed_path(arm, seed), text)
            outcome["sealed_sha256"] = hashlib.sha256(text.encode()).hexdigest()
            outcome["folder"] = (
                str(Path(result.folder).relative_to(self.folder))
                if is_inside(result.folder, self.folder)
                else str(result.folder)
            )
        return outcome

    def _to_seal(self, result: RunResult, split: str, arm: Arm) -> dict[str, Any]:
        """Metrics and items of one set; of the test split also the group of each item."""
        groups = getattr(getattr(self.run_arm, "beyond", None), "groups", {}) if split == "test" else {}
        items = [item_line(line, arm) for line in result.predictions[split]]
        return {
            "metrics": {key: plain(number) for key, number in result.metrics.get(split, {}).items()},
            "items": [item | {"group": groups[item["item"]]} for item in items] if groups else items,
        }

    def sealed_path(self, arm: Arm, seed: int) -> Path:
        return self.folder / "sealed" / arm.slug / f"seed-{seed}.json"

    def open_test(self, arm: Arm, line: Mapping[str, Any]) -> dict[str, Any]:
        """The sealed predictions of one run: {"metrics": ..., "items": [...]}, as they were when it ended."""
        import json

        path = self.sealed_path(arm, line["seed"])
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            text = ""
        if hashlib.sha256(text.encode()).hexdigest() != line["sealed_sha256"]:
            raise BadData(
                f"the test predictions of '{arm}', seed {line['seed']}, are not "
                f"those that the ledger recorded ({path}).",
                next_step="delete the line of that run from ledger.jsonl: the run is then done again",
            )
        return json.loads(text)

    def _keep_best(self, arm: Arm) -> None:
        """Of an arm only the folder with the highest validation score stays: full copies are large."""
        best = self.best_of(arm)
        if best is None:
            return
        for path in (self.folder / "runs" / arm.slug).glob("seed-*"):
            finished = self.find_seed(arm, path.name)
            if finished is not None and path.name != f"seed-{best['seed']}":
                shutil.rmtree(path, ignore_errors=True)

    def find_seed(self, arm: Arm, folder_name: str) -> dict[str, Any] | None:
        lines = [line for line in self.confirmed(arm) if f"seed-{line['seed']}" == folder_name]
        return lines[-1] if lines else None

    def confirmed(self, arm: Arm) -> list[dict[str, Any]]:
        return [line for line in self.done() if line["stage"] == "confirm" and line["arm"] == str(arm)]

    def best_of(self, arm: Arm) -> dict[str, Any] | None:
        """The confirmed run with the best validation score; of equal ones the smaller seed."""
        sign = 1 if self.design.higher_is_better else -1
        ok = [line for line in self.confirmed(arm) if line["status"] == "ok"]
        return max(ok, key=lambda line: (sign * line["validation"], -line["seed"]), default=None)

    def _report(self, line: Mapping[str, Any]) -> None:
        self.seconds.append(line["seconds"])
        done = len(self.done())
        left = None
        if self.of and len(self.seconds) >= 2:
            left = max(0, self.of - done) * sum(self.seconds) / len(self.seconds)
        rate = "" if line["learning_rate"] is None else f" at {line['learning_rate']:g}"
        what = (
            f"{self.design.metric} {line['validation']:.4f} on validation"
            if "validation" in line
            else (f"{line['status'].replace('_', ' ')}: {line['reason']}")
        )
        self.progress(
            Progress(
                f"{line['arm']}, {line['stage']}, seed {line['seed']}{rate}: {what}", done, self.of, left
            )
        )
