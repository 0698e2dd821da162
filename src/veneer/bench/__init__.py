"""Benchmarks: speed and memory side by side with HF PEFT, in one run, on this machine.

The outputs of both libraries are compared before anything is timed. A row says veneer's cost over HF PEFT's (or, where
it is named, over the bare base's), and whether what the project expects of it is met; a miss is printed as a miss.
Benchmarks never gate tests.
"""

from __future__ import annotations

import functools
import importlib
import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.errors import UnknownName, nearest

from ._report import Expectation, Report, Row
from ._size import Size

CASES: dict[str, tuple[str, str, tuple[Any, ...]]] = {  # case -> module, function, arguments before the size
    "attach": ("_residents", "attach", ()),
    "load": ("_residents", "load", ()),
    "activate": ("_residents", "activate", ()),
    "forward": ("_rows", "forward", ()),
    "decode": ("_rows", "decode", ()),
    "lora": ("_training", "step", ("lora",)),
    "dora": ("_training", "step", ("dora",)),
    "ia3": ("_training", "step", ("ia3",)),
    "prefix_tuning": ("_training", "step", ("prefix_tuning",)),
    "memory": ("_training", "memory", ()),
    "bare": ("_bare", "forward", ()),
    "bare_decode": ("_bare", "decode", ()),
    "mixed": ("_mixed", "mixed", ()),
    "matmul": ("_matmul", "training", ()),
    "tokens": ("_tokens", "decode", ()),
    "cohort": ("_cohorts", "cohort", ()),
    "kept": ("_kept", "kept", ()),
    "many": ("_many", "many", ()),
    "methods": ("_methods", "methods", ()),
    "import": ("_imports", "imports", ()),
    "scores": ("_scores", "scores", ()),
    "serve": ("_serve", "serve", ()),
    "serve_peers": ("_serve_peers", "peers", ()),
    "uneven": ("_uneven", "uneven", ()),
    "forecast": ("_forecast", "forecast", ()),
}
GROUPS = {
    "residents": ("attach", "load", "activate"),
    "rows": ("forward", "decode", "bare", "bare_decode"),
    "forms": ("matmul", "tokens", "scores"),
    "serving": ("serve", "serve_peers"),
    "training": ("lora", "dora", "ia3", "prefix_tuning"),
}


def run(
    cases: Sequence[str] | None = None,
    *,
    json: bool = False,
    seed: int = 0,
    size: Size | None = None,
    quiet: bool = False,
    device: str | None = None,
    threads: int = 1,
) -> Any:
    """Run cases (default: all of them); a Report, or with `json` the same as a plain dict.

    cases: names of CASES, or of GROUPS. seed: of weights, batches and adapters. size: how large (`Size.small()` only
    shows that everything runs). threads: of torch; the expectations are about one. Progress goes to standard error.
    Raises UnknownName, MissingPackage, and VeneerError where the two libraries compute different things.
    """
    chosen = _chosen(cases)
    if device not in (None, "cpu"):
        raise UnknownName(
            f"the benchmarks measure process CPU time; there are none for the device '{device}'.",
            nearest=["cpu"],
            next_step="veneer bench --device cpu",
        )
    import torch

    from . import _facts, _peer

    _peer.check()
    size = size or Size(seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        report = Report(_facts.facts(size.seed, size.repeats), [])
        for case in chosen:
            if not quiet:
                print(f"bench: {case}", file=sys.stderr, flush=True)
            module, function, arguments = CASES[case]
            measure = getattr(importlib.import_module(f"veneer.bench.{module}"), function)
            with _peer.undisturbed():
                report.rows += functools.partial(measure, *arguments)(size)
    finally:
        torch.set_num_threads(before)
    return report.to_dict() if json else report


def write(report: Report, save: str | Path | None = None, page: str | Path | None = None) -> None:
    """Keep a run as JSON, and write the page of all runs that lie beside it (docs/benchmarks.md is one)."""
    from veneer.errors import BadOption

    from ._page import write_page

    if save is not None:
        place = Path(save)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json_module.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    if page is not None:
        if save is None:
            raise BadOption(
                "a page is written from saved runs.",
                next_step="--save benchmarks/results/RUN.json beside --page",
            )
        write_page(Path(save).parent, Path(page))


def _chosen(cases: Sequence[str] | None) -> list[str]:
    wanted: list[str] = []
    for case in cases or CASES:
        if case not in CASES and case not in GROUPS:
            known = [*CASES, *GROUPS]
            raise UnknownName(
                f"no benchmark is called '{case}'.",
                nearest=nearest(case, known) or known,
                next_step="veneer bench    runs all of them",
            )
        wanted += GROUPS.get(case, (case,))
    return list(dict.fromkeys(wanted))


__all__ = ["CASES", "GROUPS", "Expectation", "Report", "Row", "Size", "run", "write"]
