"""Arms, designs and the ledger: what is read, what is hashed, what survives a kill."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer.comparing import Arm, Comparison, Ledger, forecast, parse_arm, parse_arms, parse_budget
from veneer.comparing.planning.arms import Recipe, split_arms
from veneer.comparing.planning.design import same_question
from veneer.comparing.planning.forecast import smallest_findable
from veneer.comparing.planning.rates import centre, extension, grid, grids
from veneer.errors import BadFile, BadOption, UnknownMethod, UnknownName


def design(**changed):
    arms = ("untrained", "linear_probe", "full", "lora")
    fields = {"model": "m", "data": "d", "arms": arms, "rates": {"lora": (0.1, 1.0)}} | changed
    return Comparison(**fields)


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("lora", Arm("lora")),
        ("lora:rank=16", Arm("lora", (("rank", 16),))),
        (
            "lora:rank=16,alpha=0.5+lora_plus",
            Arm("lora", (("alpha", 0.5), ("rank", 16)), (Recipe("lora_plus"),)),
        ),
        ("lora:sites=attention.{query,value}", Arm("lora", (("sites", "attention.{query,value}"),))),
        ("ia3+a+b:x=true", Arm("ia3", (), (Recipe("a"), Recipe("b", (("x", True),))))),
        (
            "loreft:positions=prompt[:4] + prompt[-4:]+slow",
            Arm("loreft", (("positions", "prompt[:4] + prompt[-4:]"),), (Recipe("slow"),)),
        ),
        ("fusion:of='a,b'", Arm("fusion", (("of", "a,b"),))),
        ("x:rate=1e+3", Arm("x", (("rate", 1000.0),))),
    ],
)
def test_arms_are_read_as_they_are_typed(text, arm):
    assert parse_arm(text) == arm
    assert parse_arm(str(arm)) == arm


values = st.one_of(
    st.booleans(),
    st.none(),
    st.integers(-1000, 1000),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text("abc{}[],+ .:=1", min_size=0, max_size=12).filter(
        lambda text: all(text.count(a) == text.count(b) for a, b in ("{}", "[]"))
    ),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # a busy machine is no fault
@given(st.dictionaries(st.sampled_from(["rank", "alpha", "sites"]), values, max_size=3))
def test_the_normal_form_of_an_arm_reads_back_as_the_same_arm(options):
    arm = Arm("lora", tuple(sorted(options.items())), (Recipe("plus"),))
    assert parse_arm(str(arm)) == arm


def test_lists_of_arms_split_at_commas_but_not_inside_options():
    assert split_arms("lora,dora:rank=4,alpha=8,ia3") == ["lora", "dora:rank=4,alpha=8", "ia3"]
    names = [str(arm) for arm in parse_arms("lora,full")]
    assert names == ["untrained", "linear_probe", "lora", "full"]


def test_wrong_arms_are_errors_with_the_nearest_names():
    with pytest.raises(UnknownMethod) as caught:
        parse_arm("lorra:rank=2", ["lora", "dora"])
    assert "lora" in caught.value.nearest
    with pytest.raises(UnknownName) as caught:
        parse_arm("lora+lora_pluss", ["lora"], ["lora_plus"])
    assert caught.value.nearest == ("lora_plus",)
    for text in ("lora:rank", "lora:=3", ":x=1", "lora:rank=1,rank=2", ""):
        with pytest.raises(BadOption):
            parse_arm(text)
    with pytest.raises(BadOption, match="twice"):
        parse_arms(["lora:a=1,b=2", "lora:b=2,a=1"])


def test_folder_names_differ_where_arms_differ():
    slugs = {parse_arm(text).slug for text in ("lora:rank=1", "lora:rank=-1", "lora+rank", "lora")}
    assert len(slugs) == 4
    assert parse_arm("lora").slug == "lora"


@pytest.mark.parametrize("text", ["demo", "published", "examples=20000", "minutes=1.5"])
def test_budgets_read_back(text):
    assert str(parse_budget(text)) == text


@pytest.mark.parametrize("text", ["examples", "examples=-1", "tokens=x", "demo=3"])
def test_budgets_that_cannot_be_are_errors(text):
    with pytest.raises(BadOption):
        parse_budget(text)
    with pytest.raises(UnknownName, match="exmples"):
        parse_budget("exmples=3")


def test_the_hash_is_of_the_question_alone():
    one = design()
    assert one.sha256 == design(rates={"lora": (0.1, 1.0)}).sha256
    assert one.sha256 == Comparison.from_dict(json.loads(json.dumps(one.to_dict()))).sha256
    for changed in ({"metric": "f1"}, {"seeds": (1, 2)}, {"budget": "demo"}, {"smallest_effect": 0.02}):
        assert design(**changed).sha256 != one.sha256


def test_a_design_says_what_was_changed_and_whether_it_only_adds():
    one = design()
    assert same_question(one.to_dict(), design(seeds=(1, 2, 3, 4, 5, 6, 7)).to_dict()) == (["seeds"], True)
    assert same_question(one.to_dict(), design(seeds=(1, 2, 3)).to_dict()) == (["seeds"], False)
    assert same_question(one.to_dict(), design(metric="f1").to_dict()) == (["metric"], False)


def test_designs_that_cannot_be_are_errors():
    with pytest.raises(BadOption, match="seeds"):
        design(seeds=(1,))
    with pytest.raises(BadOption, match="tuning and for confirmation"):
        design(seeds=(0, 1, 2))
    with pytest.raises(UnknownName, match="dora"):
        design(contrasts=(("lora", "dora"),))
    with pytest.raises(BadOption, match="metrik"):
        Comparison.from_dict({"metrik": "f1"})


def test_the_forecast_counts_runs_and_says_what_can_be_found():
    found = forecast(design(), {"validation": 200, "test": 300}, dict.fromkeys(design().arms, 63.0))
    assert (found.tuning_runs, found.confirming_runs) == (2, 19)
    said = str(found)
    assert "21 min" in said
    assert "standard error up to 3.5 points" in said
    assert "'not separable' will not mean 'equal'" in said


def test_more_items_and_more_seeds_find_smaller_effects():
    sizes = [smallest_findable(seeds, items) for seeds, items in ((6, 100), (6, 1000), (12, 1000))]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_grids_are_public_equal_in_number_and_rise():
    assert grid(1e-3, 3) == (0.000316, 0.001, 0.00316)
    assert centre("full") == 3e-5
    assert centre("x", "additive/prompt/deep") == 1e-2
    arms = parse_arms("lora")
    found = grids(arms, 5, families={"lora": "reparameterized/low-rank"})
    assert {len(rates) for rates in found.values()} == {5}
    assert "untrained" not in found
    with pytest.raises(BadOption, match="expected 3 different positive numbers"):
        grids(arms, 3, {"lora": (1.0, 1.0, 0.1)})


def test_grids_span_what_the_method_declares_and_a_recipe_goes_before_it():
    arms = parse_arms(["lora", "lora+slow", "dora"])
    ranges = {"lora": (1e-4, 1e-2), "+slow": (1e-5, 1e-3), "dora": (1e-3, 1e-1)}
    found = grids(arms, 3, {"dora": (1, 2, 3)}, ranges)
    assert found["lora"] == (1e-4, 1e-3, 1e-2)
    assert found["lora+slow"] == (1e-5, 1e-4, 1e-3)
    assert found["dora"] == (1.0, 2.0, 3.0)
    assert extension(found["lora"], 1e-2, {"low": 1, "high": 1}) == 0.1
    assert extension(found["lora"], 1e-4, {"low": 1, "high": 1}) == 1e-5
    assert extension(found["lora"], 1e-4, {"low": 0, "high": 1}) is None
    assert extension(found["lora"], 1e-3, {"low": 1, "high": 1}) is None


def test_a_family_stands_for_its_methods():
    families = {
        "ia3": "additive/rescaling",
        "prefix": "additive/prompt",
        "lora": "reparameterized",
        "full": "x",
    }
    names = [str(arm) for arm in parse_arms("additive", families, families=families)]
    assert names == ["untrained", "linear_probe", "full", "ia3", "prefix"]
    assert str(parse_arms("additive/prompt,lora", families, families=families)[-2]) == "prefix"
    assert len(parse_arms("all", families, families=families)) == 6
    with pytest.raises(UnknownMethod):
        parse_arms("addit", families, families=families)


def test_a_torn_last_line_is_dropped_and_cut_off_before_the_next(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append({"kind": "run", "n": 1})
    with open(ledger.path, "a") as file:
        file.write('{"kind": "run", "n"')
    again = Ledger(tmp_path)
    assert [line["n"] for line in again.lines] == [1]
    again.append({"kind": "run", "n": 2})
    assert [line["n"] for line in Ledger(tmp_path).lines] == [1, 2]
    assert ledger.path.read_text().count("\n") == 2


def test_a_ledger_cut_at_any_byte_keeps_all_whole_lines(tmp_path):
    ledger = Ledger(tmp_path)
    for n in range(3):
        ledger.append({"n": n, "text": "é"})
    data = ledger.path.read_bytes()
    for size in range(len(data) + 1):
        ledger.path.write_bytes(data[:size])
        assert [line["n"] for line in Ledger(tmp_path).lines] == list(range(data[:size].count(b"\n")))


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path):
    ledger = Ledger(tmp_path)
    for n in range(3):
        ledger.append({"n": n})
    ledger.path.write_text(ledger.path.read_text().replace('{"n": 1}', '{"n": '))
    with pytest.raises(BadFile, match="line 2"):
        Ledger(tmp_path)
