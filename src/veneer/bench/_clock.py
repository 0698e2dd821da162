"""Measuring: arms in turn, process CPU time, medians and quartiles of paired ratios.

Arms run one after the other within each repeat, so that a slow spell of the machine falls on both; the ratio is
taken within a repeat. Process CPU time leaves out what other processes do, though not what they do to caches.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.errors import VeneerError

TOLERANCE = 1e-5  # of outputs, across forms of the same arithmetic; relative to the largest entry
GRADIENT_TOLERANCE = 1e-4  # of gradients: sums over all tokens, in another order
LEAST_SAMPLE = 0.02  # seconds: shorter calls are repeated within one sample


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of some samples."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Quartiles:
        if len(samples) < 2:
            return cls(*[samples[0]] * 3)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(low, median, high)

    def to_dict(self) -> dict[str, float]:
        return {"low": self.low, "median": self.median, "high": self.high}


@dataclass
class Arm:
    """One side of a comparison: `run` is timed; `after` puts things back, untimed; `once`: a call cannot repeat."""

    run: Callable[[], Any]
    after: Callable[[], Any] | None = None
    once: bool = False


def interleaved(arms: dict[str, Arm], repeats: int) -> dict[str, list[float]]:
    """Seconds of process CPU time a call, one sample an arm and repeat; the order of arms turns every repeat."""
    names = list(arms)
    counts = {}
    for name, arm in arms.items():  # warm both, and find how many calls a sample needs
        _sample(arm, 1)
        spent = _sample(arm, 1)
        counts[name] = 1 if arm.once else max(1, min(10_000, round(LEAST_SAMPLE / max(spent, 1e-7))))
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats):
        for name in names if i % 2 == 0 else reversed(names):
            found[name].append(_sample(arms[name], counts[name]))
    return found


def _sample(arm: Arm, count: int) -> float:
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        for _ in range(count):
            arm.run()
        spent = (time.process_time() - start) / count
    finally:
        gc.enable()
    if arm.after is not None:
        arm.after()
    return spent


def check_equal(what: str, ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest difference over the largest entry; an error where it is more than `tolerance`."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if ours.shape != theirs.shape:
        raise VeneerError(
            f"{what}: veneer gives {tuple(ours.shape)}, HF PEFT {tuple(theirs.shape)}; nothing was timed.",
            next_step="veneer bench --help    shows the rows that can be left out",
        )
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    if not error <= tolerance:
        raise VeneerError(
            f"{what}: veneer and HF PEFT differ by {error:.1e} of the largest entry, more than {tolerance:.0e}; "
            "nothing was timed.",
            next_step="a speed of wrong results is no speed: look at the equations first",
        )
    return error


def check_moved(what: str, adapted: Tensor, bare: Tensor) -> None:
    """An adapter that changes nothing would pass every comparison."""
    if torch.equal(adapted, bare):
        raise VeneerError(
            f"{what}: the adapter changes nothing, so equal outputs would say nothing.",
            next_step="veneer bench --help    shows the rows that can be left out",
        )
