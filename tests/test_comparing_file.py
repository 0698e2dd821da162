"""The comparison file: what is read, what is refused with the nearest name, and what is written back."""

from __future__ import annotations

import inspect
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_comparing_fake import RATES, SIZES, FakeTrainer
from veneer.comparing import FIELDS, compare, prepare, read_comparison, write_comparison
from veneer.comparing.planning.file import checked
from veneer.errors import BadFile, BadOption, UnknownName, UnknownOption

TOML = """
model = "builtin:minilm"
data = "reviews.csv"
methods = ["lora:rank=4", "dora"]
seeds = 3
contrasts = [["lora:rank=4", "dora"]]
max-length = 64

[rates]
dora = [0.001, 0.01]

[claim]
name = "C7"
"""
YAML = """
model: builtin:minilm
data: reviews.csv
arms: lora:rank=4,dora
seeds: 3
contrasts: ["lora:rank=4,dora"]
options: {max_length: 64}
rates: {dora: [0.001, 0.01]}
claim: {name: C7}
"""


def written(folder, text, name="c.toml"):
    path = folder / name
    path.write_text(text)
    return path


def test_toml_and_yaml_say_the_same_in_the_names_of_the_flags(tmp_path):
    one, two = (
        read_comparison(written(tmp_path, text, name)) for text, name in ((TOML, "a.toml"), (YAML, "a.yaml"))
    )
    assert one == two
    assert one["methods"] == ["lora:rank=4", "dora"]
    assert one["contrasts"] == [("lora:rank=4", "dora")]
    assert one["max_length"] == 64


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("metrik = 'f1'", UnknownOption, "metric"),
        ("batch_sise = 4", UnknownOption, "batch_size"),
        ("seeds = 'six'", BadOption, "a whole number, or a list of them"),
        ("methods = 3", BadOption, "a list of texts"),
        ("contrasts = [['a', 'b', 'c']]", BadOption, "pairs"),
        ("rates = [0.1]", BadOption, "a table of lists of numbers"),
        ("smallest_effect = true", BadOption, "a number"),
        ("methods = ['lora']\narms = ['dora']", BadOption, "twice"),
        ("model = 'a'\nmodels = ['a', 'b']", BadOption, "both given"),
        ("[[data]]\npath = 'a'\ncolums = 'x'", UnknownName, "columns"),
        ("[[data]]\ntask = 'classify'", BadOption, "data = "),
        ("model = builtin", BadFile, "line 1"),
    ],
)
def test_what_a_file_cannot_say_is_an_error_with_the_nearest_name(tmp_path, text, error, said):
    with pytest.raises(error) as caught:
        read_comparison(written(tmp_path, text))
    assert said in str(caught.value)


def test_files_that_are_none_are_errors(tmp_path):
    for name, text, said in (
        ("a.yaml", "a: [1", "line"),
        ("a.yaml", "- a\n- b", "list"),
        ("a.json", "{}", ".toml, .yaml or .yml"),
    ):
        with pytest.raises(BadFile) as caught:
            read_comparison(written(tmp_path, text, name))
        assert said in str(caught.value)
    with pytest.raises(BadFile, match="No such file"):
        read_comparison(tmp_path / "nothing.toml")


plain_texts = st.text(min_size=1, max_size=12).filter(
    lambda text: text.encode("utf-8", "ignore").decode() == text
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=50)
@given(
    model=plain_texts,
    methods=st.lists(plain_texts, min_size=1, max_size=3),
    effect=st.floats(allow_nan=False, allow_infinity=False),
    rates=st.dictionaries(plain_texts, st.lists(st.floats(1e-9, 10), min_size=1), min_size=1, max_size=2),
    data=st.lists(st.fixed_dictionaries({"data": plain_texts, "task": plain_texts}), min_size=1, max_size=2),
)
def test_what_is_written_reads_back_the_same(tmp_path_factory, model, methods, effect, rates, data):
    fields = {"model": model, "methods": methods, "smallest_effect": effect, "rates": rates, "data": data}
    path = tmp_path_factory.mktemp("written") / "c.toml"
    write_comparison(path, fields, design="abc")
    assert read_comparison(path) == fields


def test_every_argument_of_the_question_is_a_field_of_the_file():
    own = {
        "run_arm",
        "known_methods",
        "known_recipes",
        "families",
        "data_sha256",
        "options",
        "higher_is_better",
    }
    arguments = set(inspect.signature(prepare).parameters) - own
    assert arguments <= set(FIELDS)


def test_a_comparison_repeats_from_the_file_in_its_folder(tmp_path):
    given = {"rates": RATES, "budget": "demo", "seeds": 3, "trials": 3}
    first = compare(
        "builtin:m", "builtin:d", "lora:rank=1,lora:rank=4", output=tmp_path / "a", run_arm=FakeTrainer(),
        progress=None, **given,
    )  # fmt: skip
    fields = read_comparison(tmp_path / "a" / "comparison.toml")
    again = compare(**fields, output=tmp_path / "b", run_arm=FakeTrainer(), progress=None)
    assert again.design.sha256 == first.design.sha256
    assert (tmp_path / "b" / "scores.jsonl").read_text() == (tmp_path / "a" / "scores.jsonl").read_text()
    assert first.design.sha256 in (tmp_path / "a" / "comparison.toml").read_text()


def test_the_claim_is_part_of_what_is_hashed():
    fields = checked({"model": "m", "data": "d", "methods": "lora", "claim": {"name": "C7"}}, "here")
    one = prepare(**fields, run_arm=FakeTrainer(), sizes=SIZES).design
    two = prepare(**{**fields, "claim": {"name": "C8"}}, run_arm=FakeTrainer(), sizes=SIZES).design
    assert one.claim == {"name": "C7"}
    assert one.sha256 != two.sha256


def test_all_trials_are_published_with_the_rate_that_was_chosen(tmp_path):
    result = compare(
        "m", "d", "lora:rank=1,broken", output=tmp_path, run_arm=FakeTrainer(), progress=None, rates=RATES,
        budget="demo",
    )  # fmt: skip
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert {(t["arm"], t["learning_rate"]) for t in trials} == {
        (arm, rate) for arm, rates in result.design.rates.items() for rate in rates
    }
    assert {t["status"] for t in trials if t["arm"] == "broken"} == {"diverged"}
    assert all(sum(t["chosen"] for t in trials if t["arm"] == arm) == 1 for arm in result.design.rates)
    assert [t["validation"] for t in result.to_dict()["trials"]] == [t["validation"] for t in trials]


def test_the_files_that_the_page_shows_are_read(tmp_path):
    from test_docs import ROOT, blocks_of
    from veneer.bases import builtin_bases

    page = ROOT / "docs" / "comparing.md"
    blocks = [block.text for block in blocks_of(page) if block.language == "toml"]
    assert len(blocks) == 2
    for text in blocks:
        fields = read_comparison(written(tmp_path, text))
        for model in fields.get("models", [fields.get("model")]):
            assert model.removeprefix("builtin:") in builtin_bases()
    rows = re.findall(r"^\| (`.*?) \|", page.read_text(), flags=re.M)
    named = {name for row in rows for name in re.findall(r"`\[*(\w+)", row)}
    assert set(FIELDS) <= named  # the table has every field
