"""Sentences of the report: its title, what its sections say, how to do it again and how it was done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.comparing.reporting.published import Published
from veneer.comparing.reporting.words import bytes_text


def title_of(summary: Mapping[str, Any]) -> str:
    design = summary["comparison"]
    if summary["source"] != "veneer":
        return f"{len(summary['arms'])} arms compared on the results in {summary['source']}"
    data, base = design["data"] or "the data", design["model"] or "a model"
    return f"{len(summary['arms'])} arms compared on {data}, base {base}"


def facts(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    reads = summary["test_reads"]
    items = summary["items"] or "not known"
    facts: list[tuple[str, Any]] = [("test items", items), ("seeds", summary["seeds"])]
    if summary["source"] == "veneer":
        facts.append(("test split read", "once" if reads == 1 else f"{reads} times"))
    facts.append(("design", summary["design"][:12]))
    return facts


def groups_say(summary: Mapping[str, Any]) -> str:
    if not any(len(group) > 1 for group in summary["groups"]):
        return "Every arm is separable from its neighbours."
    return (
        "Points are means, lines are 95 % intervals. A bar at the right joins arms of which no pair is separable, "
        "all pairs corrected by Holm. Intervals of two arms may overlap and the arms be separable: the test uses "
        f"that both {'saw the same items' if summary['items'] else 'have the same seeds, where they do'}."
    )


def without_step(page: Published, costs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [arm["arm"] for arm in page.arms if costs[arm["arm"]].get("step_seconds") is None]


def costs_say(page: Published) -> str:
    apart = page.summary.get("costs") or {}
    if apart.get("measured"):
        note = f" {apart['note']}" if apart.get("note") else ""
        return f"Measured: {apart['how']}. Tuning is the time of all trials of the learning rate.{note}"
    if not page.made_here:
        return f"As {page.summary['source']} has them."
    return (
        "Measured while training, beside whatever else the machine did: orders of magnitude. Tuning is the time of "
        "all trials of the learning rate."
    )


def contrasts_say(summary: Mapping[str, Any]) -> str:
    how = {"holm": "Holm", "fdr_bh": "Benjamini and Hochberg"}[summary["correction"]]
    number = len(summary["contrasts"])
    text = "Intervals hold for new seeds and new items alike; "
    if not summary["items"]:
        text = "Intervals are of one number a run (see the notes below); "
    text += f"p-values are corrected by {how} for {number} differences."
    if not summary["contrasts_planned"]:
        text += (
            " None was planned: the arm with the best mean was picked by looking, so these differences flatter "
            "it. The verdicts in the table of arms account for that."
        )
    if not all(contrast["sign_flip_can_decide"] for contrast in summary["contrasts"]):
        text += (
            f" A sign-flip test over {summary['seeds']} seeds cannot fall below "
            f"{2.0 ** (1 - summary['seeds']):.3g} and so cannot decide {number} differences."
        )
    return text


def commands_say(summary: Mapping[str, Any]) -> str:
    text = "The settings of its run with the highest validation score."
    rows = summary["comparison"]["sizes"].get("train")
    if summary["claim"] and rows:
        text += (
            f" This comparison trained on the first {rows} rows alone; the commands use all that there are."
        )
    return text


def commands(page: Published) -> list[tuple[str, str]]:
    """For each arm the command of its best run by validation; arms in the order of the table."""
    sign = 1 if page.metric_rises else -1
    found: dict[str, Mapping[str, Any]] = {}
    for row in page.rows:
        if "command" not in row["settings"] or row["status"] != "ok" or row.get("validation") is None:
            continue
        best = found.get(row["arm"])
        if best is None or sign * row["validation"] > sign * best["validation"]:
            found[row["arm"]] = row
    return [
        (arm["arm"], found[arm["arm"]]["settings"]["command"]) for arm in page.arms if arm["arm"] in found
    ]


def how(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    design = summary["comparison"]
    found = (
        [("Budget", summary["budget"])] if summary["source"] == "veneer" else [("Source", summary["source"])]
    )
    if design["model"]:
        found += [("Base", design["model"]), ("Data", design["data"])]
    if design["sizes"]:
        found.append(("Items", ", ".join(f"{size} {split}" for split, size in design["sizes"].items())))
    near = design.get("near_duplicates") or {}
    if near.get("train") is not None:
        found.append(("Copies", _copies(near)))
    for arm, one in (design.get("matched") or {}).items():
        found.append((f"Size of {arm}", str(one.get("said", ""))))
    found.append(("Recommendation", summary["recommendation"]["rule"]))
    if summary.get("forecast"):
        found.append(
            ("Said before it ran", "; ".join(line.strip() for line in summary["forecast"].split("\n")))
        )
    machine = (summary.get("costs") or {}).get("machine")
    if isinstance(machine, Mapping):
        found.append(("Machine", _machine_text(machine)))
    if not summary["items"]:
        return [*found, ("Design", f"SHA-256 {summary['design']}")]
    found.append(
        (
            "Intervals",
            "items and seeds both count as samples: one draw of test items for all seeds and arms, the seeds by "
            "t with S − 1 degrees of freedom",
        )
    )
    found.append(("Design", f"SHA-256 {summary['design']}"))
    return found


def _copies(near: Mapping[str, Any]) -> str:
    """Training rows that copy held-out ones."""
    what = f"{near['train']} training rows left out that copy held-out ones"
    return f"{what}, by an overlap of {near['threshold']:g}" if near.get("threshold") is not None else what


def _machine_text(machine: Mapping[str, Any]) -> str:
    """The device and what stands around it, in a line."""
    known = {**machine, "cores": f"{machine['cores']} cores" if machine.get("cores") else None}
    known["memory_bytes"] = bytes_text(machine["memory_bytes"]) if machine.get("memory_bytes") else None
    known["python"] = known["torch"] = None
    if machine.get("torch"):
        known["torch"] = f"torch {machine['torch']}"
    return ", ".join(str(value) for value in known.values() if value)
