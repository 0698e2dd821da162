"""`veneer compare --watch FOLDER`: a comparison that runs elsewhere, seen in this terminal. Starts and changes nothing.

In a terminal the view stays until the comparison ends or Ctrl-C; in a pipe it is said once. All of it is read
from the ledger, so that it works for a run of another process, of another machine over a shared disk, and for one
that was killed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from veneer.cli._common import result
from veneer.cli._table import table, terminal_width
from veneer.comparing.planning.forecast import duration
from veneer.comparing.running.live import columns_of, size_of, state_of

EVERY = 1.0  # seconds between two looks at the folder
BAR = 24


def watch_folder(folder: str, as_json: bool = False) -> None:
    """Show the state of a compare folder; in a terminal, until it is finished."""
    path = Path(folder)
    state = state_of(path)
    if as_json or not sys.stdout.isatty() or state["is_finished"]:
        result(state, text_of(path, state, terminal_width()))
        return
    try:
        _follow(path, state)
    except KeyboardInterrupt:  # whoever watches may stop watching
        print(f"the comparison in {folder} is not touched by that", file=sys.stderr)


def _follow(path: Path, state: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    began, first, seen = time.monotonic(), state["done"], size_of(path)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not state["is_finished"]:
            new = state["done"] - first
            pace = (time.monotonic() - began) / new if new >= 4 else None
            text = text_of(path, state, console.width, console.height, pace)
            live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
            time.sleep(EVERY)
            if size_of(path) != seen or not state["is_running"]:
                seen, state = size_of(path), state_of(path)
    print(text_of(path, state, terminal_width()))


def text_of(
    path: Path, state: dict[str, Any], width: int, height: int | None = None, pace: float | None = None
) -> str:
    """The state in words, a bar, a table of arms at most `height` lines high, and what ended last."""
    if "comparisons" in state:
        return _several_text(path, state, width, height, pace)
    if state["is_finished"]:
        return _result_of(path, width)
    full = round(BAR * state["done"] / max(1, state["of"]))
    now = "running" if state["is_running"] else "not running: the same command goes on"
    if state["is_running"] and state["done"] >= state["of"]:
        now = "costs and the report are left"
    left = "" if pace is None else f", about {duration(pace * (state['of'] - state['done']))} left"
    head, rows = columns_of(state)
    recent = state["recent"] if height is None or height > 24 else state["recent"][:2]
    room = len(rows) if height is None else max(3, height - len(recent) - 9)
    lines = [
        *_wrapped(state["title"], width),
        f"{'█' * full}{'░' * (BAR - full)} {state['done']} of about {state['of']} runs{left}; {now}",
        "",
        table(
            head, _the_near(rows, state, room), width=width, drop=("trials", "rate chosen"), right=head[1:5]
        ),
        "",
        *(f"ended: {text}"[:width] for text in recent),
        *_wrapped(
            f"{state['metric']} on validation rows; the test split is opened when every run has ended", width
        ),
    ]
    return "\n".join(lines)


def _several_text(
    path: Path, state: dict[str, Any], width: int, height: int | None, pace: float | None
) -> str:
    """A line for each comparison, and the one that is under way as it is by itself."""
    rows = []
    for name, one in state["comparisons"].items():
        now = (
            "waiting"
            if one is None
            else "finished"
            if one["is_finished"]
            else "running"
            if one["is_running"]
            else "stopped"
        )
        rows.append((name, "" if one is None else f"{one['done']} of {one['of']}", now))
    lines = [state["title"], "", table(("comparison", "runs", "now"), rows, width=width, right=("runs",))]
    at = next(
        (name for name, one in state["comparisons"].items() if one is not None and not one["is_finished"]),
        None,
    )
    if at is not None:
        room = None if height is None else max(12, height - len(rows) - 5)
        lines += ["", f"-- {at}", text_of(path / at, state["comparisons"][at], width, room, pace)]
    elif (path / "across.html").is_file():
        lines += ["", f"report: {path / 'across.html'}"]
    return "\n".join(lines)


def _result_of(path: Path, width: int) -> str:
    """What `veneer compare` printed when it ended."""
    import json
    from types import SimpleNamespace

    from veneer.cli import _compare_text

    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    best = path / "best"
    return _compare_text.text_of(
        SimpleNamespace(
            to_dict=lambda: summary, sentence=summary["recommendation"]["sentence"], report=path / "report.html",
            best_folder=best if best.is_dir() else None,
        ), width,
    )  # fmt: skip


def _the_near(rows: list[tuple[str, ...]], state: dict[str, Any], most: int) -> list[tuple[str, ...]]:
    """Of many arms those around the one that runs now, and how many more there are."""
    if len(rows) <= most:
        return rows
    at = next((i for i, arm in enumerate(state["arms"]) if arm["status"] in ("tuning", "confirming")), 0)
    first = max(0, min(at - 1, len(rows) - most + 1))
    shown = rows[first : first + most - 1]
    return [*shown, (f"and {len(rows) - len(shown)} more", *[""] * (len(rows[0]) - 1))]


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)
