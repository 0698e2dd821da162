"""Controls: made from the anchor, trained as they say, and judged; a control that misbehaves is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import training_tiny as tiny
from test_comparing_fake import RATES, FakeTrainer
from veneer.comparing import compare, parse_arm, parse_budget, prepare
from veneer.comparing.inference.analysis import Scores
from veneer.comparing.planning.control_hooks import BROKEN
from veneer.comparing.planning.controls import judged, parse_controls, with_controls
from veneer.comparing.running.runner import default_runner
from veneer.errors import BadOption, UnknownName, Unsupported

torch.set_num_threads(1)
OPTIONS = {"epochs": 2, "batch_size": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    spec = tiny.saved_bert(tmp_path_factory.mktemp("bert"))
    return default_runner(spec, tiny.opened(), task=None, budget=parse_budget("published"), options=OPTIONS)


def trained(runner, arm, folder, seed=3):
    found = runner(arm=parse_arm(arm), seed=seed, learning_rate=2e-2, splits=("validation",), output=folder)
    return found, load_file(folder / "adapter.safetensors")


def norms(tensors):
    sites = sorted(key[:-2] for key in tensors if key.endswith("/A"))
    return {site: (tensors[f"{site}/B"] @ tensors[f"{site}/A"]).norm().item() for site in sites}


def test_a_random_direction_has_the_norm_of_what_lora_learned_and_another_direction(runner, tmp_path):
    _, learned = trained(runner, "lora:rank=2", tmp_path / "a")
    found, drawn = trained(runner, "random_direction:rank=2", tmp_path / "b")
    one, two = norms(learned), norms(drawn)
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)
    assert min(one.values()) > 1e-3
    for site in one:
        a, b = (tensors[f"{site}/B"] @ tensors[f"{site}/A"] for tensors in (learned, drawn))
        assert abs((a * b).sum().item()) < 0.5 * one[site] * two[site]
    head = [key for key in drawn if "classifier" in key]
    assert found.trainable_parameters == sum(drawn[key].numel() for key in head) == 66
    fresh = trained(runner, "linear_probe", tmp_path / "c")[1]
    assert any(not torch.equal(drawn[key], fresh[key]) for key in head)  # the head trained, on other features


def test_other_seeds_draw_other_directions_and_equal_seeds_the_same(runner, tmp_path):
    arm = "random_direction:rank=2"
    one, again, other = (
        trained(runner, arm, tmp_path / n, seed)[1] for n, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    key = next(k for k in one if k.endswith("/A"))
    assert torch.equal(one[key], again[key])
    assert not torch.equal(one[key], other[key])


def test_a_broken_scale_is_the_anchor_with_its_update_multiplied(runner, tmp_path):
    _, learned = trained(runner, "lora:rank=2", tmp_path / "a")
    _, broken = trained(runner, "broken_scale:rank=2", tmp_path / "b")
    assert learned.keys() == broken.keys()
    for key, value in learned.items():
        factor = BROKEN if key.endswith("/B") else 1.0
        assert torch.equal(broken[key], factor * value)


def test_a_duplicate_is_the_anchor_with_other_draws(runner, tmp_path):
    _, learned = trained(runner, "lora:rank=2", tmp_path / "a")
    _, copy = trained(runner, "duplicate:rank=2", tmp_path / "b")
    assert learned.keys() == copy.keys()
    assert all(not torch.equal(copy[key], value) for key, value in learned.items())


def test_an_anchor_whose_update_is_not_its_product_has_no_norm_to_match(runner, tmp_path):
    with pytest.raises(Unsupported, match="no norm to match"):
        trained(runner, "random_direction:init=pissa,rank=2", tmp_path)


def test_controls_take_the_options_of_the_anchor_and_stand_beside_it():
    arms = [parse_arm(text) for text in ("untrained", "lora:rank=4", "lora:rank=2", "dora")]
    names = [str(arm) for arm in with_controls(arms, parse_controls("duplicate"))]
    assert names == [
        "untrained",
        "random_direction:rank=4",
        "duplicate:rank=4",
        "lora:rank=4",
        "lora:rank=2",
        "dora",
    ]
    alone = [str(arm) for arm in with_controls([parse_arm("dora")], parse_controls(None))]
    assert alone == ["lora", "random_direction", "dora"]
    assert parse_controls("none") == ()
    with pytest.raises(UnknownName, match="brokn_scale"):
        parse_controls("brokn_scale")
    with pytest.raises(BadOption, match="needs the arm 'lora:rank=3'"):
        with_controls([parse_arm("lora:rank=4"), parse_arm("duplicate:rank=3")], ())


def test_controls_without_trials_run_at_the_rate_of_their_anchor(tmp_path):
    class Knows(FakeTrainer):
        def __call__(self, *, arm, **job):
            self.calls.append((str(arm), job["seed"], job["learning_rate"], job["splits"]))
            return FakeTrainer.__call__(self, arm=arm.anchor, **job)

    trainer = Knows()
    result = compare(
        "m", "d", "lora:rank=4", output=tmp_path, run_arm=trainer, progress=None, rates=RATES, budget="demo",
        controls="duplicate,broken_scale",
    )  # fmt: skip
    assert "random_direction:rank=4" not in result.design.rates
    assert len(result.design.rates["duplicate:rank=4"]) == 3
    asked = {(arm, rate) for arm, _, rate, _ in trainer.calls if arm.startswith(("random", "broken"))}
    chosen = next(row["learning_rate"] for row in result.rows if row["arm"] == "lora:rank=4")
    assert asked == {("random_direction:rank=4", chosen), ("broken_scale:rank=4", chosen)}
    assert result.best not in ("duplicate:rank=4", "broken_scale:rank=4", "random_direction:rank=4")
    said = {line["control"]: line for line in result.to_dict()["controls"]}
    assert set(said) == {"untrained", "random_direction", "duplicate", "broken_scale"}
    assert said["untrained"]["behaved"] is True
    assert said["broken_scale"]["behaved"] is False  # this trainer cannot break it, and that is seen
    assert said["duplicate"]["behaved"] is True


def test_a_control_whose_anchor_was_not_measured_is_not_applicable(tmp_path):
    class Fails(FakeTrainer):
        def __call__(self, **job):
            if job["arm"].method == "lora":
                raise Unsupported("this base has no attention.")
            return super().__call__(**job)

    result = compare(
        "m", "d", "lora:rank=4", output=tmp_path, run_arm=Fails(), progress=None, rates=RATES, budget="demo",
        controls="broken_scale",
    )  # fmt: skip
    missing = {other["arm"]: other["reason"] for other in result.to_dict()["not_measured"]}
    assert missing["broken_scale:rank=4"] == "its anchor was not measured"


def test_each_control_is_judged_by_what_was_expected_of_it():
    rng = np.random.default_rng(0)

    def scores(mean):
        return (rng.random((6, 300)) < mean).astype(float)

    of = {
        "untrained": scores(0.5), "lora": scores(0.8), "random_direction": scores(0.9), "duplicate": scores(0.6),
        "broken_scale": scores(0.8),
    }  # fmt: skip
    seeds = dict.fromkeys(of, tuple(range(6)))
    found = {
        line["control"]: line["behaved"]
        for line in judged(Scores(of, seeds, tuple(map(str, range(300)))), list(of))
    }
    assert found == {"untrained": True, "random_direction": False, "duplicate": False, "broken_scale": False}


def test_what_one_side_alone_shows_is_said_so_where_the_interval_beside_it_holds_zero():
    rng = np.random.default_rng(0)
    for gap in np.linspace(0.0, 0.2, 41):
        of = {
            name: (rng.random((3, 200)) < 0.7 - m).astype(float)
            for name, m in (("lora", 0.0), ("random_direction", gap))
        }
        line = judged(
            Scores(of, dict.fromkeys(of, (0, 1, 2)), tuple(map(str, range(200)))),
            ["lora", "random_direction"],
        )[0]
        holds_zero = line["low"] < 0 < line["high"]
        if "better" in line["said"]:
            assert ("side alone" in line["said"]) == holds_zero
        else:
            assert holds_zero


def test_a_comparison_has_the_anchor_and_a_random_direction_unless_it_says_otherwise(runner):
    def arms(**given):
        return prepare(runner.model, tiny.opened(), "ia3", **OPTIONS, **given).design.arms

    assert arms() == ("untrained", "linear_probe", "full", "lora", "random_direction", "ia3")
    assert arms(controls="none") == ("untrained", "linear_probe", "full", "lora", "ia3")


@pytest.mark.slow
def test_in_a_whole_comparison_every_control_behaves(runner, tmp_path):
    result = compare(
        runner.model, tiny.opened(400, 100, 200), "lora:rank=4", output=tmp_path, seeds=3, trials=1, costs=False,
        progress=None, rates={"lora": [2e-2]}, extend_rates=0, controls="duplicate,broken_scale", epochs=8,
        batch_size=16, device="cpu",
    )  # fmt: skip
    said = {line["control"]: line["behaved"] for line in result.to_dict()["controls"]}
    assert said == dict.fromkeys(("untrained", "random_direction", "duplicate", "broken_scale"), True)
