"""The page of the benchmarks, written from saved runs: a table and a plot a case, and the misses by name.

A plot is a line a row: a dot at the median ratio, a bar over its quartiles, a tick where it was expected to be, on a
logarithmic axis whose 1 is the reference.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._report import PEFT, cost

TITLES = {
    "bare": "Adapters over the bare base: batches",
    "bare_decode": "Adapters over the bare base: decoding",
    "forward": "Mixed batches beside HF PEFT: forward",
    "decode": "Mixed batches beside HF PEFT: decoding",
    "mixed": "Eight methods in one batch",
    "lora": "LoRA's training step beside HF PEFT's",
    "dora": "DoRA's training step beside HF PEFT's",
    "ia3": "(IA)3's training step beside HF PEFT's",
    "prefix_tuning": "Prefix tuning's training step beside HF PEFT's",
    "matmul": "Forms of the frozen matmul, in training",
    "tokens": "Forms of the frozen matmul, in decoding",
    "scores": "Forms of the frozen matmul on real data, to the end",
    "memory": "Peak memory of a training step",
    "cohort": "Sixteen adapters trained together",
    "kept": "Kept activations",
    "uneven": "Uneven lengths",
    "many": "A thousand adapters on one base",
    "attach": "Attaching", "load": "Loading", "activate": "Activating",
    "methods": "Every method's training step over LoRA's",
    "import": "Importing",
    "serve_peers": "Serving beside other servers, with one adapter",
    "serve": "Serving over HTTP, beside HF PEFT's generate",
}  # fmt: skip
HEAD = """# Benchmarks

Written by `veneer bench` from the runs in `benchmarks/results/`; each can be made again with the command that stands by
it. Costs are process CPU time (or bytes, where it says so), all sides in turn within each repeat, medians with
quartiles of the paired ratios. A ratio is veneer's cost over the reference's: below 1 veneer is cheaper. Outputs were
compared before anything was timed. The expectation is what was written down before, and a miss stands as a miss.
"""


def write_page(results: Path, page: Path) -> None:
    """`page`, and an SVG a case beside it in a folder of its name, from every run in `results`."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    rows: dict[str, list[dict[str, Any]]] = {}
    of: dict[str, dict[str, Any]] = {}
    for run in runs:
        for row in run["rows"]:
            if of.setdefault(row["case"], run) is run:
                rows.setdefault(row["case"], []).append(row)
    pictures = page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    missed = [r for found in rows.values() for r in found if r["met"] is False]
    judged = sum(r["met"] is not None for found in rows.values() for r in found)
    parts = [HEAD, _machines(runs), f"**{judged - len(missed)} of {judged} expectations are met.**\n"]
    if missed:
        parts.append("Missed:\n\n" + "\n".join(f"- {_miss(row)}" for row in missed) + "\n")
    for case in [*(c for c in TITLES if c in rows), *(c for c in rows if c not in TITLES)]:
        (pictures / f"{case}.svg").write_text(plot(rows[case]), encoding="utf-8")
        parts.append(_section(case, rows[case], of[case], pictures.name))
    page.write_text("\n".join(parts), encoding="utf-8")


def _machines(runs: Sequence[dict[str, Any]]) -> str:
    names = ("machine", "instructions", "versions")
    found = {tuple(run["facts"][n] for n in names) for run in runs}
    lines = ["## Machine", ""]
    for each in sorted(found):
        lines += [f"- {name}: {value}" for name, value in zip(names, each)]
    loads = sorted({run["facts"]["load at the start"].split(" ")[0] for run in runs}, key=float)
    lines.append(
        f"- load at the start of the runs: {loads[0]} to {loads[-1]}; other work shared the machine, so absolute "
        "times drift, and ratios within a repeat hold better than they do"
    )
    return "\n".join(lines) + "\n"


def _miss(row: dict[str, Any]) -> str:
    near = "" if row["certain"] else " (the expectation is within the quartiles)"
    limit = f" {row['limit']}" if row.get("limit") else ""
    return (
        f"{row['case']}, {row['setting']}{_over(row)}: {row['ratio']['median']:.3g}, at most "
        f"{row['expected_ratio']:.3g} expected{near}.{limit}"
    )


def _over(row: dict[str, Any]) -> str:
    return "" if row["reference"] == PEFT else f" / {row['reference']}"


def _section(case: str, rows: Sequence[dict[str, Any]], run: dict[str, Any], folder: str) -> str:
    facts = run["facts"]
    repeats = facts["repeats"].split(",")[0]
    threads = "" if facts["threads"] == 1 else f" --threads {facts['threads']}"
    lines = [
        f"## {TITLES.get(case, case)}", "",
        f"`veneer bench {case} --repeats {repeats}{threads}`, commit {facts['commit']}", "",
        f"![{case}]({folder}/{case}.svg)", "",
        "| setting | reference | veneer | its | ratio | quartiles | expected | |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        ratio, unit = row["ratio"], row["unit"]
        expected = "" if row["expected_ratio"] is None else f"at most {row['expected_ratio']:.3g}"
        word = {None: "", True: "met", False: "**missed**"}[row["met"]]
        lines.append(
            f"| {row['setting']} | {row['reference']} | {cost(row['veneer']['median'], unit)} "
            f"| {cost(row['reference_cost']['median'], unit)} | {ratio['median']:.3g} "
            f"| {ratio['low']:.3g} to {ratio['high']:.3g} | {expected} | {word} |"
        )
    notes = [f"- {row['setting']}: {note}" for row in rows for note in row["notes"]]
    if notes:
        lines += ["", *dict.fromkeys(notes)]
    return "\n".join(lines) + "\n"


LEFT, WIDTH, LINE = 430, 300, 20


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """An SVG of the ratios of some rows; readable in light and dark pages."""
    values = [v for r in rows for v in (r["ratio"]["low"], r["ratio"]["high"], r["expected_ratio"]) if v]
    low = min([*values, 0.5]) * 0.9
    high = max([*values, 1.5]) * 1.1

    def at(value: float) -> float:
        return LEFT + WIDTH * (math.log(max(value, low)) - math.log(low)) / (math.log(high) - math.log(low))

    height = LINE * len(rows) + 34
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 60}" height="{height}" '
        f'viewBox="0 0 {LEFT + WIDTH + 60} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="100%" height="100%" fill="#fff"/><line x1="{at(1):.1f}" x2="{at(1):.1f}" y1="6" '
        f'y2="{height - 22}" stroke="#999" stroke-dasharray="3 3"/>',
    ]
    for i, row in enumerate(rows):
        y, ratio = LINE * i + 18, row["ratio"]
        colour = {None: "#1f5fa8", True: "#1c7c45", False: "#b3261e"}[row["met"]]
        words = html.escape(_short(row["setting"] + _over(row)))
        found.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end" fill="#222">{words}</text>')
        found.append(
            f'<line x1="{at(ratio["low"]):.1f}" x2="{at(ratio["high"]):.1f}" y1="{y}" y2="{y}" '
            f'stroke="{colour}" stroke-width="5" stroke-opacity="0.35"/>'
            f'<circle cx="{at(ratio["median"]):.1f}" cy="{y}" r="4" fill="{colour}"/>'
            f'<text x="{LEFT + WIDTH + 8}" y="{y + 4}" fill="{colour}">{ratio["median"]:.2g}</text>'
        )
        if row["expected_ratio"]:
            x = at(row["expected_ratio"])
            found.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 7}" y2="{y + 7}" stroke="#222" stroke-width="1.5"/>'
            )
    found.append(
        f'<text x="{at(1):.1f}" y="{height - 8}" text-anchor="middle" fill="#555">1: the reference</text></svg>'
    )
    return "\n".join(found) + "\n"


def _short(text: str) -> str:
    return text if len(text) <= 72 else text[:69] + "..."
