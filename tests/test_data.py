"""Reading: every kind of file gives the same rows, and every kind of bad row is found with its line."""

import json

import pytest

from veneer import data
from veneer.errors import BadData, BadOption, UnknownName, UnknownOption

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def pairs(count=12):
    """Rows of two columns, every text another one."""
    return [
        {"text": f"the {WORDS[i % 12]} film, number {i}", "label": "good" if i % 3 else "bad"}
        for i in range(count)
    ]


def write(path, rows, kind):
    if kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        quote = (lambda s: f'"{s}"') if kind == "csv" else str
        path.write_text(
            "text" + mark + "label\n" + "".join(f"{quote(r['text'])}{mark}{r['label']}\n" for r in rows)
        )
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif kind == "json":
        path.write_text(json.dumps({"version": 1, "data": rows}))
    elif kind == "parquet":
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def everything(splits):
    return sorted((r["text"], r["label"]) for rows in splits.parts.values() for r in rows)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    splits = data.read(write(tmp_path / f"rows.{kind}", pairs(), kind))
    assert (splits.task, splits.labels) == ("classify", ["bad", "good"])
    assert everything(splits) == sorted((r["text"], r["label"]) for r in pairs())
    assert [len(rows) for rows in splits.parts.values()] == [10, 1, 1]


def test_a_saved_data_set_a_table_and_rows_in_memory_are_read_too(tmp_path):
    import datasets
    import pandas

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])}
    )
    table = datasets.Dataset.from_list(pairs(), features=features)
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    own_order = ["good", "bad"]  # a data set's own order of classes is kept; elsewhere it is the alphabet's
    specs = [(tmp_path / "saved", own_order), (table, own_order)]
    for spec, labels in [*specs, (pairs(), own_order[::-1]), (pandas.DataFrame(pairs()), own_order[::-1])]:
        splits = data.read(spec)
        assert everything(splits) == sorted((r["text"], r["label"]) for r in pairs())
        assert splits.labels == labels


def test_files_named_after_splits_are_these_splits(tmp_path):
    rows = pairs(12)
    for name, part in (("train", rows[:8]), ("dev", rows[8:10]), ("test", rows[10:])):
        write(tmp_path / f"{name}.csv", part, "csv")
    splits = data.read(tmp_path)
    assert [len(part) for part in splits.parts.values()] == [8, 2, 2]
    assert splits.test[0]["text"] == rows[10]["text"]
    assert len(data.read(tmp_path, split="train")) == 8
    with pytest.raises(UnknownName, match=r"no split 'extra'(.|\n)*train"):
        data.read(tmp_path, split="extra")


def test_a_missing_split_is_cut_from_the_one_that_is_there(tmp_path):
    write(tmp_path / "train.csv", pairs(20), "csv")
    splits = data.read(tmp_path)
    assert [len(part) for part in splits.parts.values()] == [16, 2, 2]
    other = [{**r, "text": "another " + r["text"]} for r in pairs(6)]
    write(tmp_path / "validation.csv", other, "csv")
    splits = data.read(tmp_path)
    assert [len(part) for part in splits.parts.values()] == [20, 3, 3]
    assert all("half" in note for note in splits.report.notes if "test" in note)


def test_images_in_class_folders_are_rows_and_a_file_that_is_no_image_is_found(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + name.encode() + bytes([i]))
    splits = data.read(tmp_path)
    assert (splits.task, splits.labels, len(splits)) == ("image-classify", ["cat", "dog"], 8)
    (tmp_path / "dog" / "9.png").write_bytes(b"not an image")
    with pytest.raises(BadData, match=r"bad file: 1 \(line 9\)"):
        data.read(tmp_path)


@pytest.mark.parametrize(
    "audio", [{}, "", "{}", {"path": "nowhere.wav"}, ["a"], 3, {"array": ["b"]}], ids=repr
)
def test_what_is_no_sound_is_a_bad_row(audio):
    with pytest.raises(BadData, match="sound"):
        data.read([{"audio": audio, "text": "a word"}] * 4, task="speech")


@pytest.mark.parametrize("form", ["list", "array", "bytes", "path"])
def test_a_sound_is_numbers_bytes_or_a_file(form, tmp_path):
    import numpy as np

    def sound(i):
        numbers = [0.0, 0.25, i / 16]
        (tmp_path / f"{i}.wav").write_bytes(bytes([i] * 8))
        return {
            "list": {"array": numbers, "sampling_rate": 16000},
            "array": {"array": np.array(numbers), "sampling_rate": 16000, "path": None},
            "bytes": {"bytes": bytes([i] * 8), "path": None},
            "path": tmp_path / f"{i}.wav",
        }[form]

    splits = data.read([{"audio": sound(i), "text": f"word {i}"} for i in range(10)], task="speech")
    assert sum(len(part) for part in splits.parts.values()) == 10


# Splits


def test_the_cut_does_not_depend_on_the_order_of_the_file():
    rows = pairs(60)
    one, two = data.read(rows), data.read(rows[::-1])
    assert one.parts == two.parts
    assert [len(p) for p in data.read(rows, sizes="validation=7,test=0.25").parts.values()] == [38, 7, 15]
    assert [len(p) for p in data.read(rows, sizes=(5, 4)).parts.values()] == [51, 5, 4]
    with pytest.raises(BadOption, match="sizes"):
        data.read(rows, sizes="test=many")


def test_test_rows_are_those_with_the_lowest_hash_of_their_text():
    import hashlib

    rows = pairs(30)
    lowest = sorted(rows, key=lambda r: hashlib.sha1(r["text"].encode()).hexdigest())
    splits = data.read(rows)
    assert [r["text"] for r in splits.test] == [r["text"] for r in lowest[:3]]
    assert [r["text"] for r in splits.validation] == [r["text"] for r in lowest[3:6]]


def test_nearly_the_same_texts_are_never_in_two_splits():
    rows = pairs(30) + [{**r, "text": r["text"].upper().replace(",", " -") + "!"} for r in pairs(30)]
    splits = data.read(rows)
    plain = {
        s: {"".join(c for c in r["text"].lower() if c.isalnum()) for r in p} for s, p in splits.parts.items()
    }
    assert len(splits) == 60
    assert plain["train"].isdisjoint(plain["test"] | plain["validation"])
    assert plain["validation"].isdisjoint(plain["test"])
    assert any("30 texts occur more than once" in note for note in splits.report.notes)


def test_case_counts_in_texts_of_one_word():
    splits = data.read(
        [{"text": t, "label": i % 2} for i, t in enumerate(["CCO", "cco", "CCN", "ccn", "CCS", "ccs"])]
    )
    assert not any("more than once" in note for note in splits.report.notes)


def test_rows_of_one_group_stay_together_and_copies_of_tested_rows_leave_training():
    rows = [{**r, "book": i % 6} for i, r in enumerate(pairs(60))]
    rows += [{"text": "Amen, amen.", "label": "good", "book": b} for b in range(6)]
    splits = data.read(rows, group="book")
    books = [{r["book"] for r in part} for part in splits.parts.values()]
    assert books[0].isdisjoint(books[1] | books[2])
    assert books[1].isdisjoint(books[2])
    assert sum(r["text"] == "Amen, amen." for p in splits.parts.values() for r in p) == 1
    assert any("left out of training" in note for note in splits.report.notes)
    with pytest.raises(BadData, match="nearest: book"):
        data.read(rows, group="boook")


# Bad rows


BAD_CSV = {
    "ragged": ("the third,good,extra", "ragged: 1 (line 4)", "3 fields where the header has 2"),
    "empty text": (" ,good", "empty text: 1 (line 4)", "text is empty"),
    "missing label": ("the third,", "missing label: 1 (line 4)", "the label is empty"),
    "encoding": ("caf\udce9 noir,good", "encoding: 1 (line 4)", "not UTF-8 at character 4"),
    "quotes": ('"the third,good', "quotes: 1 (line 4)", "unexpected end of data"),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_a_bad_row_is_an_error_with_its_line_and_is_set_aside_on_request(tmp_path, kind):
    line, says, message = BAD_CSV[kind]
    good = "".join(f"{r['text'].replace(',', '')},{r['label']}\n" for r in pairs())
    first, rest = good.split("\n", 2)[:2], good.split("\n", 2)[2]
    text = (
        "text,label\n" + "\n".join(first) + "\n" + (rest + line if kind == "quotes" else line + "\n" + rest)
    )
    (tmp_path / "bad.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    says = says.replace("line 4", "line 14") if kind == "quotes" else says
    with pytest.raises(BadData) as error:
        data.read(tmp_path / "bad.csv")
    assert says in str(error.value)
    assert message in str(error.value)
    assert "--skip-bad-rows" in error.value.next_step
    splits = data.read(tmp_path / "bad.csv", skip_bad_rows=tmp_path / "aside.jsonl")
    assert len(splits) == 12
    assert splits.report.set_aside == 1
    (aside,) = map(json.loads, (tmp_path / "aside.jsonl").read_text().splitlines())
    assert (aside["problem"], aside["line"]) == (kind, 14 if kind == "quotes" else 4)


def test_lines_are_counted_through_quoted_line_breaks_and_empty_lines(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",good\n\nfine,bad\n,good\n')
    report = data.check(tmp_path / "a.csv")
    assert [(p.kind, p.line) for p in report.problems] == [("empty text", 6)]


def test_bad_json_lines_are_found_and_the_others_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a b", "label": 1}\n{"text": "c d", \n[1]\n\n{"text": "e f", "label": 0}\n'
    )
    report = data.check(tmp_path / "a.jsonl")
    assert [(p.kind, p.line) for p in report.problems] == [("json", 2), ("json", 3)]
    assert sum(report.counts.values()) == 2


def test_many_bad_rows_are_counted_and_the_first_five_named():
    rows = pairs(20) + [{"text": "", "label": "good"}] * 7
    with pytest.raises(BadData, match=r"7 rows(.|\n)*line 21, line 22, line 23, line 24, line 25, \.\.\."):
        data.read(rows)


def test_a_row_that_copies_a_test_row_is_a_problem_of_the_training_row(tmp_path):
    rows = pairs(12)
    write(tmp_path / "test.csv", rows[:3], "csv")
    write(tmp_path / "train.csv", rows[3:] + [{**rows[1], "text": rows[1]["text"].upper()}], "csv")
    with pytest.raises(BadData, match=r"duplicate between splits: 1 \(train line 11\).*test line 3"):
        data.read(tmp_path)
    splits = data.read(tmp_path, skip_bad_rows=tmp_path / "aside.jsonl")
    assert len(splits.test) == 3
    assert len(splits) == 12


def test_a_label_that_only_the_test_has_or_that_is_not_among_the_given_is_unknown(tmp_path):
    write(tmp_path / "train.csv", pairs(9), "csv")
    write(tmp_path / "test.csv", [{"text": "quite another one", "label": "goood"}], "csv")
    with pytest.raises(BadData, match=r"unknown label: 1 \(test line 2\).*'goood'.*nearest: good"):
        data.read(tmp_path)
    with pytest.raises(BadData, match="unknown label: 3"):
        data.read(pairs(9), labels=["good", "worse"])
    assert data.read(pairs(9), labels=["good", "middling", "bad"]).labels == ["good", "middling", "bad"]


def test_an_empty_set_one_label_and_a_missing_column_are_errors(tmp_path):
    with pytest.raises(BadData, match="has no rows"):
        data.read([])
    (tmp_path / "header.csv").write_text("text,label\n")
    with pytest.raises(BadData, match="has no rows"):
        data.read(tmp_path / "header.csv")
    with pytest.raises(BadData, match="one label only, 'good'"):
        data.read([{"text": f"text {i}", "label": "good"} for i in range(5)])
    with pytest.raises(
        BadData, match=r"needs the column 'label'; the data has 'text', 'lable'(.|\n)*nearest: lable"
    ):
        data.read([{"text": "a b", "lable": 1}], task="classify")
    with pytest.raises(BadData, match="no task fits the columns: the data has 'a', 'b'"):
        data.read([{"a": "x", "b": "y"}])


def test_a_file_of_the_wrong_ending_or_kind_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"PAR1 and so on")
    with pytest.raises(BadData, match="Parquet"):
        data.read(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(b"text,label")
    with pytest.raises(BadData, match="not readable as Parquet"):
        data.read(tmp_path / "a.parquet")
    (tmp_path / "a.xlsx").write_bytes(b"")
    with pytest.raises(BadData, match=r"'\.xlsx', which veneer does not read(.|\n)*nearest: \.csv"):
        data.read(tmp_path / "a.xlsx")
    with pytest.raises(UnknownName, match=r"no file or folder(.|\n)*nearest: a\.csv"):
        data.read(tmp_path / "b.csv")
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    with pytest.raises(BadData, match="names 'text' more than once"):
        data.read(tmp_path / "twice.csv")


def test_utf_16_byte_order_marks_and_semicolons_are_read(tmp_path):
    text = "text;label\n" + "".join(f"{r['text']};{r['label']}\n" for r in pairs())
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.csv").write_bytes(text.encode(encoding))
        assert everything(data.read(tmp_path / "a.csv")) == sorted((r["text"], r["label"]) for r in pairs())


def test_rows_that_are_too_long_for_the_model_are_found_with_a_tokenizer():
    class Tokenizer:
        def __call__(self, text, pair=None):
            return {"input_ids": [0, *text.split(), *(pair or "").split(), 0]}

    rows = [*pairs(9), {"text": "word " * 30, "label": "good"}]
    with pytest.raises(BadData, match=r"too long: 1 \(line 10\); first: 32 tokens, more than 20"):
        data.read(rows, tokenizer=Tokenizer(), max_length=20)
    report = data.check(rows, tokenizer=Tokenizer())
    assert report.length_unit == "tokens"
    assert max(spread["max"] for spread in report.lengths.values()) == 32


# Columns and tasks


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"review": "a b", "stars": "3"}, "classify"),
        ({"sentence1": "a b", "sentence2": "c d", "label": "yes"}, "classify"),
        ({"text": "a b", "label": 0.25}, "regress"),
        ({"text": "a b", "label": "0.25"}, "regress"),
        ({"text": "a b", "labels": ["x", "y"]}, "multilabel"),
        ({"tokens": ["a", "b"], "ner_tags": ["O", "P"]}, "tag"),
        (
            {"question": "which?", "context": "this one", "answers": {"text": ["this"], "answer_start": [0]}},
            "qa",
        ),
        ({"query": "a b", "positive": "c", "negative": "d"}, "rank"),
        ({"text": "a b"}, "lm"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "instruct"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "instruct"),
        ({"instruction": "a", "input": "", "output": "b"}, "instruct"),
        ({"prompt": "a", "completion": "b"}, "instruct"),
        ({"question": "a", "answer": "b"}, "instruct"),
        ({"source": "a", "target": "b"}, "seq2seq"),
        ({"article": "a", "highlights": "b"}, "seq2seq"),
        ({"translation": {"en": "a", "pt": "b"}}, "seq2seq"),
    ],
)
def test_columns_and_values_tell_the_task(row, task):
    assert data.check([row]).task == task
    assert not data.check([row]).problems


def test_a_few_whole_numbers_are_classes_and_many_are_a_quantity():
    few = [{"text": f"text {i}", "label": i % 5} for i in range(100)]
    many = [{"text": f"text {i}", "label": i} for i in range(100)]
    assert data.read(few).labels == ["0", "1", "2", "3", "4"]
    assert data.read(many).task == "regress"
    assert data.read(many, task="classify").labels[9:11] == ["9", "10"]


def test_columns_are_mapped_by_a_dict_or_a_line_and_others_stay_beside():
    rows = [
        {"id": i, "body_html": f"text {i}", "topic": "ab"[i % 2], "label": 0.5, "lang": "en"}
        for i in range(9)
    ]
    for columns in ({"text": "body_html", "label": "topic"}, "text=body_html, label=topic"):
        splits = data.read(rows, columns=columns)
        assert splits.columns == {"text": "body_html", "label": "topic"}
        assert set(splits.train[0]) == {"text", "label", "id", "lang"}
        assert splits.labels == ["a", "b"]
    with pytest.raises(UnknownOption, match="nearest: text"):
        data.read(rows, columns="txt=body_html")
    with pytest.raises(BadData, match="nearest: body_html"):
        data.read(rows, columns="text=body")
    with pytest.raises(BadOption, match="names no column"):
        data.read(rows, columns="text")
    with pytest.raises(UnknownOption, match=r"no option 'colums'(.|\n)*nearest: columns"):
        data.read(rows, colums="text=body_html")
    with pytest.raises(UnknownName, match="nearest: classify"):
        data.read(rows, columns="text=body_html", task="classfy")


def test_several_columns_of_zeros_and_ones_are_many_labels():
    rows = [{"text": f"text {i}", "rude": i % 2, "spam": str(i % 3 // 2)} for i in range(9)]
    splits = data.read(rows, columns="label=rude+spam")
    assert (splits.task, splits.labels) == ("multilabel", ["rude", "spam"])
    assert {r["text"]: r["label"] for p in splits.parts.values() for r in p}["text 5"] == ["rude", "spam"]
    with pytest.raises(BadData, match="expected 0 or 1"):
        data.read([*rows, {"text": "more text", "rude": 2, "spam": 0}], columns="label=rude+spam")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "bad tags"),
        (
            {"question": "which?", "context": "this one", "answers": {"text": ["that"], "answer_start": [0]}},
            "bad answer",
        ),
        (
            {"question": "which?", "context": "this one", "answers": {"text": [], "answer_start": []}},
            "missing label",
        ),
        ({"text": "a b", "label": [["x"]]}, "bad label"),
        ({"source": "a b", "target": " "}, "empty text"),
        ({"audio": "nowhere.wav", "text": "a b"}, "bad file"),
        ({"image": "nowhere.png", "label": "a"}, "bad file"),
        ({"text": ["a"], "label": "x"}, "bad text"),
    ],
)
def test_what_a_task_cannot_use_is_found(row, kind):
    assert [p.kind for p in data.check([row]).problems] == [kind]


def test_words_and_tags_in_one_field_each_are_taken_apart():
    splits = data.read([{"tokens": f"word{i} . end", "tags": '["N", "P", "N"]'} for i in range(5)])
    assert splits.labels == ["N", "P"]
    assert splits.train[0]["tags"] == ["N", "P", "N"]
    assert splits.train[0]["tokens"][1:] == [".", "end"]


def test_an_answer_without_a_place_gets_the_one_where_it_stands():
    (row,) = data.read([{"question": "who?", "context": "It was Ann.", "answers": "Ann"}]).train
    assert row["answers"] == {"text": ["Ann"], "answer_start": [7]}


def test_a_query_with_its_documents_is_one_row_for_each_in_one_split():
    rows = [
        {"query": f"query {i}", "positive": f"good {i}", "negatives": [f"bad {i}", f"worse {i}"]}
        for i in range(12)
    ]
    splits = data.read(rows)
    assert [len(p) for p in splits.parts.values()] == [30, 3, 3]
    assert sum(r["label"] for r in splits.train) == 10
    assert len({r["query"] for r in splits.test}) == 1


def test_rows_to_predict_need_no_label():
    splits = data.read([{"text": "a b"}, {"text": "c d"}], task="classify", labelled=False, labels=["x", "y"])
    assert splits.test == [{"text": "a b"}, {"text": "c d"}]
    assert (splits.labels, splits.train) == (["x", "y"], [])


def test_a_split_without_any_labels_is_left_out_with_a_note():
    rows = pairs(12)
    hidden = [{"text": f"hidden {i}", "label": None} for i in range(3)]
    splits = data.read({"train": rows[:9], "validation": rows[9:], "test": hidden})
    assert any("no labels at all" in note for note in splits.report.notes)
    assert [len(p) for p in splits.parts.values()] == [9, 1, 2]


# Reports


def test_the_report_prints_and_goes_to_json():
    report = data.check([*pairs(20), {"text": "", "label": "good"}])
    printed = str(report)
    for part in ("task classify", "train", "words: median", "label good", "empty text: 1 (line 21)"):
        assert part in printed
    as_dict = json.loads(json.dumps(report.to_dict()))
    assert as_dict["counts"] == {"train": 16, "validation": 2, "test": 2}
    assert sum(as_dict["labels"]["good"].values()) == 13
    assert as_dict["problems"][0] | {"next": ""} == {
        "kind": "empty text", "count": 1, "first": ["line 21"], "example": "text is empty", "next": ""
    }  # fmt: skip
    assert not report.ok


def test_a_set_that_is_fine_says_so_and_splits_give_their_report_back():
    splits = data.read(pairs(20))
    assert "nothing wrong found" in str(splits.report)
    assert data.check(splits) is splits.report
    again = data.check(splits, tokenizer=lambda text, pair=None: {"input_ids": text.split()})
    assert (again.counts, again.length_unit, again.ok) == (splits.report.counts, "tokens", True)
    assert repr(splits) == "Splits(the given list: classify, train 16, validation 2, test 2, 2 labels)"


def test_great_imbalance_is_noted():
    rows = [{"text": f"text {i}", "label": "rare" if i == 7 else "common"} for i in range(100)]
    assert any("unbalanced: label 'common' has 99 of 100" in note for note in data.check(rows).notes)


def test_a_file_for_bad_rows_that_cannot_be_written_is_an_error(tmp_path):
    from veneer.errors import VeneerError

    (tmp_path / "file").write_text("")
    with pytest.raises(VeneerError, match="cannot be written"):
        data.read([*pairs(), {"text": "", "label": "good"}], skip_bad_rows=tmp_path / "file" / "aside.jsonl")
