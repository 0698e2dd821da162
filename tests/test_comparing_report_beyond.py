"""Sections beyond one number: shown where they were measured, in the metric's own direction, else named as missing."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest

from test_comparing_fake import RATES, SIZES, FakeTrainer
from veneer.comparing import compare, from_results
from veneer.comparing.inference.analysis import Scores
from veneer.comparing.inference.claims import decide
from veneer.comparing.measures.calibration import calibration, stability
from veneer.comparing.measures.groups import by_group
from veneer.comparing.reporting.axes import quality_axis
from veneer.comparing.reporting.beyond import ABSENT
from veneer.comparing.reporting.report import write_report
from veneer.comparing.reporting.robustness import corrupted, forgotten, shifted
from veneer.comparing.reporting.words import Scale


def words(folder):
    """The text of the page, without its script and data."""
    page = re.sub(r"<(script|style).*?</\1>", "", write_report(folder).read_text(), flags=re.S)
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", page.replace("<wbr>", "")).split()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compare(
        "builtin:m", "builtin:d", ["lora:rank=4"], output=tmp_path_factory.mktemp("beyond"), run_arm=FakeTrainer(),
        rates=RATES, budget="demo", sizes=SIZES, progress=None,
    ).folder  # fmt: skip


def changed(folder, tmp_path, **sections):
    for name in ("summary.json", "results.jsonl", "scores.jsonl", "trials.jsonl"):
        (tmp_path / name).write_text((folder / name).read_text())
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | sections))
    return tmp_path


def scores_in(folder, sign=1.0):
    of: dict[str, dict] = {}
    for text in (folder / "scores.jsonl").read_text().splitlines():
        line = json.loads(text)
        of.setdefault(line["arm"], {}).setdefault(line["seed"], {})[line["item"]] = sign * line["score"]
    items = tuple(sorted(next(iter(next(iter(of.values())).values()))))
    arrays = {arm: np.array([[run[i] for i in items] for run in runs.values()]) for arm, runs in of.items()}
    return Scores(arrays, {arm: tuple(runs) for arm, runs in of.items()}, items)


def test_what_was_not_measured_is_named_with_the_flag_that_would(folder, tmp_path):
    said = words(changed(folder, tmp_path))
    assert "Not measured in this comparison" in said
    for key, text in ABSENT.items():
        if key != "calibration":
            assert text in said
    assert "Who is served worst" not in said


def test_every_section_that_was_measured_is_shown(folder, tmp_path):
    scores = scores_in(folder)
    groups = ["many"] * 200 + ["<few>"] * 80 + ["tiny"] * 20
    worse = Scores({arm: of * 0.5 for arm, of in scores.of.items()}, scores.seeds, scores.items)
    arms = list(scores.of)
    sure = [
        {
            "items": [
                {"item": i, "score": s, "confidence": 0.9, "brier": 0.3} for i, s in zip(scores.items, row)
            ]
        }
        for row in scores.of["full"]
    ]
    found = {
        "by_group": {
            "column": "kind", "small_below": 30, "arms": {arm: by_group(scores.of[arm], groups) for arm in arms}
        },
        "shifted": {
            "a": {"kind": "shifted", "name": "tweets", "rows": 300, "not_measured": ["x"]}
            | {"arms": shifted(scores, worse)},
        },
        "corrupted": {
            "b": {"kind": "corrupted", "name": "typos", "severity": 3, "rows": 300, "arms": corrupted(scores, worse)},
        },
        "forgetting": {
            "c": {"name": "news", "measure": "probe", "rows": 300, "arms": forgotten(scores, {}, "probe")},
            "d": {"name": "films", "measure": None, "not_applicable": "it has no measure"},
        },
        "calibration": {"full": calibration(sure)},
        "stability": {arm: stability(scores.of[arm].mean(1)) for arm in arms},
    }  # fmt: skip
    said = words(changed(folder, tmp_path, **found))
    for title in ("Who is served worst", "On data from elsewhere", "On corrupted inputs", "What they forget"):
        assert title in said
    assert "Test items by 'kind'" in said
    assert "tiny, 20 items (few)" in said
    assert "<few>, 80 items" in said
    half = 50 * scores.of["full"].mean()
    assert f"{half:.1f}" in said
    assert "typos 3, 300 items" in said
    assert "Not scored on tweets: x." in said
    assert "films: it has no measure." in said
    assert f"{0.9 - scores.of['full'].mean():+.3f}" in said
    assert "How much a repeated run differs" in said
    assert "Scores by groups of the data" not in said


def test_where_lower_is_better_scores_keep_their_sign_and_up_is_better(tmp_path):
    rng = np.random.default_rng(0)
    lines = [
        {"arm": arm, "seed": seed, "item": str(item), "score": float(size + rng.random())}
        for arm, size in (("good", 2), ("bad", 3))
        for seed in range(3)
        for item in range(60)
    ]
    path = tmp_path / "loss.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = from_results(path, metric="loss", higher_is_better=False, output=tmp_path / "out")
    scores = scores_in(result.folder, sign=-1.0)
    arms = {arm: by_group(scores.of[arm], ["a"] * 30 + ["b"] * 30) for arm in scores.of}
    path = result.folder / "summary.json"
    summary = json.loads(path.read_text()) | {"by_group": {"column": "k", "small_below": 30, "arms": arms}}
    path.write_text(json.dumps(summary))
    said = words(result.folder)
    worst = -arms["good"]["worst"]["mean"]
    assert f"{worst:.4g} (" in said
    assert re.findall(r".{40}[^e]-[23]\.\d.{20}", said) == []


def test_better_is_higher_on_the_page_whatever_the_metric():
    up = quality_axis([1.0], [2.0], 100, 0, Scale("accuracy", 1.0, False))
    down = quality_axis([1.0], [2.0], 100, 0, Scale("loss", -1.0, False))
    assert up(2.0) < up(1.0)
    assert down(1.0) < down(2.0)


def test_a_claim_is_decided_in_the_report_by_the_rule_of_its_file(folder, tmp_path):
    summary = json.loads((folder / "summary.json").read_text())
    claim = {
        "id": "T1",
        "says": "all are <within> a tenth",
        "source": "a survey",
        "rule": "equivalent",
        "margin": 0.1,
    }
    design = summary["comparison"] | {"claim": claim}
    found = changed(folder, tmp_path, comparison=design)
    said = words(found)
    assert "Claimed all are <within> a tenth (a survey)" in said
    assert f"The claim: {decide(found).verdict}" in said
    assert decide(found).because in said
    assert "The claim:" not in words(folder)
