"""The report: one HTML file that needs nothing else, made from the files of a compare folder alone.

It is complete without its script, which adds sorting, filtering, tooltips, and the choice of axes and of two
arms. What comes from outside (names, texts, reasons) is text: escaped by the template, or read as JSON and set
as text by the script. A content security policy allows this page's own style and script, by their digests, and
pictures that stand in the page; nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from veneer.comparing import beyond, charts, curves, disagreements, learning, tables, tuning
from veneer.comparing.axes import Quantity, brief, tick_text
from veneer.comparing.ledger import write_atomic
from veneer.comparing.limits import limits_of
from veneer.comparing.published import Published
from veneer.comparing.words import bytes_text, count, p_text, seconds_text
from veneer.errors import BadData

PRICES: dict[str, tuple[str, str, Any]] = {
    "trainable_parameters": ("trained parameters", "Parameters", count),
    "peak_memory_bytes": ("memory of training", "Memory", bytes_text),
    "step_seconds": ("time of a training step", "Step", seconds_text),
    "latency_seconds": ("latency of one item", "Latency", seconds_text),
    "bytes_on_disk": ("bytes on disk", "Disk", bytes_text),
    "tuning_seconds": ("time of tuning", "Tuning", seconds_text),
}
STATIC_ITEMS = 12  # disagreements of the first pair that stand in the page itself


def write_report(folder: str | Path, live: Mapping[str, Any] | None = None) -> Path:
    """Write report.html into a compare folder, from its other files. Returns its path.

    live: what `live.state_of` says of runs that are under way; the page then refreshes itself. A folder that
    has no summary.json yet gets a page of its runs alone.
    """
    path = Path(folder) / "report.html"
    has_result = (Path(folder) / "summary.json").is_file()
    page = Published.read(folder) if has_result else None
    write_atomic(path, render(page, live))
    return path


def write_again(folder: str | Path) -> Path:
    """report.html of a finished comparison, made anew from its files: after an update, or when it was lost."""
    if not (Path(folder) / "summary.json").is_file():
        raise BadData(
            f"{folder} has no summary.json, from which a report is made.",
            next_step="veneer compare --watch FOLDER, where the comparison has not ended yet",
        )
    return write_report(folder)


def render(page: Published | None, live: Mapping[str, Any] | None = None) -> str:
    """The page as text: no file, font or script is fetched when it is opened."""
    given = {} if page is None else content(page)
    return fill("report.html.j2", page=page, live=live, **given)


def fill(template: str, **given: Any) -> str:
    """A template of the page, with its style, script and policy."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(part), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["breakable"] = _breakable
    css, js = part("report.css"), part("report.js")
    policy = (
        f"default-src 'none'; script-src {digest(js)}; style-src {digest(css)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(template).render(
        css=Markup(css), js=Markup(js), policy=Markup(policy), chart=Markup, **given
    )


def part(name: str) -> str:
    """A template, style sheet or script of the page."""
    return (resources.files("veneer.comparing") / "page" / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _breakable(name: str) -> Any:
    """A name that a line may break behind its punctuation."""
    from markupsafe import Markup, escape

    found = escape(name)
    for mark in "_:,+=":
        found = found.replace(mark, Markup(mark + "<wbr>"))
    return found


def content(page: Published) -> dict[str, Any]:
    """What the template is given: text, tables and charts."""
    s = page.summary
    costs = tables.costs_of(page)
    prices, fronts = _prices(page, costs)
    sentence = re.sub(r" (?=%)|(?<=\d) (?=\d{3}\b)", "\N{NO-BREAK SPACE}", s["recommendation"]["sentence"])
    lead, _, rest = sentence.partition(". ")
    return {
        "s": s,
        "title": title_of(s),
        "lead": _parted(lead + ".", page.chosen),
        "certainty": rest.replace(f" {s['claim'][:1].upper()}{s['claim'][1:]}.", "") if rest else "",
        "facts": _facts(s),
        "arms": tables.arms_table(page),
        "misbehaved": [one for one in s.get("controls") or [] if one["behaved"] is False],
        "controls": tables.controls_table(page),
        "verdict": _verdict(page),
        "groups_say": _groups_say(s),
        "forest": charts.forest(page.arms, s["groups"], page.chosen, page.scale),
        "prices": prices,
        "fronts": fronts,
        "no_step": _without_step(page, costs) if any(p["cost"] == "step_seconds" for p in prices) else [],
        "contrasts": tables.contrasts_table(page),
        "contrasts_chart": _contrasts_chart(page),
        "contrasts_say": _contrasts_say(s),
        "dispute": _dispute(page),
        "beyond": beyond.parts(page),
        "missing": beyond.missing(page),
        "tuning": _tuning(page),
        "learning": _learning(page, costs),
        "costs": tables.costs_tables(page, costs),
        "costs_say": _costs_say(page),
        "commands_say": _commands_say(s),
        "commands": _commands(page),
        "limits": [*(s.get("notes") or []), *limits_of(s, _edges(page))],
        "how": _how(s),
        "design_json": json.dumps(s["comparison"], indent=2, ensure_ascii=False),
    }


def title_of(summary: Mapping[str, Any]) -> str:
    design = summary["comparison"]
    if summary["source"] != "veneer":
        return f"{len(summary['arms'])} arms compared on the results in {summary['source']}"
    data, base = design["data"] or "the data", design["model"] or "a model"
    return f"{len(summary['arms'])} arms compared on {data}, base {base}"


def _parted(text: str, name: str) -> tuple[str, str, str]:
    """The text before, within and after the first `name`, for the page to emphasise it."""
    return text.partition(name)


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    reads = summary["test_reads"]
    items = summary["items"] or "not known"
    facts: list[tuple[str, Any]] = [("test items", items), ("seeds", summary["seeds"])]
    if summary["source"] == "veneer":
        facts.append(("test split read", "once" if reads == 1 else f"{reads} times"))
    facts.append(("design", summary["design"][:12]))
    return facts


def _groups_say(summary: Mapping[str, Any]) -> str:
    if not any(len(group) > 1 for group in summary["groups"]):
        return "Every arm is separable from its neighbours."
    return (
        "Points are means, lines are 95 % intervals. A bar at the right joins arms of which no pair is separable, "
        "all pairs corrected by Holm. Intervals of two arms may overlap and the arms be separable: the test uses "
        f"that both {'saw the same items' if summary['items'] else 'have the same seeds, where they do'}."
    )


# -- quality and its price -------------------------------------------------------------------------


def _prices(page: Published, costs: Mapping[str, Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
    """A chart for each price that is known of at least two arms, and the table of fronts."""
    known = page.summary.get("fronts") or {}
    fronts = {cost: found["probability"] for cost, found in known.items()}
    fronts.setdefault("trainable_parameters", {arm["arm"]: arm["front_probability"] for arm in page.arms})
    arms = [{**arm, **costs[arm["arm"]]} for arm in page.arms]
    found: list[dict[str, Any]] = []
    for cost, (title, _, text) in PRICES.items():
        paid = [arm for arm in arms if arm.get(cost) is not None]
        if len({arm[cost] for arm in paid}) < 2:
            continue
        chart = charts.scatter(paid, cost, page.chosen, page.scale, title, text, fronts.get(cost))
        found.append({"cost": cost, "title": title, "chart": chart, "is_first": len(found) < 4})
    titles = {one["cost"]: PRICES[one["cost"]][1] for one in found}
    table = (
        tables.fronts_table(page, fronts, titles) if found and len(set(fronts) & set(titles)) > 1 else None
    )
    return found, table


def _without_step(page: Published, costs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [arm["arm"] for arm in page.arms if costs[arm["arm"]].get("step_seconds") is None]


def _costs_say(page: Published) -> str:
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


# -- differences -----------------------------------------------------------------------------------


def _contrasts_say(summary: Mapping[str, Any]) -> str:
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


def _contrasts_chart(page: Published) -> str:
    rows = []
    scale = page.scale
    for one in page.summary["contrasts"]:
        size, low, high = (tables.signed(one[key], scale) for key in ("difference", "low", "high"))
        title = f"{one['first']} − {one['second']}: {size} ({low} to {high}), p {p_text(one['p_adjusted'])}"
        kind = "worse" if one["separable"] else "tied"
        name = f"{one['first']} − {one['second']}" if page.summary["contrasts_planned"] else one["second"]
        rows.append((name, kind, one["difference"], one["low"], one["high"], title))
    unit = "points" if scale.is_share else scale.unit
    if rows and not page.summary["contrasts_planned"]:
        unit = f"{brief([page.summary['recommendation']['best_mean']]).popitem()[1]} less each arm, {unit}"
    return charts.differences(rows, unit, tick_text(scale)) if rows else ""


def _dispute(page: Published) -> dict[str, Any] | None:
    """Items on which arms differ: all of it as JSON for the script, and the first pair as rows."""
    names = [arm["arm"] for arm in page.arms]
    data = disagreements.embedded(page.folder / "scores.jsonl", names, page.items, page.scale.sign)
    if data is None:
        return None
    first, second = disagreements.first_pair(page.summary, data["arms"])
    places = data["arms"].index(first), data["arms"].index(second)
    pair = data["pairs"][",".join(map(str, sorted(places)))]
    return {
        "json": script_json({**data, "first": list(places)}),
        "first": first,
        "second": second,
        "counts": pair if places[0] < places[1] else pair[::-1],
        "rows": disagreements.of_pair(data, first, second, STATIC_ITEMS),
        "places": places,
        "said": data["said"],
        "seeds": data["seeds"],
        "binary": data["binary"],
        "all": data["all"],
        "left_out": data["all"] - len(data["items"]),
        "arms_left_out": len(names) - len(data["arms"]),
        "has_texts": any("t" in item or "g" in item for item in data["items"]),
    }


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: no character there can end it or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


# -- tuning and learning ---------------------------------------------------------------------------


def _tuned(page: Published) -> list[tuning.Tuned]:
    found = []
    for arm, trials in page.trials.items():
        rate = page.rate_of(arm)
        if rate is not None and any(trial["learning_rate"] == rate for trial in trials):
            found.append(tuning.tuned(arm, trials, rate, page.metric_rises))
    return found


def _edges(page: Published) -> list[str]:
    return [one.arm for one in _tuned(page) if one.at_edge]


def _tuning(page: Published) -> dict[str, Any] | None:
    """The trials of each arm, what the best of n of them brings, and how much the rate matters."""
    found = _tuned(page)
    if not found:
        return None
    s = page.summary
    ok = [t["validation"] for one in found for t in page.trials[one.arm] if t["status"] == "ok"]
    low, high = min(ok, default=0.0), max(ok, default=1.0)
    seeds = len(s["comparison"]["tuning_seeds"])
    metric = Quantity.of(s["metric"].replace("_", " "), page.metric_in_percent)
    return {
        "say": f"Validation {s['metric'].replace('_', ' ')}, "
        + ("on one seed that was" if seeds == 1 else f"means over {seeds} seeds that were")
        + " not used again, the same number of trials for every arm. The full point is the rate that was chosen; of "
        "equal ones the smaller. A cross is a run that diverged. All panels share one vertical axis.",
        "charts": [
            (one.arm, charts.trials(page.trials[one.arm], one.chosen, (low, high), one.arm, metric.text))
            for one in found
        ],
        "table": tables.sensitivity_table(page, found, metric.text),
        "best_of": _best_of(page, found, metric),
    }


def _best_of(page: Published, found: Sequence[tuning.Tuned], metric: Quantity) -> str | None:
    worst = next((row.get("validation") for row in page.rows if row["arm"] == "untrained"), None)
    lines = {}
    for one in found:
        values = tuning.scores_for_best_of(page.trials[one.arm], worst)
        if values:
            best = tuning.expected_best(values, page.metric_rises)
            lines[one.arm] = [(float(n), value) for n, value in enumerate(best, start=1)]
    if not lines or max(map(len, lines.values())) < 2:
        return None
    return curves.lines(
        lines, {arm: tables.kind_of(page, arm) for arm in lines},
        Quantity("trials of the learning rate", lambda value: f"{value:g}"), metric,
        f"Expected best {metric.title} of n trials, for {len(lines)} arms, on validation rows.",
        upwards=page.metric_rises, whole=True,
    )  # fmt: skip


def _learning(page: Published, costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Loss against steps and against seconds, and when each arm reached what all tied arms reach."""
    if not page.histories:
        return None
    return learning.section(page, costs)


# -- again, limits, how ----------------------------------------------------------------------------


def _commands_say(summary: Mapping[str, Any]) -> str:
    text = "The settings of its run with the highest validation score."
    rows = summary["comparison"]["sizes"].get("train")
    if summary["claim"] and rows:
        text += (
            f" This comparison trained on the first {rows} rows alone; the commands use all that there are."
        )
    return text


def _commands(page: Published) -> list[tuple[str, str]]:
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


def _verdict(page: Published) -> Any:
    """What the comparison says of the claim that its file names, by the rule that was fixed with it."""
    from veneer.comparing.claims import decide

    claim = page.summary["comparison"].get("claim") or {}
    return decide(page.folder) if "rule" in claim else None


def _how(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
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
