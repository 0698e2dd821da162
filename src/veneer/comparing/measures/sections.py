"""The sections of summary.json that go beyond one number: costs and fronts, calibration and stability, groups,
shifted and corrupted sets, forgetting. Each is there only where it was measured, and says how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from veneer.comparing.inference.analysis import Scores
from veneer.comparing.inference.corpus import Anew
from veneer.comparing.measures.calibration import calibration, over_seeds, stability
from veneer.comparing.measures.costs import MEASURED, REPLACED, TIMED, busy
from veneer.comparing.measures.fronts import fronts
from veneer.comparing.measures.groups import SMALL, by_group, turned_back
from veneer.comparing.reporting.robustness import corrupted, forgotten, mean_of_sets, shifted

if TYPE_CHECKING:
    from veneer.comparing.planning.design import Comparison
    from veneer.comparing.publishing.records import Record

BUSY_NOTE = (
    "the machine was busy with other programs: steps took {:.1f} times as long by the clock as on the processor, so "
    "that the seconds of the processor are the fairer comparison"
)
NOT_BY_GROUP = "{} is no mean over items, and cannot be computed for each group of '{}' from what was kept"
NOT_ON_SET = "{} is no mean over items, and cannot be computed on this set from what was kept"
NO_TRAINING = ("trainable_parameters", "bytes_on_disk", "peak_memory_bytes", "step_seconds", "cpu_seconds",
               "flops_per_step")  # fmt: skip


def sections(
    design: Comparison,
    records: Sequence[Record],
    primary: Scores,
    scores: Scores,
    scores_of: Callable[[Sequence[Record]], Scores],
    scores_rise: bool = True,
    anew: Anew | None = None,
) -> dict[str, Any]:
    """What summary.json says beyond the primary metric.

    primary: scores of the primary metric, scores: of the items; higher is better in both. scores_of: reads item
    scores off records. scores_rise: False where the items' own scores were turned to make higher better. anew: the
    primary metric where it is no mean of item scores, so that it is computed for each group and set.
    """
    costs = costs_section(records)
    measured = [record for record in records if str(record.arm) in scores.of]
    # A control is no choice, so that it drives nobody off a front: one has no trials of its own, for instance.
    priced = {str(r.arm): costs["arms"][str(r.arm)] for r in measured if r.arm.anchor == r.arm}
    found: dict[str, Any] = {"costs": costs, "fronts": fronts(primary, priced)}
    found["stability"] = {str(record.arm): _stability(record, primary) for record in measured}
    with_items = [record for record in measured if all(run is None or run["items"] for run in record.opened)]
    calibrated = {str(record.arm): calibration(record.opened, record.arm.is_trained) for record in with_items}
    if any(calibrated.values()):
        found["calibration"] = {arm: one for arm, one in calibrated.items() if one}
    groups = _groups(measured, scores)
    if groups:
        column = str(design.beyond.get("groups", "group"))
        known = (scores, groups) if anew is None else anew.by_group(measured, scores, groups)
        shown = {} if known is None else {arm: by_group(of, known[1]) for arm, of in known[0].of.items()}
        arms = shown if scores_rise else {arm: turned_back(of) for arm, of in shown.items()}
        found["by_group"] = {"column": column, "small_below": SMALL, "arms": arms}
        if known is None:
            found["by_group"]["not_applicable"] = NOT_BY_GROUP.format(design.metric, column)
    return found | _further(design, records, scores if anew is None else primary, scores, scores_of, anew)


def _stability(record: Record, scores: Scores) -> dict[str, Any]:
    """Deviation over seeds, and how much better the arm is on rows that it learned from, on validation's metric."""
    is_drawn = record.arm.is_trained
    found: dict[str, Any] = {}
    if is_drawn:
        found |= stability(scores.of[str(record.arm)].mean(1))
    gaps = [line["train"] - line["validation"] for line in record.lines if line.get("train") is not None]
    return found | {"train_validation_gap": over_seeds(gaps if is_drawn else gaps[:1])}


def _groups(records: Sequence[Record], scores: Scores) -> list[str]:
    """The group of each item, in the order of `scores.items`; empty where items have none."""
    for run in (run for record in records for run in record.opened if run):
        of = {item["item"]: str(item["group"]) for item in run["items"] if item.get("group") is not None}
        if len(of) == len(scores.items):
            return [of[item] for item in scores.items]
    return []


def _further(
    design: Comparison,
    records: Sequence[Record],
    primary: Scores,
    scores: Scores,
    scores_of: Callable[[Sequence[Record]], Scores],
    anew: Anew | None,
) -> dict[str, Any]:
    """{"shifted", "corrupted", "forgetting"}: {set: what the design says of it, with "arms"}."""
    found: dict[str, Any] = {}
    spoiled: list[Scores] = []
    clean = primary
    for name, about in design.beyond.get("sets", {}).items():
        of_kind = found.setdefault(about["kind"], {})
        of_kind[name] = dict(about)
        if about.get("not_applicable"):
            continue
        inside = [one for record in records if record.opened and (one := _with_set(record, name)) is not None]
        of_kind[name]["not_measured"] = sorted(
            {str(record.arm) for record in records if record.opened} - {str(record.arm) for record in inside}
        )
        if about["kind"] == "forgetting":
            ended = [one for record in inside if (one := _without_diverged(record)) is not None]
            opened = {str(record.arm): record.opened for record in ended}
            of_kind[name]["arms"] = forgotten(scores_of(ended), opened, about["measure"]) if ended else {}
            continue
        of_items = scores_of(inside)
        of_set = of_items if anew is None else anew.of(inside, of_items, is_whole=True)
        if about["kind"] == "corrupted" and anew is not None:  # of some test rows, perhaps
            clean = anew.of(records, scores.only(of_items.items)) or primary
        if of_set is None:
            of_kind[name]["not_applicable"] = NOT_ON_SET.format(design.metric)
            continue
        is_shifted = about["kind"] == "shifted"
        of_kind[name]["arms"] = shifted(primary, of_set) if is_shifted else corrupted(clean, of_set)
        spoiled += [] if is_shifted else [of_set]
    together = mean_of_sets(spoiled)
    if together is not None and len(spoiled) > 1:
        arms = corrupted(clean, together)
        found["corrupted"]["all"] = {"kind": "corrupted", "name": "mean of all", "arms": arms}
    return found


def _with_set(record: Record, name: str) -> Record | None:
    """The record as if the set were its test split; None where a run was not scored on it."""
    if any(run is not None and name not in run.get("further", {}) for run in record.opened):
        return None
    return replace(record, opened=[run and run["further"][name] for run in record.opened])


def _without_diverged(record: Record) -> Record | None:
    """Less the runs that diverged: the chance score that stands for them on a test set is no memory of the base."""
    kept = [place for place, run in enumerate(record.opened) if run is not None]
    if not kept:
        return None
    return replace(record, lines=[record.lines[p] for p in kept], opened=[record.opened[p] for p in kept])


def costs_section(records: Sequence[Record]) -> dict[str, Any]:
    """{"measured", "how", "machine", "arms": {arm: costs}}.

    Timed costs are medians, with `_low` and `_high` for their quartiles and `turns_of` for each turn.
    """
    arms = {str(record.arm): _costs_of(record) for record in records if record.lines}
    base = next((found["latency_seconds"] for found in arms.values() if found["is_base"]), None)
    merges = set() if base is None else _merging()
    for record in records:
        found = arms.get(str(record.arm))
        if found is not None and found["latency_seconds"] is not None:
            is_merged = base is not None and record.arm.method in merges
            found["merged_latency_seconds"] = base if is_merged else found["latency_seconds"]
    known = [record.measured for record in records if record.measured.get("status") == "measured"]
    return {
        "measured": bool(known),
        "how": "each arm alone in a process, one thread, turns that alternate over the arms: median and quartiles"
        if known
        else "by the training workers, one after the other: medians over seeds",
        "note": BUSY_NOTE.format(ratio) if (ratio := busy(known)) else "",
        "machine": next((one["machine"] for one in known if one.get("machine")), None),
        "arms": arms,
    }


def _costs_of(record: Record) -> dict[str, Any]:
    measured = record.measured
    found: dict[str, Any] = dict.fromkeys((*MEASURED, *TIMED)) | record.costs
    is_measured = measured.get("status") == "measured"
    if is_measured:
        for key in TIMED:
            found |= {name: measured.get(name) for name in (key, f"{key}_low", f"{key}_high")}
        found |= {key: measured.get(key) for key in MEASURED if key != "trainable_parameters"}
        turns = {key: [turn.get(key) for turn in measured["each_turn"]] for key in TIMED}
        found["turns_of"] = {key: of for key, of in turns.items() if None not in of}
    elif measured:  # what a worker said of time and memory does not go beside what was measured apart
        found |= dict.fromkeys(REPLACED)
    if not record.arm.is_trained:
        found |= {key: found.get(key) or 0 for key in NO_TRAINING}
    return found | {
        "status": measured.get("status", "not_measured"),
        "reason": measured.get("reason", ""),
        "turns": measured.get("turns", 0),
        "is_base": not record.arm.is_trained,
        "tuning_seconds": round(record.tuning_seconds, 3),
        "tuning_runs": len(record.trials),
        "run_seconds": sum(line.get("seconds") or 0.0 for line in record.lines)
        if record.arm.is_trained
        else 0.0,
    }


def _merging() -> set[str]:
    """Methods after whose merging the model is the base again in shape and speed, or that edit nothing."""
    import veneer.methods  # noqa: F401  registers them
    from veneer.catalogue import merges
    from veneer.edits import registry

    return {key for key, cls in registry().items() if merges(cls) or not cls.ports}
