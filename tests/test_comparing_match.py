"""Equal trained parameters: sizes are chosen by counting, and an arm that cannot come near enough says so."""

from __future__ import annotations

import functools

import pytest

import training_tiny as tiny
from veneer.comparing import parse_arm, prepare
from veneer.comparing.planning.match import matched, parse_tolerance
from veneer.errors import BadOption

OPTIONS = {"batch_size": 8, "device": "cpu", "controls": "none"}


@pytest.fixture(scope="module")
def design(tmp_path_factory):
    spec = tiny.saved_bert(tmp_path_factory.mktemp("bert"))
    methods = "lora:rank=4,dora,prefix_tuning,fish_mask,bitfit,vera:rank=3,oft,ladder_side_tuning"

    @functools.cache
    def made(match_to=None):
        given = {} if match_to is None else {"match_to": match_to, "contrasts": [("dora", "bitfit")]}
        return prepare(spec, tiny.opened(), methods, match_parameters="2%", **OPTIONS, **given).design

    return made


@functools.cache
def model():
    return tiny.bert(2, tiny.word_tokenizer())


def counted(arm):
    from veneer import engine
    from veneer.edits import build

    return engine.plan(model(), build(arm.method, **dict(arm.options))).trainable_parameters


def test_arms_come_within_the_tolerance_of_the_anchor_or_say_how_near_they_came(design):
    found = design().matched
    target = 2 * 2 * 4 * (32 + 32)  # LoRA of rank 4 at query and value of two blocks
    assert found["lora:rank=4"]["parameters"] == target
    assert all(said["target"] == target for said in found.values())
    for arm, said in found.items():
        assert said["within"] == (abs(said["parameters"] - target) <= 0.02 * target), arm
        if arm != "lora:rank=4":
            # Some entries of masks and biases lie in the head, which is apart.
            slack = 4 if arm.startswith("fish_mask") else 2
            assert abs(said["parameters"] - counted(parse_arm(arm))) <= slack
    assert found["prefix_tuning:length=8"]["within"]
    assert any(arm.startswith("fish_mask:keep_ratio=") and said["within"] for arm, said in found.items())
    assert found["dora:rank=3"]["said"].endswith("rank=3 is the nearest that this base allows")
    assert "no option for its size" in found["bitfit"]["said"]
    assert "size was typed" in found["vera:rank=3"]["said"]


def test_the_chosen_size_is_the_nearest_there_is(design):
    target = 1024
    for text in ("dora", "oft"):
        (arm,) = (parse_arm(a) for a in design().arms if a.startswith(text))
        ((knob, _),) = arm.options
        here = abs(counted(arm) - target)
        for other in range(1, 40):
            try:
                count = counted(parse_arm(f"{text}:{knob}={other}"))
            except BadOption:
                continue
            assert here <= abs(count - target), (arm, other)


def test_a_number_can_stand_in_place_of_the_anchor_and_contrasts_follow(design):
    made = design(match_to=3000)
    assert {said["target"] for said in made.matched.values()} == {3000}
    assert made.matched["lora:rank=4"]["said"].endswith("its size was typed")
    assert made.contrasts[0] == (next(a for a in made.arms if a.startswith("dora:rank=")), "bitfit")


def test_sizes_are_part_of_the_design_and_printed(design):
    assert design().sha256 != design(match_to=3000).sha256


@pytest.mark.parametrize("text", ["-1%", "two", "100%", "1.5"])
def test_a_tolerance_that_is_none_is_an_error(text):
    with pytest.raises(BadOption, match="expected a part"):
        parse_tolerance(text)
    assert parse_tolerance("2%") == parse_tolerance(0.02) == 0.02


def test_an_arm_that_the_base_refuses_is_left_as_it_is_with_the_reason():
    def count(arm):
        if arm.method == "dora":
            raise BadOption("no such place.")
        return 100 * dict(arm.options).get("rank", 8)

    arms = [parse_arm("lora"), parse_arm("dora"), parse_arm("vera")]
    found = matched(arms, count, 0.02)
    arm, said = found[arms[1]]
    assert (arm, said.parameters, said.within, said.said) == (arms[1], None, False, "no such place.")
