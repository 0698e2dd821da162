"""Results: from the records of runs to the files of a compare folder and what `compare` returns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from veneer.comparing.inference.analysis import Analysis, Scores, analyse
from veneer.comparing.inference.cells import Cell
from veneer.comparing.inference.claims import decide
from veneer.comparing.inference.corpus import Anew, of_records
from veneer.comparing.inference.scores import RunScores
from veneer.comparing.measures.sections import sections
from veneer.comparing.planning.arms import OPTIONAL_CONTROLS
from veneer.comparing.planning.controls import judged
from veneer.comparing.planning.design import Comparison
from veneer.comparing.planning.forecast import Forecast, forecast
from veneer.comparing.publishing.lines import history_lines, line_of, rows_of, score_lines
from veneer.comparing.publishing.records import Record, scores_of
from veneer.comparing.publishing.summary import analysed, summary_of, trials_of
from veneer.comparing.reporting.disagreements import most_disputed
from veneer.comparing.reporting.items import write_items
from veneer.comparing.reporting.report import write_report
from veneer.comparing.reporting.words import Scale, table_text
from veneer.comparing.running.ledger import write_atomic

PARTS_NOTE = (
    "The metric is no mean over items: intervals and tests are of the metric itself, computed anew without each item "
    "in turn, and for each group and further set. Calibration is of single answers, as with every metric.",
)


@dataclass(frozen=True)
class CompareResult:
    """What a comparison found. `table` prints; `best` is the recommended arm, ready in `best_folder`."""

    folder: Path
    design: Comparison
    analysis: Analysis
    rows: tuple[dict[str, Any], ...]
    sentence: str
    test_reads: int
    best_folder: Path | None

    @property
    def best(self) -> str:
        return self.analysis.recommended

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def table(self) -> str:
        return table_text(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The content of summary.json."""
        return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))

    def __str__(self) -> str:
        return f"{self.sentence}\n\n{self.table}\n\nreport: {self.report}"


def publish(
    folder: Path,
    design: Comparison,
    expected: Forecast | None,
    records: Sequence[Record],
    reads: int,
    source: str,
    scores_rise: bool = True,
    show: Callable[[Sequence[str]], Mapping[str, dict[str, Any]]] | None = None,
    scores: Scores | None = None,
    notes: Sequence[str] = (),
) -> CompareResult:
    """Analyse the records and write scores.jsonl, results.jsonl, history.jsonl, summary.json, best/, items.jsonl
    and report.html. show: the texts or pictures of test items (see `items.described`).

    scores_rise: item scores are better where they are higher, as a trainer's always are, whatever its metric.
    scores: where they are not item scores. notes: what a reader must know of the source.
    """
    from veneer.comparing.reporting.words import conclusion
    from veneer.tasks import find_metric

    of_items = scores_of(records) if scores is None else scores
    corpus = None if isinstance(of_items, RunScores) else of_records(design.metric, records, of_items)
    scores = of_items if corpus is None else corpus
    rise = scores_rise if corpus is None else find_metric(design.metric).greater_is_better
    sign = 1.0 if rise else -1.0
    oriented = scores if rise else scores.turned()
    costs = {str(record.arm): record.costs for record in records}
    # A control is never recommended: it has no price.
    prices = {str(r.arm): r.costs for r in records if r.arm.method not in OPTIONAL_CONTROLS}
    analysis = analyse(oriented, prices, design.contrasts, design.correction)
    rows = tuple(row for record in records for row in rows_of(record, design, scores))
    shown = scores.of.values() if corpus is None else [of.mean(1) for of in scores.of.values()]
    scale = Scale.of(analysed(design, rows), sign, shown)
    sentence = conclusion(analysis, scale, costs, design.is_demo)
    summary = summary_of(design, analysis, scale, records, rows, costs, sentence, reads, source)
    made_here = source == "veneer"  # names from elsewhere are no arms
    summary["controls"] = judged(oriented, [arm.arm for arm in analysis.arms]) if made_here else []
    summary |= {"notes": [*notes, *(PARTS_NOTE if corpus is not None else ())]}
    risen = of_items if scores_rise else of_items.turned()
    anew = None if corpus is None else Anew(design.metric)
    summary |= sections(design, records, oriented, risen, scores_of, scores_rise, anew)
    if expected is not None:  # without the time, which depends on what has ended
        summary["forecast"] = str(forecast(design, design.sizes))
    write_atomic(folder / "trials.jsonl", "".join(line_of(trial) for trial in trials_of(records)))
    if "rule" in design.claim:
        summary["claims"] = [decide(Cell(folder, summary, oriented)).to_dict()]
    write_atomic(folder / "results.jsonl", "".join(line_of(row) for row in rows))
    write_atomic(
        folder / "scores.jsonl", "".join(line_of(line) for line in score_lines(records, of_items, corpus))
    )
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    best_folder = _publish_best(folder, records, analysis, summary) if source == "veneer" else None
    result = CompareResult(folder, design, analysis, rows, sentence, reads, best_folder)
    histories = [line for record in records for line in history_lines(record)]
    write_atomic(folder / "history.jsonl", "".join(line_of(line) for line in histories))
    if isinstance(scores, RunScores):  # there are no items to show
        write_report(folder)
        return result
    disputed = most_disputed(np.stack([of.mean(0) for of in of_items.of.values()]))
    opened = (one for record in records for one in record.opened)
    write_items(folder, [of_items.items[place] for place in disputed], opened, show)
    write_report(folder)
    return result


def _publish_best(
    folder: Path, records: Sequence[Record], analysis: Analysis, summary: Mapping[str, Any]
) -> Path:
    """`best/`: the winner's folder, replaced as a whole; its comparison.json says where it comes from."""
    record = next(record for record in records if str(record.arm) == analysis.recommended)
    source = None
    if record.best is not None and record.best.get("folder"):
        source = folder / record.best["folder"]
    best, fresh = folder / "best", folder / ".best.new"
    shutil.rmtree(fresh, ignore_errors=True)
    if source is not None and source.is_dir():
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns(".lock", "run.json", "checkpoint*"))
    else:
        fresh.mkdir(parents=True)
    note = {"design": summary["design"], "claim": summary["claim"], **summary["recommendation"]}
    write_atomic(fresh / "comparison.json", json.dumps(note, indent=2) + "\n")
    shutil.rmtree(best, ignore_errors=True)
    fresh.rename(best)
    return best
