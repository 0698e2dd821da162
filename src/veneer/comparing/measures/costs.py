"""Costs, measured apart from training: each arm alone in a child process, one thread, turns that alternate.

What a training worker says of its own time and memory depends on what ran beside it and before it. Here every
arm has a process to itself, in which only the base and the arm are loaded; the arms take turns (a, b, c, a, b,
c, ...), one at a time, so that a machine that slows down slows all of them; and what is reported is the median
of the turns with its quartiles. An arm that fails is a line that says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from veneer.comparing.measures.nursery import Nursery
from veneer.comparing.planning.arms import Arm
from veneer.comparing.running.ledger import write_atomic
from veneer.comparing.running.runs import Progress

TURNS = 5
START_SECONDS = 900.0  # for a base to load and three steps, on a slow machine
TURN_SECONDS = 300.0
LEAVING_SECONDS = 3.0
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
           "NUMEXPR_NUM_THREADS")  # fmt: skip
TIMED = ("step_seconds", "cpu_seconds", "energy_joules", "tokens_per_second", "latency_seconds",
         "latency_cpu_seconds", "items_per_second")  # fmt: skip
MEASURED = ("trainable_parameters", "flops_per_step", "peak_memory_bytes", "runs_in_bytes", "model_bytes",
            "longest_rows_tokens")  # fmt: skip
WORKER = "veneer.comparing.measures.cost_worker"
PARTS = 0.6  # of the free memory may be taken by children that wait for their turn
Say = Callable[[Progress], None]


class Child:
    """One arm's process: `ready` is what it measured while it started, `turn()` measures once more."""

    def __init__(
        self, arm: Arm, job: Mapping[str, Any], folder: Path, nursery: Nursery | None = None
    ) -> None:
        self.arm, self.failure = arm, ""
        self.turns: list[dict[str, Any]] = []
        self.ready: dict[str, Any] = {}
        self._job = path = folder / f"{arm.slug}.pickle"
        path.write_bytes(pickle.dumps(dict(job)))
        self._errors = open(folder / f"{arm.slug}.log", "w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        born = None if nursery is None else nursery.start(str(path), self._errors)
        self._process: Any = _interpreter(str(path), self._errors) if born is None else born

    def wait_ready(self) -> None:
        if not self.ready and not self.failure:
            self.ready = self._answer(START_SECONDS) or {}
            self._job.unlink(missing_ok=True)  # it was read; with pictures it is large

    def turn(self) -> None:
        if self.failure:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it died: the answer says how
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        found = self._answer(TURN_SECONDS)
        if found is not None:
            self.turns.append(found)

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """The next line of the child, or None with `failure` set."""
        import threading

        assert self._process.stdout is not None
        # A timer, because a pipe cannot be read with a limit on every system.
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        try:
            found = json.loads(line)
        except ValueError:
            self.failure = self._last_words(seconds)
            return None
        if "error" in found:
            self.failure = found["error"]
            return None
        return found

    def _last_words(self, seconds: float) -> str:
        code = self._process.wait(10)
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        why = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"the process of this arm {why} within {seconds:g} s{': ' + said[-1][:200] if said else ''}"

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(LEAVING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def line(self) -> dict[str, Any]:
        """What costs.jsonl says of the arm."""
        if self.failure or not self.turns:
            return {
                "arm": str(self.arm),
                "status": "failed",
                "reason": self.failure or "no turn was measured",
            }
        found: dict[str, Any] = {"arm": str(self.arm), "status": "measured", "reason": ""}
        found |= {key: self.ready.get(key) for key in MEASURED}
        for key in TIMED:
            found |= quartiles(key, [turn.get(key) for turn in self.turns])
        return found | {"turns": len(self.turns), "each_turn": self.turns}


def _interpreter(path: str, errors: Any) -> subprocess.Popen[str]:
    """A process that begins with nothing."""
    return subprocess.Popen(
        [sys.executable, "-m", WORKER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        env=_environment(),
    )  # fmt: skip


def _nursery() -> AbstractContextManager[Nursery | None]:
    """One that has imported everything, where the system can fork."""
    return Nursery(WORKER, _environment()) if sys.platform.startswith("linux") else contextlib.nullcontext()


def _environment() -> dict[str, str]:
    """One thread, and the C library's own way with memory, whatever was set for others."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return {**mine, **dict.fromkeys(THREADS, "1"), "TOKENIZERS_PARALLELISM": "false"}


def quartiles(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """{name: median, name_low and name_high: quartiles}; None where a turn has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    if len(known) == 1:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), known[0])
    low, middle, high = statistics.quantiles(known, n=4, method="inclusive")
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def measure(
    jobs: Mapping[Arm, Mapping[str, Any]], turns: int = TURNS, progress: Say = lambda event: None
) -> list[dict[str, Any]]:
    """A line for each arm, in their order. `jobs` are what `cost_worker.work` reads, less `turns`."""
    lines: list[dict[str, Any]] = []
    waiting, group = list(jobs.items()), 0
    with tempfile.TemporaryDirectory(prefix="veneer-costs-") as name, _nursery() as nursery:
        while waiting:
            group += 1
            children: list[Child] = []
            try:
                while waiting and (room := _room(children)) > 0:
                    for _ in range(min(room, os.cpu_count() or 1, len(waiting))):  # starts are not timed
                        arm, job = waiting.pop(0)
                        children.append(Child(arm, {**job, "turns": turns}, Path(name), nursery))
                    for child in children:
                        child.wait_ready()
                for _ in range(turns):
                    for child in children:
                        child.turn()
            finally:
                for child in children:
                    child.close()
            for child in children:
                lines.append({**child.line(), "group": group, "machine": child.ready.get("machine")})
                progress(Progress(_said(lines[-1])))
    return lines


def _room(children: Sequence[Child]) -> int:
    """How many more children fit beside those that wait, of the size of the largest; at first one."""
    known = [child.ready for child in children if child.ready]
    if not known:
        return 1
    return int(PARTS * known[-1]["available_bytes"] // max(ready["runs_in_bytes"] for ready in known))


def _said(line: Mapping[str, Any]) -> str:
    if line["status"] != "measured":
        return f"{line['arm']}, costs: {line['reason']}"
    extra = line["peak_memory_bytes"] / 2**20
    return (
        f"{line['arm']}, costs: {1000 * line['step_seconds']:.3g} ms a step, {extra:.0f} MiB above the model, "
        f"{1000 * line['latency_seconds']:.3g} ms for one item"
    )


# -- in a compare folder ---------------------------------------------------------------------------


def measured_costs(
    folder: Path, run_arm: Any, records: Sequence[Any], identity: str, progress: Say, turns: int = TURNS
) -> list[dict[str, Any]]:
    """The lines of costs.jsonl, measured now unless the file has them for these arms and this `identity`.

    A trainer that has no `alone(arm, learning_rate)` (one that was given by the caller), or that answers None
    (a model in memory, which no other process can open), cannot be measured apart: the list is empty.
    """
    arms = {r.arm: r.learning_rate for r in records if r.lines and r.arm.anchor == r.arm}  # without controls
    key = hashlib.sha256(json.dumps([identity, [str(arm) for arm in arms]]).encode()).hexdigest()
    path = folder / "costs.jsonl"
    if path.is_file():
        known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if known and all(line.get("of") == key for line in known):
            return known
    alone = getattr(run_arm, "alone", None)
    jobs = {} if alone is None else {arm: alone(arm, rate) for arm, rate in arms.items()}
    if not jobs or any(job is None for job in jobs.values()):
        return []
    progress(Progress(f"costs: {len(jobs)} arms, each alone in a process, {turns} turns"))
    lines = [{**line, "of": key} for line in measure(jobs, turns, progress)]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


BUSY = 1.3  # clock over processor, above which other programs had a part in the time


def busy(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """How much longer training steps took by the clock than on the processor, where that is much; on the CPU alone."""
    shares = [
        line["step_seconds"] / line["cpu_seconds"]
        for line in lines
        if line.get("status") == "measured" and line["cpu_seconds"] and line["machine"].get("device") == "cpu"
    ]
    ratio = statistics.median(shares) if shares else 1.0
    return ratio if ratio > BUSY else None


REPLACED = ("peak_memory_bytes", "step_seconds", "tokens_per_second")


def put_into(records: Sequence[Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """What was measured apart takes the place of what the training workers said, in every line of the arm."""
    found = {line["arm"]: line for line in lines}
    for record in records:
        record.measured = measured = dict(found.get(str(record.arm), {}))
        if lines and record.arm.anchor != record.arm:
            record.measured = {
                "status": "not_measured",
                "reason": f"a control, made from {record.arm.anchor}",
            }
        if measured.get("status") == "measured":
            changed = {key: measured[key] for key in REPLACED}
            record.lines = [{**line, **changed} for line in record.lines]
