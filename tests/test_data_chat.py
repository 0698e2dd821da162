"""Conversations in every written form come out as the same messages; what cannot be learned from says why."""

import json

import pytest

from veneer import data
from veneer.errors import BadData

ASKED, ANSWERED = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}

FORMS = {
    "messages": {"messages": [ASKED, ANSWERED]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    "alpaca": {"instruction": "2 + 2?", "input": "", "output": "4"},
    "completion": {"prompt": "2 + 2?", "completion": "4"},
    "conversational": {"prompt": [ASKED], "completion": [ANSWERED]},
    "written as text": {"messages": json.dumps([ASKED, ANSWERED])},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}, ANSWERED]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_messages(form):
    splits = data.read([FORMS[form]])
    assert splits.task == "instruct"
    assert splits.train == [{"messages": [ASKED, ANSWERED]}]


def test_input_follows_the_instruction_and_system_goes_first():
    (row,) = data.read(
        [{"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be short."}]
    ).train
    assert [m["content"] for m in row["messages"]] == ["Be short.", "Add.\n\n2 and 2", "4"]
    assert row["messages"][0]["role"] == "system"


def test_tool_calls_stay_with_their_message():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    result = {"role": "tool", "content": "4"}
    (row,) = data.read([{"messages": [ASKED, call, result, ANSWERED]}]).train
    assert row["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}


BAD = {
    "no answer": ([ASKED], "nothing to learn", "no message is of the assistant"),
    "an empty answer": ([ASKED, {"role": "assistant", "content": " "}], "nothing to learn", "message 2"),
    "an unknown role": ([{"role": "wizard", "content": "a"}, ANSWERED], "bad chat", "role 'wizard'"),
    "two of one side": ([ASKED, ASKED, ANSWERED], "bad chat", "turns 1 and 2 are both of the user"),
    "assistant first": ([ANSWERED, ASKED, ANSWERED], "bad chat", "begins with the assistant"),
    "a late system": (
        [ASKED, {"role": "system", "content": "a"}, ANSWERED],
        "bad chat",
        "behind the beginning",
    ),
    "no content": ([{"role": "user"}, ANSWERED], "bad chat", "message 1 has no content"),
    "no list": ("hello", "bad chat", "not JSON"),
    "an empty list": ([], "bad chat", "expected a list"),
    "not a message": (["hello", "you"], "bad chat", "message 1 is a str"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_conversation_is_found_with_its_line_and_reason(case):
    messages, kind, says = BAD[case]
    (problem,) = data.check([{"messages": [ASKED, ANSWERED]}, {"messages": messages}]).problems
    assert (problem.kind, problem.line) == (kind, 2)
    assert says in problem.message


def test_bad_conversations_are_listed_with_their_lines_and_set_aside(tmp_path):
    good = [{"messages": [{"role": "user", "content": f"question {i}"}, ANSWERED]} for i in range(9)]
    lines = [json.dumps(row) for row in [*good, {"messages": [ASKED]}, {"messages": "hello"}]]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        BadData, match=r"2 rows(.|\n)*nothing to learn: 1 \(line 10\)(.|\n)*bad chat: 1 \(line 11\)"
    ):
        data.read(tmp_path / "chats.jsonl")
    assert len(data.read(tmp_path / "chats.jsonl", skip_bad_rows=tmp_path / "aside.jsonl")) == 9


def test_answers_to_one_question_stay_in_one_split():
    rows = [{"prompt": f"question number {i // 4}", "completion": f"answer {i}"} for i in range(40)]
    splits = data.read(rows)
    asked = [{r["messages"][0]["content"] for r in part} for part in splits.parts.values()]
    assert asked[0].isdisjoint(asked[1] | asked[2])
    assert len(splits.test) == 4
