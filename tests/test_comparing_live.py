"""A comparison that is watched while it runs: what is shown comes from the ledger, and never from the test split."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from test_comparing_fake import RATES, SIZES, FakeTrainer
from veneer.cli._app import app
from veneer.comparing import across, compare
from veneer.comparing.reporting.across_page import write_across
from veneer.comparing.running.live import LivePage, state_of
from veneer.comparing.running.runs import Progress
from veneer.errors import BadData

ARMS = ["lora:rank=1", "broken", "impossible"]


def run(folder, trainer, arms=ARMS, **options):
    return compare(
        "builtin:m", "builtin:d", arms, output=folder, run_arm=trainer, rates=RATES, budget="demo", sizes=SIZES,
        progress=None, **options,
    )  # fmt: skip


@pytest.fixture
def killed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "c", FakeTrainer(stop_after=22))
    return tmp_path / "c"


def watch(folder, *more):
    return CliRunner().invoke(app, ["compare", "--watch", str(folder), *more], prog_name="veneer")


def test_a_stopped_comparison_is_seen_as_far_as_it_came(killed):
    state = state_of(killed)
    by_arm = {arm["arm"]: arm for arm in state["arms"]}
    assert state["done"] == 22
    assert state["of"] == 46  # 1 + 5 arms of 3 trials and 6 seeds
    assert not state["is_finished"]
    assert by_arm["full"]["status"] == "done"
    assert by_arm["lora:rank=1"]["trials"] == 3
    assert by_arm["lora:rank=1"]["status"] == "confirming"
    assert by_arm["broken"]["status"] == "waiting"
    page = (killed / "report.html").read_text()
    assert "22 of about 46 runs have ended" in page
    assert 'http-equiv="refresh"' not in page
    assert "goes on where it stopped" in page
    assert f"{by_arm['full']['best_validation']:.4g}" in page


def test_an_arm_without_rates_of_its_own_is_confirmed_on_every_seed(tmp_path):
    lines = [{"kind": "design", "sha256": "x", "design": {"model": "m", "data": "d", "rates": {"lora": [0.1]},
              "arms": ["untrained", "lora", "random_direction"], "seeds": [1, 2]}}]  # fmt: skip
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = state_of(tmp_path)
    assert [arm["confirmed_of"] for arm in state["arms"]] == [1, 2, 2]
    assert state["of"] == 6


def test_the_page_and_the_state_need_no_test_score(killed):
    before = state_of(killed)
    shutil.rmtree(killed / "sealed")
    assert state_of(killed) == before
    said = []
    page = LivePage(killed, said.append)
    page.write()
    assert not said
    text = (killed / "report.html").read_text()
    assert 'http-equiv="refresh"' in text
    assert "sealed" not in text
    assert "sealed" not in json.dumps(before)


def test_a_page_is_written_while_runs_end_and_the_report_takes_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(LivePage, "write", counted := Counted(LivePage.write))
    result = run(tmp_path, FakeTrainer())
    assert counted.calls
    page = result.report.read_text()
    assert "under way" not in page
    assert 'http-equiv="refresh"' not in page
    assert result.best in page


class Counted:
    """A method that counts its calls."""

    def __init__(self, method):
        self.method, self.calls = method, 0

    def __get__(self, thing, kind):
        def call(*arguments, **named):
            self.calls += 1
            return self.method(thing, *arguments, **named)

        return call


def test_an_earlier_result_stays_below_the_progress_of_an_extension(tmp_path):
    best = run(tmp_path, FakeTrainer()).best
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, FakeTrainer(stop_after=2), [*ARMS, "lora:rank=4"], extend=True)
    page = (tmp_path / "report.html").read_text()
    assert "runs have ended" in page
    assert "the result that stands in this folder from before" in page
    assert f"<strong>{best}</strong>" in page
    assert not state_of(tmp_path)["is_finished"]
    run(tmp_path, FakeTrainer(), [*ARMS, "lora:rank=4"], extend=True)
    assert state_of(tmp_path)["is_finished"]
    assert "runs have ended" not in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_written_stops_no_run(tmp_path, monkeypatch):
    def broken(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr("veneer.comparing.running.live.write_report", broken)
    said = []
    page = LivePage(tmp_path, said.append)
    page(Progress("first", 1, 2))
    page(Progress("second", 2, 2))
    assert [event.message for event in said][:2] == ["first", said[1].message]
    assert sum("cannot be written" in event.message for event in said) == 1


def test_the_terminal_shows_the_state_or_the_result(killed):
    seen = watch(killed)
    assert seen.exit_code == 0
    assert "22 of about 46 runs" in seen.output
    assert "not running" in seen.output or "running" in seen.output
    assert max(map(len, seen.output.split("\n"))) <= 100
    assert json.loads(watch(killed, "--json").stdout)["done"] == 22
    run(killed, FakeTrainer())
    assert "would usually be missed" in " ".join(watch(killed).output.split())
    assert "report.html" in watch(killed).output


def test_a_folder_without_a_comparison_says_which_folder_is_meant(tmp_path):
    with pytest.raises(BadData, match="no comparison that can be watched"):
        state_of(tmp_path)
    seen = watch(tmp_path)
    assert seen.exit_code != 0


def test_a_report_is_made_again_from_the_files_alone(tmp_path):
    result = run(tmp_path, FakeTrainer())
    page = result.report.read_text()
    result.report.unlink()
    for name in ("sealed", "runs", "best", "ledger.jsonl"):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    seen = CliRunner().invoke(app, ["compare", "--report", str(tmp_path)], prog_name="veneer")
    assert seen.exit_code == 0
    assert result.report.read_text() == page


def test_several_comparisons_are_watched_together(tmp_path):
    names = {"one": "x", "two": "y", "three": "z"}
    (tmp_path / "design.json").write_text(json.dumps({"sha256": "s", "comparisons": names}))
    run(tmp_path / "one", FakeTrainer())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", FakeTrainer(stop_after=5))
    state = state_of(tmp_path)
    assert [name for name, one in state["comparisons"].items() if one is None] == ["three"]
    assert not state["is_finished"]
    assert state["done"] == state["comparisons"]["one"]["done"] + 5
    shown = watch(tmp_path).output
    assert "finished" in shown
    assert "waiting" in shown
    assert "-- two" in shown
    assert "5 of about 46 runs" in shown
    for name in ("two", "three"):
        run(tmp_path / name, FakeTrainer())
    assert state_of(tmp_path)["is_finished"]
    write_across(across([tmp_path / name for name in names]).to_dict(), tmp_path)
    page = (tmp_path / "across.html").read_text()
    assert '<a href="two/report.html">two</a>' in page
    assert "across.html" in watch(tmp_path).output
