"""A comparison while it runs, from its ledger: how far each arm is, and what its trials gave on validation rows.

Nothing here opens a sealed file: while runs are under way there are no test scores to see, on the page or in
the terminal, whoever watches.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.comparing.planning.arms import parse_arm
from veneer.comparing.planning.design import Comparison
from veneer.comparing.planning.forecast import duration
from veneer.comparing.reporting import charts
from veneer.comparing.reporting.axes import Quantity
from veneer.comparing.reporting.published import lines_of
from veneer.comparing.reporting.report import write_report
from veneer.comparing.reporting.tables import Cell, Column, Row, Table, number
from veneer.comparing.running.runs import Progress
from veneer.errors import BadData

EVERY = 5.0  # seconds between two pages, and more where writing one takes long
RECENT = 5  # runs that ended last
YOUNG = 60.0  # seconds: a ledger that grew so lately belongs to a comparison that runs


def state_of(folder: str | Path) -> dict[str, Any]:
    """How far a comparison is: plain data, as `veneer compare --watch FOLDER --json` prints it.

    {"title", "metric", "done", "of", "is_finished", "is_running", "arms": [{"arm", "trials", "trials_of",
    "best_validation", "learning_rate", "confirmed", "confirmed_of", "status", "reason", "tried"}], "recent"}.
    Of a folder of several comparisons: {"title", "done", "of", "is_finished", "is_running", "comparisons": {name:
    such a state, or None where it has not begun}}. Errors: BadData where the folder holds no comparison.
    """
    folder = Path(folder)
    inside = comparisons_in(folder)
    if inside:
        return _several(folder, inside)
    ledger = lines_of(folder / "ledger.jsonl")
    last = next((line for line in reversed(ledger) if line.get("kind") == "design"), None)
    if last is None:
        raise BadData(
            f"{folder} holds no comparison that can be watched: it has no ledger.jsonl with a design.",
            next_step="give the folder that `veneer compare --output` was given",
        )
    design = Comparison.from_dict(last["design"])
    runs = [line for line in ledger if line.get("kind") == "run" and line["arm"] in design.arms]
    arms = [_arm(name, design, [line for line in runs if line["arm"] == name]) for name in design.arms]
    is_finished = _is_finished(folder, last["sha256"], ledger)
    return {
        "title": f"{len(design.arms)} arms on {design.data or 'the data'}, base {design.model or 'a model'}",
        "design": last["sha256"],
        "metric": design.metric,
        "done": sum(arm["trials"] + arm["confirmed"] for arm in arms),
        "of": sum(arm["trials_of"] + arm["confirmed_of"] for arm in arms),
        "is_finished": is_finished,
        "is_running": not is_finished and is_running(folder),
        "arms": arms,
        "recent": [_said(line, design.metric) for line in runs[-RECENT:][::-1]],
    }


def comparisons_in(folder: Path) -> list[str]:
    """The folders of the comparisons of several tasks and bases that were designed together."""
    path = folder / "design.json"
    if (folder / "ledger.jsonl").is_file() or not path.is_file():
        return []
    return list(json.loads(path.read_text(encoding="utf-8")).get("comparisons", {}))


def _several(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    begun = {
        name: state_of(folder / name) if (folder / name / "ledger.jsonl").is_file() else None
        for name in names
    }
    known = [state for state in begun.values() if state is not None]
    return {
        "title": f"{len(names)} comparisons",
        "done": sum(state["done"] for state in known),
        "of": sum(state["of"] for state in known),
        "is_finished": len(known) == len(names) and all(state["is_finished"] for state in known),
        "is_running": any(state["is_running"] for state in known),
        "comparisons": begun,
    }


def _arm(name: str, design: Comparison, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is known of one arm. An arm that cannot be measured has no more runs than it had."""
    known = {(line["stage"], line["seed"], line["learning_rate"]): line for line in lines}  # the last attempt
    tried = [line for line in known.values() if line["stage"] == "tune" and line["status"] != "failed"]
    confirmed = [line for line in known.values() if line["stage"] == "confirm" and line["status"] != "failed"]
    is_trained = parse_arm(name).is_trained
    out = next((line for line in known.values() if line["status"] in ("not_applicable", "failed")), None)
    trials_of = max(len(design.rates.get(name, ())) * len(design.tuning_seeds), len(tried))
    confirmed_of = len(design.seeds) if is_trained else 1
    sign = 1 if design.higher_is_better else -1
    good = [line["validation"] for line in tried if line["status"] == "ok"]
    status = out["status"] if out else _status(len(tried), trials_of, len(confirmed), confirmed_of)
    return {
        "arm": name,
        "trials": len(tried),
        "trials_of": len(tried) if out else trials_of,
        "best_validation": max(good, key=lambda value: sign * value) if good else None,
        "learning_rate": confirmed[-1]["learning_rate"] if confirmed else None,
        "confirmed": len(confirmed),
        "confirmed_of": len(confirmed) if out else confirmed_of,
        "status": status,
        "reason": out["reason"] if out else "",
        "tried": [
            {key: line.get(key) for key in ("learning_rate", "validation", "status", "seed")}
            for line in tried
        ],
    }


def _status(tried: int, trials_of: int, confirmed: int, confirmed_of: int) -> str:
    if confirmed >= confirmed_of:
        return "done"
    if confirmed or tried >= trials_of > 0:
        return "confirming"
    return "tuning" if tried else "waiting"


def _said(line: Mapping[str, Any], metric: str) -> str:
    rate = "" if line["learning_rate"] is None else f" at {line['learning_rate']:.3g}"
    what = f"{metric} {line['validation']:.4f}" if "validation" in line else line["status"].replace("_", " ")
    stage = "tuning" if line["stage"] == "tune" else "confirming"
    return f"{line['arm']}, {stage}, seed {line['seed']}{rate}: {what} ({duration(line['seconds'])})"


def _is_finished(folder: Path, design: str, ledger: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the summary is of this design and of the last reading of the test split, with no run after it."""
    path, last = folder / "summary.json", ledger[-1]
    if last.get("kind") != "test_read" or not path.is_file():
        return False
    summary = json.loads(path.read_text(encoding="utf-8"))
    return bool(summary["design"] == design and summary["test_reads"] == last["number"])


def is_running(folder: Path) -> bool:
    """Whether a process is at it: it holds the lock, as far as this system tells, or the ledger grew just now."""
    try:
        inode = str((folder / ".lock").stat().st_ino)
        locks = Path("/proc/locks").read_text(encoding="utf-8").split("\n")
        if any(line.split()[5].endswith(":" + inode) for line in locks if len(line.split()) > 5):
            return True
    except OSError:
        pass
    try:
        return time.time() - (folder / "ledger.jsonl").stat().st_mtime < YOUNG
    except OSError:
        return False


# -- the page that refreshes itself ----------------------------------------------------------------


class LivePage:
    """report.html of a comparison under way, written anew as runs end. A context around the runs.

    A result that stands in the folder from before, of fewer arms or seeds, stays below the progress. A page that
    cannot be written stops no run.
    """

    def __init__(self, folder: Path, say: Callable[[Progress], None], every: float = EVERY) -> None:
        self.folder, self.say, self.every = folder, say, every
        self.began, self.written, self.wait = time.monotonic(), 0.0, 0.0
        self.at_start: int | None = None
        self.message, self.is_broken = "", False

    def __enter__(self) -> LivePage:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            self.write(runs_on=False)

    def __call__(self, event: Progress) -> None:
        """The `progress` of the runs: says the event on, and writes the page where it is time."""
        self.say(event)
        self.message = event.message.split("\n")[0]
        if time.monotonic() - self.written >= self.wait:
            self.write()

    def write(self, runs_on: bool = True) -> None:
        if self.is_broken:
            return
        start = time.monotonic()
        try:
            write_report(self.folder, self.shown(runs_on))
        except Exception as error:  # the runs are what matters
            self.is_broken = True
            self.say(Progress(f"note: the page of the progress cannot be written: {error}"))
        self.written = time.monotonic()
        self.wait = max(self.every, 20 * (self.written - start))

    def shown(self, runs_on: bool) -> dict[str, Any]:
        """What the template is given."""
        state = state_of(self.folder)
        if self.at_start is None:
            self.at_start = state["done"]
        new, left = state["done"] - self.at_start, state["of"] - state["done"]
        pace = (time.monotonic() - self.began) / new if new >= 4 else None
        return {
            **state,
            "runs_on": runs_on,
            "refresh": max(5, round(self.wait)),
            "left": "" if pace is None or not runs_on else duration(pace * left),
            "written": time.strftime("%H:%M:%S"),
            "message": self.message,
            "table": progress_table(state),
            "charts": _charts(state),
        }


def progress_table(state: Mapping[str, Any]) -> Table:
    columns = [
        Column("Arm", True),
        Column("Trials", is_minor=True),
        Column("Best on validation", falls=True),
        Column("Rate chosen", is_minor=True),
        Column("Confirmed", falls=True),
        Column("Now", True),
    ]
    rows = []
    for arm in state["arms"]:
        now = arm["status"].replace("_", " ") + (f": {arm['reason']}" if arm["reason"] else "")
        cells = [
            Cell(f"{arm['trials']} of {arm['trials_of']}", arm["trials"]),
            number(arm["best_validation"], lambda value: f"{value:.4g}"),
            number(arm["learning_rate"], lambda value: f"{value:.3g}"),
            Cell(f"{arm['confirmed']} of {arm['confirmed_of']}", arm["confirmed"]),
            Cell(now, now),
        ]
        rows.append(Row(arm["arm"], cells))
    return Table(f"Arms in the order in which they run; {state['metric']} on validation rows", columns, rows)


def _charts(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    tuned = [arm for arm in state["arms"] if arm["tried"]]
    values = [t["validation"] for arm in tuned for t in arm["tried"] if t["status"] == "ok"]
    span = (min(values, default=0.0), max(values, default=1.0))
    text = Quantity.of(state["metric"], False).text
    return [
        (arm["arm"], charts.trials(arm["tried"], arm["learning_rate"], span, arm["arm"], text))
        for arm in tuned
    ]


def columns_of(state: Mapping[str, Any]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Head and rows of the table in a terminal."""
    table = progress_table(state)
    head = [column.title.lower() for column in table.columns]
    return head, [(row.name, *(cell.text for cell in row.cells)) for row in table.rows]


def size_of(folder: Path) -> tuple[int, ...]:
    """Changes when a ledger grows or a summary is written, without reading either."""
    found = []
    for inside in comparisons_in(folder) or [""]:
        for name in ("ledger.jsonl", "summary.json"):
            try:
                found.append(os.stat(folder / inside / name).st_mtime_ns)
            except OSError:
                found.append(0)
    return tuple(found)
