"""Which form is the fastest on this machine: measured once, kept in the cache folder, read by the choice of forms.

Measured is what forms differ in: adding the low-rank products of several adapters to a linear layer's output, at the
sizes of the model's own layers. A size that was not measured takes the answer of the nearest one.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer._cache import cache_folder
from veneer.edits import Tensors

from ._adds import Adds, Piece
from ._attach import host_of
from ._host import Host
from ._low_rank import LowRank, Packed

ROWS, TOKENS, ADAPTERS = 16, (1, 8, 64), (2, 4, 16)
SHAPES, REPEATS = 4, 7  # the most frequent layers of a model; samples of each form
FILE = "forms.json"
Size = tuple[int, int, int, int, int, int]  # in, out, rank, rows, tokens of a row, adapters


@dataclass
class FormTable:
    """Seconds by size and form, and where they are kept."""

    seconds: dict[Size, dict[str, float]] = field(default_factory=dict)
    path: Path | None = None

    def __post_init__(self) -> None:
        self.best = functools.lru_cache(4096)(self._best)

    def _best(self, n_in: int, n_out: int, rank: int, rows: int, tokens: int, adapters: int) -> str:
        """The form that was fastest at the nearest measured size."""
        wanted = (n_in, n_out, rank, rows, tokens, adapters)
        if not self.seconds:
            return "bmm"
        near = min(self.seconds, key=lambda size: sum(abs(math.log(a / b)) for a, b in zip(size, wanted)))
        return min(self.seconds[near], key=self.seconds[near].__getitem__)

    def __str__(self) -> str:
        lines = [
            f"{'in':>6} {'out':>6} {'rank':>4} {'rows':>4} {'tokens':>6} {'adapters':>8}   best      microseconds"
        ]
        for size, found in sorted(self.seconds.items()):
            times = ", ".join(f"{form} {1e6 * s:.0f}" for form, s in found.items())
            lines.append(
                "{:>6} {:>6} {:>4} {:>4} {:>6} {:>8}   ".format(*size) + f"{self._best(*size):9} {times}"
            )
        return "\n".join(lines)


def tune_forms(model: nn.Module, *, again: bool = False) -> FormTable:
    """Measure the forms at the sizes of this model's layers, on its device, and let its mixed batches go by it.

    What this machine measured before is read from the cache folder, and only what is missing is measured (about a
    second). again: measure anew. Without this call every site that can is computed as "bmm". Raises UnknownAdapter.
    """
    host = host_of(model)
    key, path = machine_key(host), cache_folder() / FILE
    known = {} if again else _read(path).get(key, {})
    table = FormTable(path=path)
    fresh = False
    for n_in, n_out in _shapes(host):
        for rank in _ranks(host):
            for tokens in TOKENS:
                for adapters in ADAPTERS:
                    size = (n_in, n_out, rank, ROWS, tokens, adapters)
                    found = known.get(size)
                    if found is None:
                        found, fresh = measure(size, host.dtype or torch.float32, host.device), True
                    table.seconds[size] = found
    if fresh:
        _write(path, key, {**known, **table.seconds})
    with host.lock:
        host.forms = table
        host._programs.clear()
    return table


@torch.inference_mode(False)
@torch.no_grad()
def measure(size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Seconds of each form for one size: the medians of samples taken in turn."""
    n_in, n_out, rank, rows, tokens, adapters = size
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, y = (draw(rows, tokens, n).to(device, dtype) for n in (n_in, n_out))
    pairs = [
        Tensors(A=draw(rank, n_in).to(device, dtype), B=draw(n_out, rank).to(device, dtype))
        for _ in range(adapters)
    ]
    owners = [i * adapters // rows for i in range(rows)]
    slots = torch.tensor(owners, device=device)
    in_place = Adds(_pieces(pairs, owners, rank), rows, n_in, n_out)
    packed = Packed([(t.A, t.B) for t in pairs], slots)
    parts = [
        (slice(owners.index(i), rows - owners[::-1].index(i)), t) for i, t in enumerate(pairs) if i in owners
    ]

    def segments() -> None:
        for part, t in parts:
            y[part] += (x[part] @ t.A.mT) @ t.B.mT

    forms: dict[str, Callable[[], Any]] = {
        "bmm": lambda: in_place.into(x, y),
        "packed": lambda: y.add_(packed(x)),
        "segments": segments,
    }
    samples: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(REPEATS + 1):
        for form, run in forms.items():
            samples[form].append(_timed(run, device))
    return {form: statistics.median(found[1:]) for form, found in samples.items()}


class _Factors:
    """A method whose tensors are its factors."""

    @staticmethod
    def low_rank(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        return t.A, t.B


def _pieces(pairs: list[Tensors], owners: list[int], rank: int) -> list[Piece]:
    low = LowRank(_Factors, pairs, owners, as_one=True)
    rows = {slot: tuple(i for i, owner in enumerate(owners) if owner == slot) for slot in owners}
    return [Piece(low, slot, mine, 0, rank) for slot, mine in rows.items()]


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def machine_key(host: Host) -> str:
    """What measurements hold for: processor or GPU, threads, precision, torch."""
    device = host.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return f"{name}, {threads} threads, {host.dtype}, torch {torch.__version__}, in place"


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _shapes(host: Host) -> list[tuple[int, int]]:
    """(in, out) of the most frequent linear layers."""
    sites = [
        s
        for s in host.anatomy.sites
        if s.kind in ("linear", "conv1d") and len(s.shape) == 2 and not s.experts
    ]
    return [(n_in, n_out) for (n_out, n_in), _ in Counter(s.shape for s in sites).most_common(SHAPES)]


def _ranks(host: Host) -> list[int]:
    """Ranks of the adapters that are there."""
    found = {
        getattr(sp.method, "rank", 0)
        for a in host.adapters().values() for sp in a.plan.sites if "low_rank" in sp.method.arguments
    }  # fmt: skip
    return sorted(r for r in found if isinstance(r, int) and r > 0) or [8]


def _read(path: Path) -> dict[str, dict[Size, dict[str, float]]]:
    """What was measured before; a file that holds something else counts as none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {key: {_size(s): _seconds(f) for s, f in of.items()} for key, of in raw.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _size(text: str) -> Size:
    n_in, n_out, rank, rows, tokens, adapters = (int(n) for n in text.split(","))
    return n_in, n_out, rank, rows, tokens, adapters


def _seconds(found: dict[str, Any]) -> dict[str, float]:
    return {str(form): float(s) for form, s in found.items()}


def _write(path: Path, key: str, seconds: dict[Size, dict[str, float]]) -> None:
    """Put what was measured beside what other machines and precisions have there; by one rename."""
    whole = {**_read(path), key: seconds}
    text = json.dumps(
        {k: {",".join(map(str, s)): v for s, v in of.items()} for k, of in whole.items()}, indent=1
    )
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


__all__ = ["FormTable", "machine_key", "measure", "tune_forms"]
