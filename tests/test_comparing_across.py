"""Several tasks and bases: by hand, against simulation, and what is said where tasks are few."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest

from veneer.comparing import across, from_results
from veneer.comparing.inference.across import over_tasks
from veneer.comparing.inference.cells import read_cell
from veneer.comparing.reporting.across_page import render_across, write_across
from veneer.errors import BadData, BadFile, UnknownName


def make_cell(tmp_path, name, gains, data=None, seeds=4, items=120, lower=False, effect=0.01):
    """A compare folder of made-up scores; gains: {arm: latent gain}."""
    rng = np.random.default_rng(sum(map(ord, name)))
    hard = rng.standard_normal(items)
    lines = []
    for arm, gain in gains.items():
        for seed in range(seeds):
            right = gain + hard + rng.standard_normal(items) > 0
            scores = 1.0 - right if lower else right
            lines += [
                {"arm": arm, "seed": seed, "item": str(i), "score": float(s)} for i, s in enumerate(scores)
            ]
    path = tmp_path / f"{data or name}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / name
    from_results(path, output=out, higher_is_better=not lower, smallest_effect=effect)
    return out


def test_a_finished_comparison_is_read_back_as_it_was_analysed(tmp_path):
    for lower in (False, True):
        folder = make_cell(tmp_path, f"one{lower}", {"lora": 0.2, "full": 0.8}, lower=lower)
        cell = read_cell(folder)
        gap = cell.scores.difference("full", "lora")
        contrast = cell.summary["contrasts"][0]
        assert gap.estimate > 0
        assert abs(contrast["difference"]) == pytest.approx(gap.estimate)
        assert gap.p_value == pytest.approx(contrast["p"])
    with pytest.raises(BadFile, match="summary"):
        read_cell(tmp_path / "nowhere")


def test_differences_are_standardised_within_their_task_and_averaged_over_tasks(tmp_path):
    folders = [
        make_cell(tmp_path, name, {"lora": 0.0, "full": gain})
        for name, gain in (("a", 0.5), ("b", 1.0), ("c", 0.2))
    ]
    found = across(folders)
    (full,) = found.arms
    expected = []
    for folder in folders:
        of = read_cell(folder).scores.of
        pooled = ((of["full"].var(1, ddof=1).mean() + of["lora"].var(1, ddof=1).mean()) / 2) ** 0.5
        expected.append((of["full"].mean() - of["lora"].mean()) / pooled)
    assert full.mean == pytest.approx(np.mean(expected))
    assert full.low < full.mean < full.high
    assert full.tasks == 3
    assert found.is_few
    text = str(found)
    assert "few" in text
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        assert name in text  # every task is shown


def test_bases_on_the_same_data_are_one_task(tmp_path):
    gains = {"lora": 0.0, "full": 0.6}
    one = make_cell(tmp_path, "first", gains, data="same")
    summary = json.loads((one / "summary.json").read_text())
    two = make_cell(tmp_path, "second", {"lora": 0.0, "full": 1.2}, data="same")
    other = make_cell(tmp_path, "third", gains)
    assert summary["comparison"]["data"] == "same.jsonl"
    found = across([one, two, other])
    (full,) = found.arms
    assert found.tasks == 2
    by_cell = {cell.cell: cell.standardised for cell in full.cells}
    means = [(by_cell["first"] + by_cell["second"]) / 2, by_cell["third"]]
    assert full.mean == pytest.approx(np.mean(means))


def test_wins_ties_and_losses_are_counted_at_the_smallest_effect(tmp_path):
    folders = [
        make_cell(tmp_path, "win", {"lora": 0.0, "full": 1.5}, effect=0.05),
        make_cell(tmp_path, "loss", {"lora": 1.5, "full": 0.0}, effect=0.05),
        make_cell(tmp_path, "tie", {"lora": 3.5, "full": 3.5}, effect=0.05, items=400),
    ]
    (full,) = across(folders).arms
    assert [cell.verdict for cell in full.cells] == ["win", "loss", "tie"]
    assert [cell.sure for cell in full.cells] == [True, True, True]
    plain = full.to_dict()
    assert (plain["wins"], plain["ties"], plain["losses"], plain["sure_wins"]) == (1, 1, 1, 1)


def test_one_task_has_no_interval_and_says_so(tmp_path):
    found = across([make_cell(tmp_path, "only", {"lora": 0.0, "full": 1.0})])
    assert found.arms[0].low is None
    assert "nothing is known of others" in str(found)


def test_an_arm_that_is_missing_in_a_task_is_left_out_and_named(tmp_path):
    one = make_cell(tmp_path, "one", {"lora": 0.0, "full": 0.5, "dora": 0.5})
    two = make_cell(tmp_path, "two", {"lora": 0.0, "full": 0.5})
    found = across([one, two])
    assert [arm.arm for arm in found.arms] == ["full"]
    assert found.left_out == {"dora": ["two"]}
    assert "dora is left out: it was not measured in two" in str(found)
    with pytest.raises(UnknownName, match="'dora' is not in all"):
        across([one, two], anchor="dora")
    three = make_cell(tmp_path, "three", {"lora": 0.0, "ia3": 0.0})
    with pytest.raises(BadData, match="1 arms in common"):
        across([one, two, three])


def test_it_is_written_as_data(tmp_path):
    folders = [make_cell(tmp_path, name, {"lora": 0.0, "full": 0.5}) for name in ("p", "q")]
    found = across(folders)
    plain = json.loads(found.write(tmp_path / "all").read_text())
    assert plain["few_tasks"]
    assert plain["arms"][0]["cells"][0]["verdict"] in ("win", "tie", "loss")


@pytest.mark.parametrize("tasks", [3, 8, 15])
def test_the_interval_over_tasks_holds_the_truth(tasks):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        _, low, high, _ = over_tasks(rng.standard_normal(tasks), resamples=1000)
        held += low <= 0 <= high
    assert 0.925 <= held / 400 <= 0.98


def test_the_command_puts_comparisons_together(tmp_path):
    from typer.testing import CliRunner

    from veneer.cli._app import app

    folders = [make_cell(tmp_path, name, {"lora": 0.0, "full": 0.5}) for name in ("p", "q")]
    flags = [part for folder in folders for part in ("--across", str(folder))]
    done = CliRunner().invoke(app, ["compare", *flags, "--output", str(tmp_path / "all"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tasks"] == 2
    assert (tmp_path / "all" / "across.json").is_file()


def test_the_page_of_all_tasks_says_what_is_better_worse_and_open(tmp_path):
    """And names from files are text there too."""
    gains = {"lora": 0.0, "full": 1.5, "<b>bad</b>": -1.5, "alike": 0.0}
    folders = [make_cell(tmp_path, name, gains, data=f"<i>{name}") for name in "abc"]
    folders.append(make_cell(tmp_path, "d", gains, data="<i>d", lower=True))
    found = across(folders).to_dict()
    page = write_across(found, tmp_path).read_text()
    assert "<b>" not in page
    assert "<i>" not in page
    text = html.unescape(re.sub(r"<(script|style).*?</\1>|<[^>]+>", "", page, flags=re.S))
    assert "Better than lora over 4 tasks, with 95 % confidence each: full." in text
    assert "Worse: <b>bad</b>." in text
    assert "Not to be told from lora: alike." in text
    assert text.count("<i>d") == 1
    assert "4 comparisons of 4 tasks together" in text
    alone = across(folders[:1]).to_dict()
    assert "Not to be told from lora: " in render_across(alone)
    assert page.count("Content-Security-Policy") == 1
