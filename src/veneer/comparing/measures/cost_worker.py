"""One arm alone in a process of its own, measured in turns: `python -m veneer.comparing.measures.cost_worker JOB`.

It trains with the very loop that everything else trains with. A hook stops it between steps: there it waits
for a line on standard input, so that the turns of several arms can alternate, then measures the steps that
follow, and answers with a line of JSON. The loaded model is measured before anything is attached to it.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from veneer.comparing.measures import _machine
from veneer.comparing.planning.few_steps import for_few_steps
from veneer.training import Hooks, train

WARM_UP = 2  # on the longest rows: the second has the optimiser's state already, so that memory is at its top
COUNTED = WARM_UP + 1  # one step whose operations are counted, and which is not timed
STEPS = 2  # timed in each turn, always on the same rows
LATENCIES = 5  # single items in each turn
THROUGHPUT_ROWS = 16


class Turns(Hooks):
    """Stops the loop between steps. `answers` are written by `say`; `wait` blocks until the next turn."""

    def __init__(
        self, turns: int, say: Callable[[Mapping[str, Any]], None], wait: Callable[[], None]
    ) -> None:
        self.turns, self.say, self.wait = turns, say, wait
        self.loaded = 0
        self.counter: Any = None
        self.flops: int | None = None
        self.highest = 0
        self.began: dict[str, Any] = {}

    @property
    def steps(self) -> int:
        return COUNTED + self.turns * STEPS

    def between_steps(self, run: Any, step: int) -> None:
        if step == 0:
            _choose_rows(run)
        elif step == WARM_UP:
            self.highest = high_water(run.device)
            self.counter = _flop_counter()
        elif step == COUNTED:
            self.flops = _counted(self.counter)
            self.say(self._ready(run))
            self._begin(run)
        elif step > COUNTED and (step - COUNTED) % STEPS == 0:
            self._end(run)
            if step < self.steps:
                self._begin(run)

    def _ready(self, run: Any) -> dict[str, Any]:
        infer(run.model, run.task, run.rows, run.feeder, run.device)  # its first call is slower
        return {
            "trainable_parameters": sum(p.numel() for p in run.subject.parameters()),
            "flops_per_step": self.flops,
            "peak_memory_bytes": max(0, self.highest - self.loaded),
            "runs_in_bytes": self.highest,
            "model_bytes": self.loaded,
            "longest_rows_tokens": max(run.plan.lengths),
            **resources(run.device),
        }

    def _begin(self, run: Any) -> None:
        self.wait()
        synchronize(run.device)
        self.began = {"tokens": run.tokens, "energy": _machine.energy_counters(),
                      "cpu": time.process_time(), "wall": time.perf_counter()}  # fmt: skip

    def _end(self, run: Any) -> None:
        synchronize(run.device)
        wall = time.perf_counter() - self.began["wall"]
        cpu = time.process_time() - self.began["cpu"]
        energy = _machine.joules(self.began["energy"], _machine.energy_counters())
        self.say(
            {
                "step_seconds": wall / STEPS,
                "cpu_seconds": cpu / STEPS,
                "energy_joules": None if energy is None else energy / STEPS,
                "tokens_per_second": (run.tokens - self.began["tokens"]) / wall,
                **infer(run.model, run.task, run.rows, run.feeder, run.device),
            }
        )


def _choose_rows(run: Any) -> None:
    """The longest batch of an epoch to warm up on, then typical ones, the same for every arm and turn."""
    plan = run.plan
    of = {step: plan.indices(step) for step in range(plan.steps_an_epoch)}
    padded = {step: len(rows) * max(plan.lengths[i] for i in rows) for step, rows in of.items()}
    full = max(len(rows) for rows in of.values())
    order = sorted((s for s, rows in of.items() if len(rows) == full), key=lambda s: (padded[s], s))
    longest = max(padded, key=lambda s: (padded[s], -s))
    places = [(2 * k + 1) * len(order) // (2 * STEPS) for k in range(STEPS)]

    def rows_of(step: int) -> list[dict[str, Any]]:
        chosen = longest if step < WARM_UP else order[places[(step - WARM_UP - 1) % STEPS]]
        return [run.rows[i] for i in of[chosen]]

    run.rows_of = rows_of


def infer(model: Any, task: Any, rows: list[dict[str, Any]], feeder: Any, device: Any) -> dict[str, Any]:
    """{latency_seconds and latency_cpu_seconds: of one item of median length, items_per_second: in batches}."""
    import torch

    from veneer.training._evaluate import evaluating

    order = sorted(range(len(rows)), key=lambda i: (rows[i]["length"], i))
    middle = rows[order[len(order) // 2]]
    step = max(1, len(order) // THROUGHPUT_ROWS)
    several = [rows[i] for i in order[::step][:THROUGHPUT_ROWS]]
    with evaluating(model), torch.no_grad():

        def seconds(chosen: list[dict[str, Any]]) -> tuple[float, float]:
            """By the clock, and of the processor."""
            synchronize(device)
            began, used = time.perf_counter(), time.process_time()
            task.predict(model, task.collate(chosen, feeder, model).to(device))
            synchronize(device)
            return time.perf_counter() - began, time.process_time() - used

        single = [seconds([middle]) for _ in range(LATENCIES)]
        return {
            "latency_seconds": median(clock for clock, _ in single),
            "latency_cpu_seconds": median(used for _, used in single),
            "items_per_second": len(several) / seconds(several)[0],
        }


def synchronize(device: Any) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def high_water(device: Any) -> int:
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _machine.high_water_bytes()


def loaded_bytes(device: Any) -> tuple[int, bool]:
    """What is held now, and whether the high-water mark was set back to it."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), True
    exact = _machine.reset_high_water()
    return _machine.resident_bytes(), exact


def resources(device: Any) -> dict[str, Any]:
    import torch

    is_cuda = torch.device(device).type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if is_cuda else _machine.available_bytes()
    return {
        "available_bytes": free,
        "held_bytes": _machine.resident_bytes(),
        "machine": _machine.machine(str(device)),
    }


def _flop_counter() -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    counter.__enter__()
    return counter


def _counted(counter: Any) -> int:
    counter.__exit__(None, None, None)
    return int(counter.get_total_flops())


def work(job: Mapping[str, Any], say: Callable[[Mapping[str, Any]], None], wait: Callable[[], None]) -> None:
    """Open the base, let it settle, and train the arm in turns (or, untrained, predict in turns)."""
    import torch

    from veneer.training import _open

    options = dict(job["options"])
    data, turns = job["data"], job["turns"]
    max_length, tokenizer = options.pop("max_length", None), None
    task = _open.task_for(_open.open_rows(data, None), max_length)
    base = _open.open_model(
        job["model"], task, tokenizer=tokenizer, seed=0, dtype=options.pop("dtype", None),
        quantise=options.pop("quantise", None), matmul=options.pop("matmul", None),
    )  # fmt: skip
    device = torch.device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    base.model.to(device)
    feeder = _open.feeder_of(base, task)
    shortest = min(data.train, key=lambda row: len(str(row)))
    few = task.encode([shortest], feeder, base.model).features
    infer(base.model, task, few, feeder, device)  # what is loaded at first use is part of the model
    hook = Turns(turns, say, wait)
    hook.loaded, exact = loaded_bytes(device)
    if not job["is_trained"]:
        _only_predict(base.model, task, data.train, feeder, device, hook, exact)
        return
    options = for_few_steps(options)
    for given in ("seed", "learning_rate"):
        options.pop(given, None)
    train(
        model=base, data=data, method=job["method"], learning_rate=job["learning_rate"], seed=0,
        max_length=max_length, max_steps=hook.steps, evaluate_on=(), hooks=[hook], progress=False, **options,
    )  # fmt: skip


def _only_predict(
    model: Any, task: Any, rows: Any, feeder: Any, device: Any, hook: Turns, exact: bool
) -> None:
    features = task.encode(rows, feeder, model).features
    infer(model, task, features, feeder, device)
    nothing = {"trainable_parameters": 0, "flops_per_step": 0, "peak_memory_bytes": 0}
    hook.say(
        {**nothing, "runs_in_bytes": high_water(device), "model_bytes": hook.loaded, **resources(device)}
    )
    for _ in range(hook.turns):
        hook.wait()
        hook.say({"step_seconds": 0.0, "cpu_seconds": 0.0, "energy_joules": None, "tokens_per_second": None,
                  **infer(model, task, features, feeder, device)})  # fmt: skip


def main(path: str) -> int:
    """Answers go to the standard output that the process was given; whatever else prints goes to its errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    def wait() -> None:
        if not sys.stdin.readline():
            raise SystemExit(3)  # the parent is gone

    import torch

    torch.set_num_threads(1)
    job = pickle.loads(Path(path).read_bytes())  # written by the parent, in a folder of its own
    try:
        work(job, say, wait)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
