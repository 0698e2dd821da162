"""What a design cannot say, from the design itself: what a reader who distrusts it looks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.comparing.words import Scale


def limits_of(summary: Mapping[str, Any], at_edge: Sequence[str] = ()) -> list[str]:
    """Sentences, the weightiest first. at_edge: arms whose chosen rate is the smallest or largest tried."""
    design = summary["comparison"]
    scale = Scale(summary["analysed"], 1.0, summary["in_percent"])
    made_here = summary["source"] == "veneer"
    found = []
    if summary["claim"]:
        found.append(
            "It is a demonstration: little data, few passes, few trials. It shows how a comparison works; "
            "its "
            "order of methods is a screen and no claim."
        )
    smallest = summary["smallest_effect_found"]
    missed = (
        f"More than one time in five it misses {scale.missed(smallest)}"
        if smallest > 1e-9
        else "The closest arms gave the same scores, so that nothing is known of what it misses"
    )
    found.append(
        f"That two arms are tied does not make them equal. {missed}; "
        f"{scale.size(summary['smallest_effect_of_interest'])} was named as the smallest that matters."
    )
    found += summary.get("notes", [])
    if summary["items_only"]:
        found.append(
            "There is one seed, so that the intervals are for new items only. How much a repeated training "
            "would "
            "differ is unknown, and is often as much as the methods do."
        )
    found.append(
        "It is one data set and one base. Another task, language, length of text or size of base may order "
        "the "
        "methods differently."
    )
    if made_here:
        trials = max((len(rates) for rates in design["rates"].values()), default=0)
        tuning = len(design["tuning_seeds"])
        found.append(
            f"Each arm had {trials} learning "
            f"rates{' and an extension at the edge' if design['extension'] else ''}, "
            f"tried on {'one seed' if tuning == 1 else f'{tuning} seeds'}; all other settings are the "
            f"methods' "
            "documented defaults. An arm that needs other settings is shown below what it can do."
        )
        found.append(
            "Equal passes over the data are not equal time: see the costs. An arm that learns slowly may "
            "win with "
            "a longer budget."
        )
        if at_edge:
            found.append(
                f"The rate chosen lies at the edge of those tried for {listed(at_edge)}: a better one may lie beyond."
            )
    else:
        found.append(
            "How the arms were tuned, and whether the test items had any part in it, does not stand in the "
            "file "
            "that was read."
        )
    found += _exceptions(summary)
    if summary["analysed"] != summary["metric"]:
        found.append(
            f"{summary['metric']} is not a mean over items. The intervals and tests are of the mean item "
            f"score; "
            f"{summary['metric']} is shown without an interval."
        )
    if summary.get("costs", {}).get("measured"):
        found.append(
            "Costs are of each arm alone in a process, one thread, on one machine; another machine, batch size or "
            "length of rows may order the arms differently."
        )
        if note := summary["costs"].get("note"):
            found.append(f"{note[0].upper()}{note[1:]}.")
    else:
        found.append(
            "Costs were measured during training, not each arm alone on an idle machine; memory is that of the "
            "whole process. Differences of less than a third mean little."
        )
    return found


def _exceptions(summary: Mapping[str, Any]) -> list[str]:
    found = []
    diverged = {arm: number for arm, number in summary["diverged"].items() if number}
    if diverged:
        runs = ", ".join(f"{arm} ({number} of {summary['seeds']} seeds)" for arm, number in diverged.items())
        found.append(
            f"Runs that diverged count with the score of the untrained base: {runs}. With smaller rates "
            f"they "
            "might not have."
        )
    if summary["test_reads"] > 1:
        found.append(
            f"The test split was read {summary['test_reads']} times, because arms or seeds were added after "
            f"the "
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
