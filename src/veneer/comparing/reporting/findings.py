"""Parts of the report that are worked out for it: prices, differences, disagreements, tuning, learning, the claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.comparing.inference import tuning
from veneer.comparing.planning.halving import first_rung
from veneer.comparing.reporting import charts, curves, disagreements, fronts_tables, tables
from veneer.comparing.reporting.axes import Quantity, brief, tick_text
from veneer.comparing.reporting.filling import script_json
from veneer.comparing.reporting.published import Published
from veneer.comparing.reporting.words import bytes_text, count, p_text, seconds_text

PRICES: dict[str, tuple[str, str, Any]] = {
    "trainable_parameters": ("trained parameters", "Parameters", count),
    "peak_memory_bytes": ("memory of training", "Memory", bytes_text),
    "step_seconds": ("time of a training step", "Step", seconds_text),
    "latency_seconds": ("latency of one item", "Latency", seconds_text),
    "bytes_on_disk": ("bytes on disk", "Disk", bytes_text),
    "tuning_seconds": ("time of tuning", "Tuning", seconds_text),
}
STATIC_ITEMS = 12  # disagreements of the first pair that stand in the page itself


HALVED = (
    " Rates were halved from rung to rung, by the same rule for every arm: shown is the first rung, where every rate "
    "had the same part of the budget; the better ones were tried again on twice as much, which chose. All are in "
    "trials.jsonl."
)


def prices(page: Published, costs: Mapping[str, Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
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
        found.append({"cost": cost, "title": title, "chart": chart})
    titles = {one["cost"]: PRICES[one["cost"]][1] for one in found}
    table = (
        fronts_tables.fronts_table(page, fronts, titles)
        if found and len(set(fronts) & set(titles)) > 1
        else None
    )
    return found, table


def areas(page: Published, prices: Sequence[Mapping[str, Any]]) -> tables.Table | None:
    """The hypervolume of the front of each price that has a chart."""
    fronts = page.summary.get("fronts") or {}
    known = {cost: front["hypervolume"] for cost, front in fronts.items() if front.get("hypervolume")}
    titles = {one["cost"]: PRICES[one["cost"]][1] for one in prices}
    return fronts_tables.areas_table(page, known, titles) if known.keys() & titles.keys() else None


def contrasts_chart(page: Published) -> str:
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


def dispute(page: Published) -> dict[str, Any] | None:
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


def _tuned(page: Published) -> list[tuning.Tuned]:
    found = []
    for arm, trials in page.trials.items():
        rate = page.rate_of(arm)
        if rate is not None and any(trial["learning_rate"] == rate for trial in trials):
            found.append(tuning.tuned(arm, trials, rate, page.metric_rises))
    return found


def edges(page: Published) -> list[str]:
    return [one.arm for one in _tuned(page) if one.at_edge]


def tried(page: Published) -> dict[str, Any] | None:
    """The trials of each arm, what the best of n of them brings, and how much the rate matters."""
    found = _tuned(page)
    if not found:
        return None
    s = page.summary
    trials = {one.arm: first_rung(page.trials[one.arm]) for one in found}
    ok = [t["validation"] for of_arm in trials.values() for t in of_arm if t["status"] == "ok"]
    low, high = min(ok, default=0.0), max(ok, default=1.0)
    seeds = len(s["comparison"]["tuning_seeds"])
    metric = Quantity.of(s["metric"].replace("_", " "), page.metric_in_percent)
    return {
        "say": f"Validation {s['metric'].replace('_', ' ')}, "
        + ("on one seed that was" if seeds == 1 else f"means over {seeds} seeds that were")
        + " not used again, the same number of trials for every arm. The full point is the rate that was chosen; of "
        "equal ones the smaller. A cross is a run that diverged. All panels share one vertical axis."
        + (HALVED if s["comparison"].get("halving") else ""),
        "charts": [
            (one.arm, charts.trials(trials[one.arm], one.chosen, (low, high), one.arm, metric.text))
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


def verdict(page: Published) -> Any:
    """What the comparison says of the claim that its file names, by the rule that was fixed with it."""
    from veneer.comparing.inference.claims import decide

    claim = page.summary["comparison"].get("claim") or {}
    return decide(page.folder) if "rule" in claim else None
