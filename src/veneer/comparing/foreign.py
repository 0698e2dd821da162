"""Reading results that were made elsewhere, in the forms in which people have them.

Tables with a line an item or a line a run, HF Trainer's `trainer_state.json`, `*_results.json` and saved
predictions, and the result files of PEFT's method comparison. Each becomes `Found` runs; a mistake is named by
file, line and column. What a file does not say is not guessed: a table of runs has no items.
"""

from __future__ import annotations

import glob
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.comparing.running.runs import COSTS
from veneer.errors import BadData, BadOption, UnknownName, UnknownOption, nearest

ROLES = ("arm", "seed", "item", "score", "prediction", "label", "query", "group", "confidence", *COSTS)
GSM8K_TEST = 1319
"""Test items of GSM8K (Cobbe et al., 2021), on which PEFT's benchmark of MetaMathQA tests."""

HOW = 'a line is {"arm": "lora", "seed": 1, "item": "17", "score": 1.0}; other names: --columns arm=model,score=correct'


@dataclass
class Found:
    """One run: `items` {item: {"score", "prediction", "label"}}, or one `value` for all of it."""

    arm: str
    seed: str
    place: str
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    value: float | None = None
    costs: dict[str, float] = field(default_factory=dict)
    right_or_wrong: int | None = None
    failed: str = ""
    metric: str = "score"


def read_runs(
    paths: Sequence[str | Path], columns: Mapping[str, str], metric: str | None
) -> tuple[list[Found], list[str]]:
    """The runs in all files, and what a reader must know of them.

    A path may hold `{arm}` and `{seed}`, which are then read from the names of the files that fit:
    `runs/{arm}/seed-{seed}/trainer_state.json`. A folder stands for the result files in it.
    """
    wrong = [role for role in columns if role not in ROLES]
    if wrong:
        raise UnknownOption(
            f"columns has no role '{wrong[0]}'.",
            nearest=nearest(wrong[0], ROLES),
            next_step=f"roles: {', '.join(ROLES)}",
        )
    found: list[Found] = []
    notes: dict[str, None] = {}
    for path, named in _files(paths):
        runs, said = _read_one(path, named, columns, metric)
        found += runs
        notes |= dict.fromkeys(said)
    return _merged(found), list(notes)


def _files(paths: Sequence[str | Path]) -> Iterator[tuple[Path, dict[str, str]]]:
    for given in paths:
        text = str(given)
        if re.search(r"\{\w+\}", text) or any(mark in text for mark in "*?"):
            pattern, searched = _pattern(text)
            matches = [(path, pattern.fullmatch(path)) for path in sorted(glob.glob(searched))]
            if not matches:
                raise BadData(
                    f"no file fits {text}.",
                    next_step="veneer compare --from 'runs/{arm}/seed-{seed}/scores.csv'",
                )
            yield from ((Path(path), match.groupdict()) for path, match in matches if match)
        elif Path(text).is_dir():
            inside = sorted(
                p for p in Path(text).iterdir() if p.suffix in (".json", ".jsonl", ".csv", ".parquet")
            )
            if not inside:
                raise BadData(f"{text} holds no result files.", next_step="name the files themselves")
            yield from ((path, {}) for path in inside)
        elif Path(text).is_file():
            yield Path(text), {}
        else:
            raise BadData(f"there is no file {text}.", next_step="veneer compare --from FILE, a line an item")


def _pattern(text: str) -> tuple[re.Pattern[str], str]:
    """(the expression that reads the names, the glob that finds the files) of `runs/{arm}/x.csv`."""
    names = re.findall(r"\{(\w+)\}", text)
    for name in names:
        if name not in ("arm", "seed"):
            raise BadOption(f"--from {text}: '{{{name}}}' is not known.", next_step="{arm} and {seed} are")
    expression = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+?)", re.escape(text))
    expression = expression.replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return re.compile(expression), re.sub(r"\{\w+\}", "*", text)


def _read_one(
    path: Path, named: Mapping[str, str], columns: Mapping[str, str], metric: str | None
) -> tuple[list[Found], list[str]]:
    if path.suffix == ".npz":
        try:
            return [_saved_predictions(path, named)], []
        except ValueError as error:  # pickles, which are never loaded, or no archive at all
            raise BadData(
                f"{path} is no archive of plain numpy arrays: {error}.",
                next_step="numpy.savez(path, predictions=out.predictions, label_ids=out.label_ids)",
            ) from None
    if path.suffix == ".json":
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadData(f"{path} is not JSON: {error}.", next_step=HOW) from None
        if isinstance(whole, dict) and "train_info" in whole and "run_info" in whole:
            try:
                return _of_peft(path, whole, metric)
            except (KeyError, TypeError, AttributeError) as error:
                raise BadData(
                    f"{path} looks like a result of PEFT's benchmark, but has no {error}.",
                    next_step="give the files of method_comparison/*/results",
                ) from None
        if isinstance(whole, dict) and "log_history" in whole:
            return _of_trainer(path, named, whole["log_history"], metric)
        if isinstance(whole, dict) and all(not isinstance(value, (list, dict)) for value in whole.values()):
            return _of_trainer(path, named, [whole], metric)
    return _of_table(path, named, columns), []


# -- tables --------------------------------------------------------------------------------------


def _of_table(path: Path, named: Mapping[str, str], columns: Mapping[str, str]) -> list[Found]:
    from veneer.data import read_table

    rows, problems = read_table(path)
    wrong = [f"line {problem.line}: {problem.message}" for problem in problems]
    present = {key for _, row in rows for key in row}
    for role, column in columns.items():
        if column not in present:
            raise UnknownName(
                f"{path} has no column '{column}' (for {role}).",
                nearest=nearest(column, present) or sorted(present)[:6],
                next_step="name columns as the file does",
            )
    runs: dict[tuple[str, str], Found] = {}
    whole_file_is_a_run = "arm" in named
    for at, (number, row) in enumerate(rows):
        line = {role: row.get(columns.get(role, role)) for role in ROLES} | dict(named)
        if whole_file_is_a_run and line["item"] in (None, ""):
            line["item"] = str(at)
        problem = _problem(line, columns) or _enter(runs, line, f"{path}, line {number}")
        if problem:
            wrong.append(f"line {number}: {problem}")
    if wrong or not runs:
        shown = "; ".join(wrong[:5]) or "it is empty"
        raise BadData(f"{path} cannot be analysed, {len(wrong)} bad lines ({shown}).", next_step=HOW)
    return list(runs.values())


def _problem(line: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    def column(role: str) -> str:
        return f"'{columns.get(role, role)}'"

    if line["arm"] in (None, ""):
        return f"no {column('arm')}"
    if line["score"] in (None, ""):
        if line["prediction"] is None or line["label"] is None:
            return f"no {column('score')}"
        return None
    for role in ("score", "confidence", *COSTS):
        if line[role] not in (None, "") and _number(line[role]) is None:
            return f"{column(role)} is {line[role]!r}, expected a finite number"
    return None


def _enter(runs: dict[tuple[str, str], Found], line: Mapping[str, Any], place: str) -> str | None:
    """Add a line to its run; what is wrong with it, if anything."""
    seed = "0" if line["seed"] in (None, "") else str(line["seed"])
    run = runs.setdefault((str(line["arm"]), seed), Found(str(line["arm"]), seed, place))
    run.costs |= {key: value for key in COSTS if (value := _number(line[key])) is not None}
    score = _number(line["score"])
    if line["item"] in (None, ""):
        if run.items or run.value is not None:
            return "a second line without an item for this arm and seed: a line is an item, or a whole run"
        run.value = score
        return None if score is not None else "a whole run needs a score"
    item = str(line["item"])
    if run.value is not None:
        return "an item of a run that has one score for all of it"
    if item in run.items:
        return f"item '{item}' is there twice for this arm and seed"
    if score is None:
        score = float(str(line["prediction"]).strip() == str(line["label"]).strip())
    more = {key: line[key] for key in ("prediction", "label", "query", "group") if line[key] is not None}
    if (confidence := _number(line["confidence"])) is not None:
        more["confidence"] = confidence
    run.items[item] = {"score": score, **more}
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


# -- HF Trainer ----------------------------------------------------------------------------------

PREFIXES = ("test_", "predict_", "eval_", "")
OF_NO_QUALITY = re.compile(
    r"runtime|per_second|samples|steps|epoch|^step$|flos|lr|learning_rate|grad_norm|train_"
)


def _of_trainer(
    path: Path, named: Mapping[str, str], history: Sequence[Any], metric: str | None
) -> tuple[list[Found], list[str]]:
    """The last evaluation in trainer_state.json, or the numbers of all_results.json and its like."""
    measured: dict[str, float] = {}
    for entry in history:
        for key, value in entry.items() if isinstance(entry, dict) else ():
            if isinstance(value, (int, float)) and math.isfinite(value) and not OF_NO_QUALITY.search(key):
                measured[key] = float(value)
    wanted = [prefix + metric for prefix in PREFIXES] if metric else []
    if metric is None:
        wanted = [key for key in measured if key.endswith("accuracy")]
    key = next((key for key in wanted if key in measured), None)
    if key is None:
        said = f"no '{metric}'" if metric else "no accuracy"
        raise UnknownName(
            f"{path} has {said}.",
            nearest=nearest(metric or "accuracy", measured) or sorted(measured)[:8],
            next_step="--metric NAME, as the file has it",
        )
    arm, seed = _names(path, named)
    notes = [
        f"One number a run ({key}): which items were right is not known, so that nothing is paired by item."
    ]
    if key.startswith("eval_"):
        notes.append(
            f"{key} is a score on the evaluation split, on which checkpoints and rates may have been chosen."
        )
    return [Found(arm, seed, str(path), value=measured[key], metric=key)], notes


def _saved_predictions(path: Path, named: Mapping[str, str]) -> Found:
    """`numpy.savez(path, predictions=, label_ids=)` of what `Trainer.predict` returned."""
    import numpy as np

    with np.load(path, allow_pickle=False) as saved:
        missing = [name for name in ("predictions", "label_ids") if name not in saved]
        if missing:
            raise BadData(
                f"{path} has no array '{missing[0]}'.",
                nearest=list(saved),
                next_step="numpy.savez(path, predictions=out.predictions, label_ids=out.label_ids)",
            )
        guessed, labels = saved["predictions"], saved["label_ids"]
    if len(guessed) != len(labels) or labels.ndim != 1 or guessed.ndim > 2:
        raise BadData(
            f"{path} has predictions of shape {guessed.shape} and label_ids of shape {labels.shape}: expected "
            "(items, classes) or (items,), and (items,).",
            next_step="for other tasks write a line an item: arm, seed, item, score",
        )
    if guessed.ndim == 2 and guessed.shape[1] > 1:
        guessed = guessed.argmax(1)
    guessed = guessed.reshape(-1)
    is_class = np.issubdtype(labels.dtype, np.integer)
    scores = (guessed == labels) * 1.0 if is_class else -((guessed - labels) ** 2)
    rows = zip(scores.tolist(), guessed.tolist(), labels.tolist(), strict=True)
    items = {str(at): {"score": float(s), "prediction": p, "label": y} for at, (s, p, y) in enumerate(rows)}
    arm, seed = _names(path, named)
    return Found(arm, seed, str(path), items)


def _names(path: Path, named: Mapping[str, str]) -> tuple[str, str]:
    """(arm, seed) from the pattern, else from the folder: `lora-seed-1/` or `lora/seed-1/`; seed 0 if none."""
    if "arm" in named:
        return named["arm"], named.get("seed", "0")
    folder = path.resolve().parent
    if path.suffix == ".npz" and path.stem not in ("predictions", "preds", "test"):
        folder = folder / path.stem
    match = re.fullmatch(r"(.*?)[-_.]?seed[-_=]?(\d+)", folder.name)
    if match:
        return match[1] or folder.parent.name, named.get("seed", match[2])
    return folder.name, named.get("seed", "0")


# -- PEFT's method comparison --------------------------------------------------------------------


def _of_peft(path: Path, whole: Mapping[str, Any], metric: str | None) -> tuple[list[Found], list[str]]:
    """One result file: a run, its last test metric, its costs. There is one seed and there are no items."""
    run, trained = whole["run_info"], whole["train_info"]
    found = Found(str(run["experiment_name"]), str(run.get("train_config", {}).get("seed", 0)), str(path))
    if trained.get("status") != "success":
        found.failed = f"its status is '{trained.get('status')}' {run.get('error_msg') or ''}".strip()
        return [found], []
    last: dict[str, float] = {}
    for entry in trained["metrics"]:
        last |= {key: value for key, value in entry.items() if _number(value) is not None}
    wanted = (metric or "test accuracy").replace("_", " ")
    key = next((k for k in (wanted, f"test {wanted}") if k in last), None)
    if key is None:
        raise UnknownName(
            f"{path} has no '{wanted}'.",
            nearest=nearest(wanted, last) or sorted(last),
            next_step="--metric 'test accuracy'",
        )
    found.value, found.metric = float(last[key]), key
    steps = run.get("train_config", {}).get("max_steps")
    seconds = trained.get("train_time")
    known = {
        "trainable_parameters": trained.get("num_trainable_params"),
        "bytes_on_disk": trained.get("file_size"),
        "peak_memory_bytes": trained.get("accelerator_memory_max", trained.get("cuda_memory_max")),
        "step_seconds": seconds / steps if seconds and steps else None,
        "tokens_per_second": last["train total tokens"] / seconds
        if seconds and "train total tokens" in last
        else None,
    }
    found.costs = {key: float(value) for key, value in known.items() if value is not None}
    if key == "test accuracy" and "gsm8k" in whole.get("meta_info", {}).get("dataset_info", {}):
        right = found.value * GSM8K_TEST
        found.right_or_wrong = GSM8K_TEST if abs(right - round(right)) < 1e-6 else None
    return [found], [
        "PEFT's benchmark has one number a run and one seed: how much a repeated training would differ, and which "
        "items were right, is not in its files.",
        "Its rates were chosen by those who ran it, not by an equal number of trials.",
    ]


def _merged(found: list[Found]) -> list[Found]:
    """Runs of several files under one arm and seed are an error: one would hide the other."""
    seen: dict[tuple[str, str], Found] = {}
    for run in found:
        other = seen.setdefault((run.arm, run.seed), run)
        if other is not run:
            raise BadData(
                f"arm '{run.arm}', seed {run.seed} is in {other.place} and in {run.place}.",
                next_step="name each run once; '{seed}' in the path tells runs apart",
            )
    return found
