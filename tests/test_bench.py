"""The benchmarks run, at a toy size, and compare outputs before they time anything. No speed is asserted."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("peft")

from veneer import bench
from veneer.bench import _clock, _training
from veneer.errors import UnknownName, VeneerError

QUICK = [case for case in bench.CASES if case != "memory"]


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
    assert bench._chosen(["rows", "decode"]) == ["forward", "decode"]


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
