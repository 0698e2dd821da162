"""Readers under arbitrary input: rows or a clear error, nothing else; and what is written comes back."""

import csv
import io
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer import data
from veneer.data._formats import READERS, read_csv, read_jsonl
from veneer.errors import VeneerError

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ENDINGS = sorted(READERS)

words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
pieces = ["text", "label", ",", '"', "\n", "\r\n", "\t", ";", "a b", "1", "{}", "[]", "\x00", "\ufeff"]
messy_text = st.text(max_size=200) | st.lists(st.sampled_from(pieces), max_size=40).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
roles = st.sampled_from(
    [
        "text",
        "label",
        "labels",
        "tokens",
        "tags",
        "question",
        "context",
        "answers",
        "messages",
        "conversations",
        "instruction",
        "output",
        "prompt",
        "completion",
        "source",
        "target",
        "query",
        "positive",
        "negative",
        "image",
        "audio",
        "document",
        "text_pair",
    ]
)

message_keys = st.sampled_from(["role", "content", "from", "value", "tool_calls"])
speakers = ["user", "assistant", "system", "human", "gpt"]


def only_words(spec, **options):
    """Reading gives splits, or an error that a person can read."""
    said = "fine"
    try:
        data.read(spec, **options)
    except VeneerError as error:
        said = str(error)
    assert 0 < len(said) < 5000


@quick
@given(content=st.binary(max_size=300), ending=st.sampled_from(ENDINGS))
def test_arbitrary_bytes_in_any_file_never_crash(content, ending, tmp_path):
    (tmp_path / f"rows{ending}").write_bytes(content)
    only_words(tmp_path / f"rows{ending}")


@quick
@given(content=messy_text, ending=st.sampled_from([".csv", ".tsv", ".jsonl", ".json"]))
def test_arbitrary_text_behind_a_header_never_crashes(content, ending, tmp_path):
    header = "text,label\n" if ending == ".csv" else "text\tlabel\n" if ending == ".tsv" else ""
    path = tmp_path / f"rows{ending}"
    path.write_bytes((header + content).encode("utf-8", "surrogatepass"))
    only_words(path)
    only_words(path, skip_bad_rows=tmp_path / "aside.jsonl")


@quick
@given(
    rows=st.lists(st.dictionaries(roles, json_values, max_size=5), max_size=5),
    task=st.sampled_from([None, *data.TASKS]),
)
def test_arbitrary_values_under_the_names_of_roles_never_crash(rows, task, tmp_path):
    only_words(rows, task=task)
    only_words(rows, task=task, labelled=False)
    only_words(rows, task=task, skip_bad_rows=tmp_path / "aside.jsonl")


@quick
@given(messages=st.lists(st.dictionaries(message_keys, st.sampled_from(speakers) | json_values), max_size=4))
def test_arbitrary_conversations_never_crash(messages):
    only_words([{"messages": messages}])


@quick
@given(columns=st.text(max_size=30), sizes=st.text(max_size=20), split=st.none() | st.text(max_size=8))
def test_arbitrary_options_never_crash(columns, sizes, split):
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(5)]
    only_words(rows, columns=columns)
    only_words(rows, sizes=sizes)
    only_words(rows, split=split)


@quick
@given(rows=st.lists(st.tuples(words, words), max_size=8), mark=st.sampled_from([",", ";"]))
def test_well_formed_csv_comes_back_field_by_field(rows, mark):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=mark, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "label"), *rows])
    found, problems = read_csv(file.getvalue().encode())
    assert not problems
    assert [(row["text"], row["label"]) for _, row in found] == rows


@quick
@given(rows=st.lists(st.dictionaries(words, json_values, max_size=4), max_size=6), spaced=st.booleans())
def test_well_formed_json_lines_come_back_with_their_line_numbers(rows, spaced):
    gap = "\n\n" if spaced else "\n"
    found, problems = read_jsonl(gap.join(json.dumps(row) for row in rows).encode())
    assert not problems
    assert [n for n, _ in found] == [1 + i * len(gap) for i in range(len(rows))]
    assert json.dumps([row for _, row in found]) == json.dumps(rows)


@quick
@given(texts=st.lists(words.filter(str.strip), min_size=1, max_size=40), labels=st.integers(2, 4))
def test_every_good_row_is_in_exactly_one_split(texts, labels):
    rows = [{"text": text, "label": f"class {i % labels}", "n": i} for i, text in enumerate(texts)]
    report = data.check(rows)
    assert not report.problems
    if len({row["label"] for row in rows}) > 1:
        splits = data.read(rows)
        assert sorted(r["n"] for part in splits.parts.values() for r in part) == list(range(len(texts)))
        assert splits.train
