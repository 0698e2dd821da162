"""The report: one HTML file that needs nothing else, from the content of summary.json and the trials."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from veneer.comparing import charts
from veneer.comparing.design import Forecast, duration
from veneer.comparing.limits import limits_of
from veneer.comparing.words import Scale, bytes_text, count, p_text, seconds_text

if TYPE_CHECKING:
    from veneer.comparing.results import Record

SYMBOLS = {"recommended": "◆", "tied": "●", "worse": "○"}


def render(
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[Record],
    scale: Scale,
    expected: Forecast | None,
) -> str:
    """The page as text: no file, font or script is fetched when it is opened."""
    import jinja2
    from markupsafe import Markup

    files = resources.files("veneer.comparing")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files.joinpath("report.html.j2").read_text(encoding="utf-8"))
    arms = summary["arms"]
    chosen = summary["recommendation"]["arm"]
    timed = [arm for arm in arms if arm["step_seconds"] is not None]
    scatters = [
        charts.scatter(arms, "trainable_parameters", chosen, scale, "trained parameters", count),
        charts.scatter(timed, "step_seconds", chosen, scale, "time of a training step", seconds_text),
    ]
    has_costs = any(arm["trainable_parameters"] is not None for arm in arms)
    sentence = summary["recommendation"]["sentence"].replace(" %", "\N{NO-BREAK SPACE}%")
    lead, _, rest = sentence.partition(". ")
    return template.render(
        css=Markup(files.joinpath("report.css").read_text(encoding="utf-8")),
        js=Markup(files.joinpath("report.js").read_text(encoding="utf-8")),
        title=_title(summary),
        lead=_emphasised(lead + ".", chosen),
        certainty=rest.replace(f" {summary['claim'][:1].upper()}{summary['claim'][1:]}.", "") if rest else "",
        s=summary,
        unit=scale.unit[0].upper() + scale.unit[1:],
        other_metric="" if summary["analysed"] == summary["metric"] else summary["metric"],
        facts=_facts(summary),
        arms=[_arm_row(arm, chosen, scale) for arm in arms],
        groups_say=_groups_say(summary),
        forest=Markup(charts.forest(arms, summary["groups"], chosen, scale)),
        scatters=[Markup(chart) for chart in scatters[: 1 + bool(timed)]] if has_costs else [],
        no_step=[arm["arm"] for arm in arms if arm["step_seconds"] is None] if timed else [],
        trials=[(name, Markup(chart)) for name, chart in _trials(records, summary)],
        trials_say=_trials_say(summary),
        contrasts=[_contrast_row(contrast, scale) for contrast in summary["contrasts"]],
        flip_note="" if _flips_decide(summary) else " (cannot decide)",
        contrasts_say=_contrasts_say(summary),
        costs=[_cost_row(arm, chosen, records) for arm in arms],
        costs_say="Measured while training, beside whatever else the machine did: orders of magnitude. "
        "Tuning is the time of all trials of the learning rate.",
        commands_say=_commands_say(summary),
        commands=_commands(summary, rows, records),
        limits=limits_of(summary),
        how=_how(summary, expected),
        design_json=json.dumps(summary["comparison"], indent=2, ensure_ascii=False),
    )


def _title(summary: Mapping[str, Any]) -> str:
    design = summary["comparison"]
    if summary["source"] != "veneer":
        return f"{len(summary['arms'])} arms compared on the results in {summary['source']}"
    data, base = design["data"] or "the data", design["model"] or "a model"
    return f"{len(summary['arms'])} arms compared on {data}, base {base}"


def _emphasised(text: str, name: str) -> Any:
    from markupsafe import Markup, escape

    before, found, after = text.partition(name)
    return (
        escape(before)
        + (Markup("<strong>") + escape(found) + Markup("</strong>") if found else "")
        + escape(after)
    )


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    reads = summary["test_reads"]
    facts: list[tuple[str, Any]] = [("test items", summary["items"]), ("seeds", summary["seeds"])]
    if summary["source"] == "veneer":
        facts.append(("test split read", "once" if reads == 1 else f"{reads} times"))
    facts.append(("design", summary["design"][:12]))
    return facts


def _arm_row(arm: Mapping[str, Any], chosen: str, scale: Scale) -> dict[str, Any]:
    kind = "recommended" if arm["arm"] == chosen else "tied" if arm["tied_with_best"] else "worse"
    deviation = arm["seed_deviation"]
    return {
        "arm": arm["arm"],
        "kind": kind,
        "symbol": SYMBOLS[kind],
        "mean": scale.value(arm["mean"]),
        "order": arm["mean"],
        "interval": f"{scale.value(arm['low'])} to {scale.value(arm['high'])}",
        "order_low": arm["low"],
        "metric_mean": "–" if arm["metric_mean"] is None else f"{arm['metric_mean']:.4g}",
        "metric_order": _order(arm["metric_mean"]),
        "trained": count(arm["trainable_parameters"]),
        "trained_order": _order(arm["trainable_parameters"]),
        "verdict": "tied" if arm["tied_with_best"] else "worse",
        "p": p_text(arm["p_adjusted"]),
        "p_order": arm["p_adjusted"],
        "front": f"{arm['front_probability']:.2f}",
        "spread": "–" if deviation is None else scale.size(deviation).removesuffix(" points"),
        "spread_order": _order(deviation),
    }


def _order(value: float | None) -> Any:
    return "" if value is None else value


def _groups_say(summary: Mapping[str, Any]) -> str:
    several = [group for group in summary["groups"] if len(group) > 1]
    if not several:
        return "Every arm is separable from its neighbours."
    return (
        "Points are means, lines are 95 % intervals. A bar at the right joins arms of which no pair is "
        "separable, "
        "all pairs corrected by Holm. Intervals of two arms may overlap and the arms be separable: the test "
        "uses "
        "that both saw the same items."
    )


def _trials(records: Sequence[Record], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    tuned = [record for record in records if record.trials]
    scores = [t["validation"] for record in tuned for t in record.trials if t["status"] == "ok"]
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    in_percent = summary["in_percent"] and summary["analysed"] == summary["metric"]
    text = (lambda value: f"{100 * value:.1f}") if in_percent else (lambda value: f"{value:.3g}")
    return [
        (str(r.arm), charts.trials(r.trials, r.learning_rate, (low, high), str(r.arm), text)) for r in tuned
    ]


def _trials_say(summary: Mapping[str, Any]) -> str:
    seeds = len(summary["comparison"]["tuning_seeds"])
    on = "on one seed that was" if seeds == 1 else f"means over {seeds} seeds that were"
    return (
        f"Validation {summary['metric'].replace('_', ' ')}, {on} not used again, the same number of trials "
        f"for "
        "every arm. The full point is the rate that was chosen; of equal ones the smaller. A cross is a run "
        "that "
        "diverged. All panels share one vertical axis."
    )


def _contrast_row(contrast: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    flip = contrast["sign_flip_p"]
    text = "–" if flip is None else p_text(flip)
    return {
        "name": f"{contrast['first']} − {contrast['second']}",
        "size": _signed(contrast["difference"], scale),
        "order": contrast["difference"],
        "interval": f"{_signed(contrast['low'], scale)} to {_signed(contrast['high'], scale)}",
        "p": p_text(contrast["p_adjusted"]),
        "p_order": contrast["p_adjusted"],
        "flip": text,
        "flip_order": _order(flip),
    }


def _signed(value: float, scale: Scale) -> str:
    text = f"{100 * value:+.1f}" if scale.is_share else f"{value:+.3g}"
    return text.replace("-", "−")


def _contrasts_say(summary: Mapping[str, Any]) -> str:
    how = {"holm": "Holm", "fdr_bh": "Benjamini and Hochberg"}[summary["correction"]]
    number = len(summary["contrasts"])
    text = "Intervals hold for new seeds and new items alike; "
    text += f"p-values are corrected by {how} for {number} differences."
    if not summary["contrasts_planned"]:
        text += (
            " None was planned: the arm with the highest mean was picked by looking, so these differences "
            "flatter "
            "it. The verdicts in the table above account for that."
        )
    if not _flips_decide(summary):
        text += (
            f" A sign-flip test over {summary['seeds']} seeds cannot fall below "
            f"{2.0 ** (1 - summary['seeds']):.3g} and "
            f"so cannot decide {number} differences."
        )
    return text


def _flips_decide(summary: Mapping[str, Any]) -> bool:
    return all(contrast["sign_flip_can_decide"] for contrast in summary["contrasts"])


def _cost_row(arm: Mapping[str, Any], chosen: str, records: Sequence[Record]) -> dict[str, Any]:
    record = next(record for record in records if str(record.arm) == arm["arm"])
    speed = arm["tokens_per_second"]
    tuning = record.tuning_seconds if record.trials else None
    cells = [
        (arm["trainable_parameters"], count(arm["trainable_parameters"])),
        (arm["bytes_on_disk"], bytes_text(arm["bytes_on_disk"])),
        (arm["step_seconds"], seconds_text(arm["step_seconds"])),
        (speed, count(speed)),
        (arm["peak_memory_bytes"], bytes_text(arm["peak_memory_bytes"])),
        (tuning, "–" if tuning is None else duration(tuning)),
    ]
    return {
        "arm": arm["arm"],
        "kind": "recommended" if arm["arm"] == chosen else "",
        "cells": [(_order(value), text) for value, text in cells],
    }


def _commands_say(summary: Mapping[str, Any]) -> str:
    text = "The settings of its run with the highest validation score."
    rows = summary["comparison"]["sizes"].get("train")
    if summary["claim"] and rows:
        text += (
            f" This comparison trained on the first {rows} rows alone; the commands use all that there are."
        )
    return text


def _commands(
    summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], records: Sequence[Record]
) -> list[tuple[str, str]]:
    """For each arm the command of its best run by validation; arms in the order of the table."""
    best = {str(record.arm): record.best["seed"] for record in records if record.best is not None}
    found = {
        row["arm"]: row["settings"]["command"]
        for row in rows
        if "command" in row["settings"] and row["seed"] == best.get(row["arm"])
    }
    return [(arm["arm"], found[arm["arm"]]) for arm in summary["arms"] if arm["arm"] in found]


def _how(summary: Mapping[str, Any], expected: Forecast | None) -> list[tuple[str, str]]:
    design = summary["comparison"]
    found = (
        [("Budget", summary["budget"])] if summary["source"] == "veneer" else [("Source", summary["source"])]
    )
    if design["model"]:
        found += [("Base", design["model"]), ("Data", design["data"])]
    if design["sizes"]:
        found.append(("Items", ", ".join(f"{size} {split}" for split, size in design["sizes"].items())))
    found.append(("Recommendation", summary["recommendation"]["rule"]))
    if expected is not None:
        found.append(("Said before it ran", "; ".join(line.strip() for line in str(expected).split("\n"))))
    found.append(
        (
            "Intervals",
            "items and seeds both count as samples: one draw of test items for all seeds and arms, the "
            "seeds by "
            "t with S − 1 degrees of freedom",
        )
    )
    found.append(("Design", f"SHA-256 {summary['design']}"))
    return found
