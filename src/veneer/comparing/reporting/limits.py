"""What a design cannot say, from the design itself: what a reader who distrusts it looks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.comparing.reporting.words import Scale

HALVED = (
    "a rate was judged by a part of the budget first, so that one that is slow to start and best at the end may have "
    "been left behind; "
)


def limits_of(summary: Mapping[str, Any], at_edge: Sequence[str] = ()) -> list[str]:
    """Sentences, the weightiest first. at_edge: arms whose chosen rate is the smallest or largest tried."""
    found = [_of_power(summary), *summary.get("notes", [])]
    if summary["claim"]:
        found.insert(
            0,
            "It is a demonstration: little data, few passes, few trials. It shows how a comparison works; its order "
            "of methods is a screen and no claim.",
        )
    if summary["items_only"]:
        found.append(
            "There is one seed, so that the intervals are for new items only. How much a repeated training would "
            "differ is unknown, and is often as much as the methods do."
        )
    found.append(
        "It is one data set and one base. Another task, language, length of text or size of base may order the "
        "methods differently."
    )
    found += _of_tuning(summary, at_edge) + _exceptions(summary)
    if summary["analysed"] != summary["metric"]:
        metric = summary["metric"]
        found.append(
            f"{metric} is not a mean over items. The intervals and tests are of the mean item score; {metric} is shown "
            "without an interval."
        )
    return [*found, _of_costs(summary)]


def _of_power(summary: Mapping[str, Any]) -> str:
    scale = Scale(summary["analysed"], 1.0, summary["in_percent"])
    smallest = summary["smallest_effect_found"]
    missed = f"More than one time in five it misses {scale.missed(smallest)}"
    if smallest <= 1e-9:
        missed = "The closest arms gave the same scores, so that nothing is known of what it misses"
    matters = scale.size(summary["smallest_effect_of_interest"])
    named = f"{matters} was named as the smallest that matters"
    return f"That two arms are tied does not make them equal. {missed}; {named}."


def _of_tuning(summary: Mapping[str, Any], at_edge: Sequence[str]) -> list[str]:
    design = summary["comparison"]
    if summary["source"] != "veneer":
        return [
            "How the arms were tuned, and whether the test items had any part in it, does not stand in the file that "
            "was read."
        ]
    trials = max((len(rates) for rates in design["rates"].values()), default=0)
    extended = " and an extension at the edge" if design["extension"] else ""
    tuning = len(design["tuning_seeds"])
    found = [
        f"Each arm had {trials} learning rates{extended}, tried on {'one seed' if tuning == 1 else f'{tuning} seeds'}; "
        f"{HALVED if design.get('halving') else ''}all other settings are the methods' documented defaults. An arm "
        "that needs other settings is shown below what it can do.",
        "Equal time is not equal passes over the data: an arm with slower steps saw fewer rows, and with more time the "
        "order may change."
        if design["budget"].startswith("minutes")
        else "Equal passes over the data are not equal time: see the costs. An arm that learns slowly may win with a "
        "longer budget.",
    ]
    if at_edge:
        found.append(
            f"The rate chosen lies at the edge of those tried for {listed(at_edge)}: a better one may lie beyond."
        )
    return found


def _of_costs(summary: Mapping[str, Any]) -> str:
    if summary["source"] != "veneer":
        return "How the costs were measured does not stand in the file that was read."
    if (summary.get("costs") or {}).get("measured"):
        return (
            "Costs are of each arm alone in a process, one thread, on one machine; another machine, batch size or "
            "length of rows may order the arms differently."
        )
    return (
        "Costs were measured during training, not each arm alone on an idle machine; memory is that of the whole "
        "process. Differences of less than a third mean little."
    )


def _exceptions(summary: Mapping[str, Any]) -> list[str]:
    found = []
    diverged = {arm: number for arm, number in summary["diverged"].items() if number}
    if diverged:
        runs = ", ".join(f"{arm} ({number} of {summary['seeds']} seeds)" for arm, number in diverged.items())
        found.append(
            f"Runs that diverged count with the score of the untrained base: {runs}. With smaller rates they might "
            "not have."
        )
    if summary["test_reads"] > 1:
        found.append(
            f"The test split was read {summary['test_reads']} times, because arms or seeds were added after the "
            "first. Whoever chose them may have known the first result."
        )
    if summary["not_measured"]:
        found.append(
            "Nothing is known of "
            + ", ".join(other["arm"] for other in summary["not_measured"])
            + ": see the reasons below the table of arms."
        )
    return found


def listed(names: Sequence[str], most: int = 8) -> str:
    """`a, b and c`; of many names the first ones and how many more there are."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
