"""The benchmarks run, at a toy size, and compare outputs before they time anything. No speed is asserted."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("peft")

from veneer import bench
from veneer.bench import _clock, _training
from veneer.errors import UnknownName, VeneerError

QUICK = [*bench.GROUPS["residents"], "forward", "decode", *bench.GROUPS["training"]]
SLOW = (
    "bare",
    "bare_decode",
    "matmul",
    "tokens",
    "cohort",
    "many",
    "methods",
    "import",
    "serve",
    "serve_peers",
)


@pytest.fixture(scope="module")
def report() -> bench.Report:
    return bench.run(QUICK, size=bench.Size.small(), quiet=True)


@pytest.mark.parametrize("case", QUICK)
def test_every_case_runs_and_gives_rows(report, case):
    rows = [row for row in report.rows if row.case == case]
    assert rows
    for row in rows:
        assert 0 < row.ratio.low <= row.ratio.median <= row.ratio.high
        assert row.error <= _clock.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_the_longer_cases_run_and_give_rows(case):
    rows = bench.run([case], size=bench.Size.small(), quiet=True).rows
    assert rows
    assert all(row.case == case and row.ratio.low > 0 for row in rows)


def test_every_case_is_tested_or_needs_files_that_are_fetched():
    assert set(bench.CASES) - {*QUICK, *SLOW} <= {"memory", "kept", "scores", "mixed", "uneven", "forecast"}


def test_a_run_is_kept_and_a_page_is_written_of_all_that_are_kept(tmp_path):
    facts = {"machine": "m", "instructions": "i", "versions": "v", "load at the start": "1.0 (x)", "threads": 1,
             "repeats": "3, in turn", "commit": "c"}  # fmt: skip
    missed = bench.Row.of("bare", "far <off>", [3.0, 3.1], [1.0, 1.0], reference="bare base",
                          expected=bench.Expectation.at_most(1.1, "Its products."))  # fmt: skip
    met = bench.Row.of("lora", "near", [0.5, 0.5], [1.0, 1.0], expected=bench.Expectation.at_most(0.95))
    for name, row in (("one", missed), ("two", met)):
        bench.write(
            bench.Report(facts, [row]), tmp_path / "results" / f"{name}.json", tmp_path / "benchmarks.md"
        )
    page = (tmp_path / "benchmarks.md").read_text()
    assert "**1 of 2 expectations are met.**" in page
    assert "- bare, far <off> / bare base: 3.05, at most 1.1 expected. Its products." in page
    assert "`veneer bench lora --repeats 3`, commit c" in page
    assert "| near | HF PEFT | 500 ms | 1 s | 0.5 |" in page
    picture = (tmp_path / "benchmarks" / "bare.svg").read_text()
    assert picture.startswith("<svg")
    assert "far &lt;off&gt;" in picture
    with pytest.raises(VeneerError, match="saved runs"):
        bench.write(bench.Report(facts, [met]), None, tmp_path / "benchmarks.md")


def test_a_report_prints_and_is_a_json_document(report):
    text = str(report)
    for fact in ("machine", "versions", "seed", "commit", "threads"):
        assert fact in text
    found = json.loads(json.dumps(report.to_dict()))
    assert len(found["rows"]) == len(report.rows)


def test_a_toy_size_expects_nothing(report):
    assert all(row.met is None for row in report.rows)


def test_the_number_of_threads_is_given_back(report):
    torch.set_num_threads(1)
    with pytest.raises(UnknownName):
        bench.run(["no such case"])
    assert torch.get_num_threads() == 1


def test_an_unknown_case_is_an_error_with_the_nearest():
    with pytest.raises(UnknownName, match="forward"):
        bench.run(["forwrd"])


def test_a_group_stands_for_its_cases():
    assert bench._chosen(["rows", "decode"]) == ["forward", "decode", "bare", "bare_decode"]


def test_different_outputs_are_an_error_and_nothing_is_timed(monkeypatch):
    calls = []
    monkeypatch.setattr(_training, "interleaved", lambda *a: calls.append(a))
    plain = _training.Sides.__init__

    def disturbed(self, *args):
        plain(self, *args)
        with torch.no_grad():
            for p in self.ours.veneer.parameters():
                p.add_(0.01)

    monkeypatch.setattr(_training.Sides, "__init__", disturbed)
    with pytest.raises(VeneerError, match="differ"):
        _training.step("lora", bench.Size.small())
    assert not calls


def test_a_miss_is_reported_as_a_miss_with_its_limit():
    row = bench.Row.of("x", "y", [2.0, 2.0, 2.0], [1.0, 1.0, 1.0], expected=bench.Expectation(0.95, "why"))
    assert row.met is False
    text = str(bench.Report({}, [row]))
    assert "MISSED" in text
    assert "why" in text
    assert bench.Row.of("x", "y", [1.0] * 3, [1.0] * 3, expected=bench.Expectation(0.95)).met is True


@pytest.mark.slow
def test_memory_is_measured_in_child_processes():
    rows = bench.run(["memory"], size=bench.Size.small(), quiet=True).rows
    assert [row.setting.split(",")[0] for row in rows] == list(_training.METHODS)
