"""What a base or an adapter cannot do is said as the client's mistake, and what is odd is answered as it should be."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from serving_tiny import byte_tokenizer, model
from serving_tools import Shelf, running
from test_serving_reading import saved
from training_tiny import saved_bert
from veneer.serving import Engine, Engines, ReadingEngine, ReadingOnly, Registry, check_for, ready_on
from veneer.serving.app import Keys, Settings, create_app

TALK = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def bytewise():
    """A base whose tokens are bytes: most of its characters are no whole ones."""
    with (
        Engine(model(words=256), byte_tokenizer(), name="tiny") as engine,
        running(create_app(engine, Shelf())) as server,
    ):
        yield server.url


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": [3, 4]}),
        ("/v1/completions", {"prompt": [3, 4], "echo": True, "stream": True, "stop": "a"}),
        ("/v1/completions", {"prompt": [3, 4], "logprobs": 1}),
        ("/v1/chat/completions", TALK),
        ("/tokenize", {"prompt": "x", "add_special_tokens": False}),
        ("/tokenize", TALK),
        ("/detokenize", {"tokens": [3]}),
    ],
)
def test_a_base_without_a_tokenizer_refuses_texts_and_tokens_alike(path, body):
    with (
        Engine(model(), None, name="tiny") as engine,
        TestClient(create_app(engine, Shelf(), Settings(hosts=None))) as web,
    ):
        answer = web.post(path, json={"model": "tiny", **body})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("no_tokenizer", "invalid_request_error")
        assert "without a tokenizer" in error["message"]
        assert web.get("/metrics").status_code == web.get("/v1/models").status_code == 200
        assert engine.alive


def test_a_prompt_for_what_does_not_write_is_told_where_to_ask(tmp_path):
    spec = saved_bert(tmp_path / "base")
    reading = ReadingEngine.open(spec)
    engine = ReadingOnly(reading, "tiny")
    registry = Registry(tmp_path / "registry", check=check_for(engine, reading))
    folder = saved(tmp_path / "mood", spec, "lora", "classify", ("bad", "good"))
    registry.register("mood", folder, trusted=True, ready=ready_on(Engines(engine, reading)))
    with TestClient(create_app(engine, registry, Settings(hosts=None), Keys(), reading=reading)) as web:
        for name in ("tiny", "mood"):
            for path, body in (("completions", {"prompt": "x"}), ("chat/completions", TALK)):
                error = web.post(f"/v1/{path}", json={"model": name, **body}).json()["error"]
                assert error["code"] == "writes_no_text"
                assert "/v1/classify" in error["message"]
    with (
        Engine(model(words=256), byte_tokenizer(), name="tiny") as writes,
        TestClient(create_app(writes, registry, Settings(hosts=None), Keys(), reading=reading)) as web,
    ):
        answer = web.post("/v1/completions", json={"model": "mood", "prompt": "x"})
        assert answer.status_code == 400
        said = answer.json()["error"]
        assert said["code"] == "writes_no_text"
        assert said["message"].startswith("'mood' is an adapter for the task 'classify'")
        assert registry.resolve("mood").digest not in answer.text
    registry.close()
    reading.close()


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes."),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_too_little_memory_is_a_reason_to_come_again_and_ends_nothing_else(error, stream, monkeypatch):
    with (
        Engine(model(words=256), byte_tokenizer(), name="tiny") as engine,
        TestClient(create_app(engine, Shelf(), Settings(hosts=None))) as web,
    ):
        ask = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "stream": stream}
        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "forward", lambda *_, **__: (_ for _ in ()).throw(error))
            answer = web.post("/v1/completions", json=ask)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "out_of_memory"
        assert int(answer.headers["retry-after"]) >= 5
        assert web.post("/v1/completions", json=ask).status_code == 200


@pytest.mark.parametrize("more", [{}, {"logprobs": 2}, {"n": 3}, {"stop": ["\x10", "zz"]}, {"echo": True}])
def test_a_stream_adds_up_to_the_whole_answer_where_characters_lie_over_several_tokens(bytewise, more):
    asked = {"model": "tiny", "prompt": "añb€", "max_tokens": 24, "seed": 7, "temperature": 1.3, **more}
    whole = httpx.post(bytewise + "/v1/completions", json=asked).json()
    texts, finish = {}, {}
    with httpx.stream("POST", bytewise + "/v1/completions", json={**asked, "stream": True}) as answer:
        for line in answer.iter_lines():
            for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                finish[choice["index"]] = choice["finish_reason"]
    assert texts == {c["index"]: c["text"] for c in whole["choices"]}
    assert finish == {c["index"]: c["finish_reason"] for c in whole["choices"]}


@pytest.mark.parametrize("seed", [0, 1, -1, (1 << 63) - 1, -(1 << 63), (1 << 63) - 2])
def test_any_seed_of_64_bits_draws_n_answers_that_come_again(bytewise, seed):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "seed": seed, "n": 3}
    one, two = (httpx.post(bytewise + "/v1/completions", json=asked).json()["choices"] for _ in range(2))
    assert one == two
    assert len({c["text"] for c in one}) == 3


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("stop", [""], "at least 1 character"),
        ("stop", ["a"] * 5, "at most 4 items"),
        ("prompt", [], "at least 1 item"),
        ("prompt", [-1], "greater than or equal to 0"),
        ("max_tokens", 0, "greater than or equal to 1"),
        ("prompt", 3, "a valid string"),
    ],
)
def test_of_the_forms_that_a_field_may_have_the_one_that_was_meant_is_spoken_of(bytewise, field, value, said):
    with openai.OpenAI(base_url=bytewise + "/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "tiny", "prompt": "abc", field: value}
        with pytest.raises(openai.BadRequestError, match=said) as refused:
            client.completions.create(**asked)
        assert refused.value.param == field
