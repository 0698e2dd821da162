"""The report: one HTML file that needs nothing else, made from the files of a compare folder alone.

It is complete without its script, which adds sorting, filtering, tooltips, and the choice of axes and of two
arms. What comes from outside (names, texts, reasons) is text: escaped by the template, or read as JSON and set
as text by the script. A content security policy allows this page's own style and script, by their digests, and
pictures that stand in the page; nothing is fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.comparing.reporting import beyond, charts, findings, learning, tables, telling
from veneer.comparing.reporting.filling import fill
from veneer.comparing.reporting.limits import limits_of
from veneer.comparing.reporting.published import Published
from veneer.comparing.running.ledger import write_atomic
from veneer.errors import BadData


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


def content(page: Published) -> dict[str, Any]:
    """What the template is given: text, tables and charts."""
    s = page.summary
    costs = tables.costs_of(page)
    prices, fronts = findings.prices(page, costs)
    sentence = re.sub(r" (?=%)|(?<=\d) (?=\d{3}\b)", "\N{NO-BREAK SPACE}", s["recommendation"]["sentence"])
    lead, _, rest = sentence.partition(". ")
    return {
        "s": s,
        "title": telling.title_of(s),
        "lead": _parted(lead + ".", page.chosen),
        "certainty": rest.replace(f" {s['claim'][:1].upper()}{s['claim'][1:]}.", "") if rest else "",
        "facts": telling.facts(s),
        "arms": tables.arms_table(page),
        "misbehaved": [one for one in s.get("controls") or [] if one["behaved"] is False],
        "controls": tables.controls_table(page),
        "verdict": findings.verdict(page),
        "groups_say": telling.groups_say(s),
        "forest": charts.forest(page.arms, s["groups"], page.chosen, page.scale),
        "prices": prices,
        "fronts": fronts,
        "areas": findings.areas(page, prices),
        "no_step": telling.without_step(page, costs)
        if any(p["cost"] == "step_seconds" for p in prices)
        else [],
        "contrasts": tables.contrasts_table(page),
        "contrasts_chart": findings.contrasts_chart(page),
        "contrasts_say": telling.contrasts_say(s),
        "dispute": findings.dispute(page),
        "beyond": beyond.parts(page),
        "missing": beyond.missing(page),
        "tuning": findings.tried(page),
        "learning": learning.section(page, costs) if page.histories else None,
        "costs": tables.costs_tables(page, costs),
        "costs_say": telling.costs_say(page),
        "commands_say": telling.commands_say(s),
        "commands": telling.commands(page),
        "limits": limits_of(s, findings.edges(page)),
        "how": telling.how(s),
        "design_json": json.dumps(s["comparison"], indent=2, ensure_ascii=False),
    }


def _parted(text: str, name: str) -> tuple[str, str, str]:
    """The text before, within and after the first `name`, for the page to emphasise it."""
    return text.partition(name)
