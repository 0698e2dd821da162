"""Sections of the report on other items: groups of the test split, test sets from elsewhere, corrupted inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.comparing.reporting.oriented import Oriented, Part, arms_of, dots, of_arms, part
from veneer.comparing.reporting.published import Published
from veneer.comparing.reporting.tables import Cell, Column


def groups(page: Published) -> Part | None:
    """The worst group and the gap of each arm, and every group."""
    found = page.summary.get("by_group")
    if not found:
        return None
    if found.get("not_applicable"):
        return part("groups-of-items", "Groups", "Who is served worst", f"{found['not_applicable']}.")
    shown, arms = Oriented(page.scale), found["arms"]
    names = arms_of(page, arms)
    if not names:
        return None
    judged = {
        arm: [
            Cell("–")
            if arms[arm]["worst"] is None
            else Cell(arms[arm]["worst"]["group"], arms[arm]["worst"]["group"]),
            shown.scored(arms[arm]["worst"]),
            shown.lost(arms[arm]["gap"]),
        ]
        for arm in names
    }
    columns = [Column("Worst group", True), Column("Its score", falls=True), Column("Gap", falls=True)]
    each = [
        Column(
            f"{one['group']}, {one['n']} items{' (few)' if one['small'] else ''}",
            is_minor=place >= 3,
            falls=True,
        )
        for place, one in enumerate(arms[names[0]]["groups"])
    ]
    points = {
        arm: [(f"{one['group']}, {one['n']} items", one) for one in arms[arm]["groups"] if not one["small"]]
        for arm in names
    }
    say = (
        f"Test items by '{found['column']}'. Which group is worst is read off the same scores: its interval and that "
        "of the gap hold for all groups at once. Groups of fewer than "
        f"{found['small_below']} items are shown and not judged."
    )
    scored = {arm: [shown.scored(one) for one in arms[arm]["groups"]] for arm in names}
    return part(
        "groups-of-items", "Groups", "Who is served worst", say,
        charts=dots(page, points, "the full point is all items, an empty one a group; see the tables"),
        tables=[of_arms(page, "The worst group, and the gap between the best and the worst", columns, judged)],
        folded=[of_arms(page, f"Every group of '{found['column']}'", each, scored)],
    )  # fmt: skip


def shifted(page: Published) -> Part | None:
    say = (
        "The trained arms on test sets from elsewhere; rows that stand in this comparison's own data are left out. The "
        "drop is from the test split: other items, the same seeds."
    )
    return _sets(page, "shifted", "Shifted", "On data from elsewhere", say)


def corrupted(page: Published) -> Part | None:
    say = "The same test items with corrupted inputs, so that the drop is paired item by item."
    return _sets(page, "corrupted", "Corrupted", "On corrupted inputs", say)


def _sets(page: Published, key: str, short: str, title: str, say: str) -> Part | None:
    """Drops from the test split, set by set, and the scores behind them."""
    sets = page.summary.get(key)
    if not sets:
        return None
    shown = Oriented(page.scale)
    used = {name: about for name, about in sets.items() if about.get("arms")}
    used = dict(sorted(used.items(), key=lambda one: one[0] != "all"))
    drops, scores, points = {}, {}, {}
    for arm in (arm["arm"] for arm in page.arms):
        of = [about["arms"].get(arm) for about in used.values()]
        if not any(of):
            continue
        drops[arm] = [shown.lost(one and one.get("drop")) for one in of]
        scores[arm] = [shown.scored(one) for one in of]
        points[arm] = [(_name(about), one) for about, one in zip(used.values(), of) if one]
    out = [
        f"{_name(about)}: {about['not_applicable']}."
        for about in sets.values()
        if about.get("not_applicable")
    ]
    for about in used.values():
        if about.get("not_measured"):
            out.append(f"Not scored on {_name(about)}: {', '.join(about['not_measured'])}.")
    columns = [
        Column(
            _name(about) + (f", {about['rows']} items" if about.get("rows") else ""),
            is_minor=place >= 4,
            falls=True,
        )
        for place, about in enumerate(used.values())
    ]
    unit = "points" if page.scale.is_share else page.scale.unit
    return part(
        key, short, title, " ".join([say, *out]),
        charts=dots(page, points, "the full point is the test split, an empty one another set; see the tables"),
        tables=[of_arms(page, f"Lost against the test split, {unit}, with 95 % intervals", columns, drops)],
        folded=[of_arms(page, f"Scores, {page.scale.unit}, with 95 % intervals", columns, scores)],
    )  # fmt: skip


def _name(about: Mapping[str, Any]) -> str:
    return about["name"].replace("_", " ") + (f" {about['severity']}" if about.get("severity") else "")
