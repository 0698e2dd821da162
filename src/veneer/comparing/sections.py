"""The sections of summary.json that go beyond one number: costs and fronts, calibration and stability, groups,
shifted and corrupted sets, forgetting. Each is there only where it was measured, and says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from veneer.comparing.analysis import Scores
from veneer.comparing.costs import MEASURED, TIMED
from veneer.comparing.fronts import fronts

if TYPE_CHECKING:
    from veneer.comparing.design import Comparison
    from veneer.comparing.results import Record

NO_TRAINING = ("trainable_parameters", "bytes_on_disk", "peak_memory_bytes", "step_seconds", "cpu_seconds",
               "flops_per_step")  # fmt: skip


def sections(design: Comparison, records: Sequence[Record], scores: Scores) -> dict[str, Any]:
    """What summary.json says beyond the primary metric. scores: higher is better."""
    costs = costs_section(records)
    return {"costs": costs, "fronts": fronts(scores, costs["arms"])}


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
