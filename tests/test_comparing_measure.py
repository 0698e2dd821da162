"""What a comparison will cost: said before it runs, from timed steps or from the runs that have ended."""

from __future__ import annotations

import pytest

import training_tiny as tiny
from veneer.comparing import compare, prepare
from veneer.comparing.planning.measure import from_ledger

pytest.importorskip("sklearn")
SMALL = {"seeds": 2, "trials": 2, "batch_size": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return tiny.saved_bert(tmp_path_factory.mktemp("bert"))


def test_time_memory_and_sizes_are_said_before_anything_is_trained(spec):
    prepared = prepare(spec, tiny.opened(), "lora:rank=2,visual_prompt_tuning", **SMALL).measure()
    expected, known = prepared.forecast, prepared.measured
    assert known.parameters["lora:rank=2"] == 2 * 2 * 2 * (32 + 32)  # sites, blocks, rank, (in + out)
    assert known.parameters["linear_probe"] == 0
    assert known.parameters["full"] > 20_000
    assert "visual_prompt_tuning" in known.cannot or "visual_prompt_tuning" in known.parameters
    assert expected.seconds > 0
    assert expected.memory[1] == "full"
    assert known.seconds["full"] > known.seconds["lora:rank=2"] > known.seconds["linear_probe"]
    said = str(prepared)
    assert "a step of linear_probe took" in said
    assert "memory of a step: about" in said


@pytest.mark.parametrize("budget", ["minutes=1", "tokens=5000", "examples=100"])
def test_every_budget_has_a_time(spec, budget):
    known = prepare(spec, tiny.opened(), "lora:rank=2", budget=budget, **SMALL).measure().measured
    assert "ms" in known.how
    assert known.seconds["lora:rank=2"] >= (60 if budget.startswith("minutes") else 0)


def test_what_cannot_be_measured_does_not_stop_the_design():
    prepared = prepare("/no/such/model", tiny.opened(), "lora", **SMALL).measure()
    assert prepared.forecast.seconds is None
    assert "time is unknown (" in str(prepared)


def test_runs_that_have_ended_say_better_than_a_probe_what_the_others_take():
    design = prepare("m", {}, "lora,dora", run_arm=lambda **job: None).design
    lines = [
        {"arm": "lora", "status": "ok", "seconds": 2.0},
        {"arm": "lora", "status": "ok", "seconds": 4.0},
        {"arm": "full", "status": "ok", "seconds": 9.0},
        {"arm": "full", "status": "failed", "seconds": 100.0},
        {"arm": "untrained", "status": "ok", "seconds": 0.5},
    ]
    found = from_ledger(design, lines)
    assert (found.seconds["lora"], found.seconds["full"]) == (3.0, 9.0)
    assert found.seconds["dora"] == pytest.approx(
        2 * 2.0
    )  # two passes, at the mean of 1, 2 and 3 seconds a pass
    assert "3 runs" in found.how
    assert from_ledger(design, lines[3:]) is None, "the untrained base says nothing of what training takes"


def test_what_is_done_is_not_forecast_again(tmp_path):
    from test_comparing_fake import RATES, SIZES, FakeTrainer

    given = {"run_arm": FakeTrainer(), "rates": RATES, "budget": "demo", "sizes": SIZES}
    trainer = FakeTrainer(stop_after=20)
    with pytest.raises(KeyboardInterrupt):
        compare("m", "d", "lora:rank=1", output=tmp_path, progress=None, **given | {"run_arm": trainer})
    expected = prepare("m", "d", "lora:rank=1", **given).measure(tmp_path).forecast
    assert (expected.runs, expected.done) == (28, 20)
    assert "20 of them done" in str(expected)
    compare("m", "d", "lora:rank=1", output=tmp_path, progress=None, **given)
    assert prepare("m", "d", "lora:rank=1", **given).measure(tmp_path).forecast.seconds == 0


def test_a_model_in_memory_has_no_adapter_more_after_it_was_timed():
    from veneer import engine

    base = tiny.bert_base()
    prepare(base, tiny.opened(), "lora", **SMALL).measure()
    assert not engine.adapters(base.model)


def test_a_person_at_a_terminal_is_asked_before_a_long_comparison(monkeypatch):
    import typer

    from veneer.cli import compare as command
    from veneer.comparing import forecast
    from veneer.comparing.planning.design import Comparison

    design = Comparison("m", "d", ("untrained", "lora"), {"lora": (0.1,)})
    long, short = (forecast(design, {}, {"lora": seconds}) for seconds in (3600.0, 1.0))
    asked = []
    monkeypatch.setattr(typer, "confirm", lambda text, **more: asked.append(text))
    command.ask(long)  # nobody sits at a terminal
    assert not asked
    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(getattr(command.sys, stream), "isatty", lambda: True)
    command.ask(short)
    assert not asked
    with pytest.raises(typer.Exit):
        command.ask(long)
    assert "7.0 h" in asked[0]


@pytest.mark.slow
def test_the_forecast_of_time_is_of_the_right_order(spec, tmp_path):
    import time

    data = tiny.opened(96, 40, 40)
    expected = prepare(spec, data, "lora", **SMALL).measure().forecast.seconds
    began = time.monotonic()
    compare(spec, data, "lora", output=tmp_path, progress=None, **SMALL)
    assert expected / 4 < time.monotonic() - began < expected * 4
