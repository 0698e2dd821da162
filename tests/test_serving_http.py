"""The server as OpenAI's own client meets it: chat, completions, streams, models, errors, limits."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace

import httpx
import openai
import pytest

from serving_tools import EchoEngine, running, shelf, until
from veneer.serving.app import Keys, Settings, create_app, new_key
from veneer.serving.app.pieces import Pieces


@pytest.fixture(scope="module")
def engine():
    made = EchoEngine()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(engine):
    with running(create_app(engine, shelf())) as found:
        yield found


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def web():
    with httpx.Client() as made:
        yield made


def messages(text):
    return [{"role": "user", "content": text}]


# -- answers -------------------------------------------------------------------------------------------------


def test_a_chat_answers_with_its_usage_its_model_and_its_version(client):
    raw = client.chat.completions.with_raw_response.create(
        model="support", messages=messages("abc"), max_tokens=5
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == "cbacb"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "support"
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        3,
        5,
        8,
    )
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert raw.headers["x-veneer-adapter-version"] == "sha256:aa11"
    assert raw.headers["x-request-id"]


@pytest.mark.parametrize(
    ("model", "version"),
    [
        ("shout", "sha256:bb22"),
        ("builtin:echo:shout", "sha256:bb22"),
        ("shout@bb2", "sha256:bb22"),
        ("builtin:echo:shout@bb22", "sha256:bb22"),
        ("builtin:echo", "base"),
    ],
)
def test_a_model_is_named_by_alias_base_and_alias_version_or_base(client, model, version):
    raw = client.completions.with_raw_response.create(model=model, prompt="xyz", max_tokens=3, temperature=0)
    answer = raw.parse()
    assert raw.headers["x-veneer-adapter-version"] == version
    assert answer.choices[0].text == ("zyx" if version == "base" else "ZYX")
    assert answer.model == ("builtin:echo" if version == "base" else "shout")


@pytest.mark.parametrize("field", ["adapter_id", "lora_path"])
def test_other_servers_fields_name_the_adapter_too(client, field):
    answer = client.completions.create(
        model="builtin:echo", prompt="xyz", max_tokens=3, temperature=0, extra_body={field: "shout"}
    )
    assert answer.choices[0].text == "ZYX"


def test_several_prompts_times_n_are_choices_in_order_and_a_prompt_counts_once(client):
    answer = client.completions.create(
        model="support", prompt=["ab", "cde"], n=2, max_tokens=3, temperature=0
    )
    assert [c.text for c in answer.choices] == ["bab", "bab", "edc", "edc"]
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 12)


def test_prompts_may_be_tokens_and_echo_puts_them_first(client):
    one = client.completions.create(model="support", prompt=[97, 98], max_tokens=2, echo=True, temperature=0)
    assert one.choices[0].text == "abba"
    two = client.completions.create(model="support", prompt=[[97], [98]], max_tokens=1, temperature=0)
    assert [c.text for c in two.choices] == ["a", "b"]
    text = client.completions.create(model="support", prompt="hello ", max_tokens=1, echo=True, temperature=0)
    assert text.choices[0].text == "hello  "


def test_each_of_n_answers_has_its_own_seed_and_the_same_one_again(client):
    ask = {"model": "support", "prompt": "ab", "n": 3, "seed": 5, "max_tokens": 2, "temperature": 1}
    texts = [[c.text for c in client.completions.create(**ask).choices] for _ in range(2)]
    assert texts[0] == texts[1] == ["fg", "gh", "hi"]


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client):
    answer = client.completions.create(
        model="support", prompt="abcd", stop=["b"], max_tokens=9, temperature=0
    )
    assert answer.choices[0].text == "dc"
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_have_openais_form_in_both_routes(client):
    one = client.completions.create(model="support", prompt="xy", max_tokens=2, logprobs=2, temperature=0)
    found = one.choices[0].logprobs
    assert found.tokens == ["y", "x"]
    assert found.token_logprobs == [-0.5, -0.5]
    assert found.text_offset == [0, 1]
    assert found.top_logprobs[0] == {"y": -0.5, "A": -1.5}
    chat = client.chat.completions.create(
        model="support", messages=messages("xy"), max_tokens=2, logprobs=True, top_logprobs=1, temperature=0
    )
    content = chat.choices[0].logprobs.content
    assert [c.token for c in content] == ["y", "x"]
    assert content[0].bytes == [121]
    assert content[0].top_logprobs[0].logprob == -0.5
    without = client.chat.completions.create(model="support", messages=messages("xy"), max_tokens=2)
    assert without.choices[0].logprobs is None


def test_parts_of_text_are_read_as_one_and_a_developer_is_the_system(client):
    content = [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]
    said = [{"role": "developer", "content": "x"}, {"role": "user", "content": content}]
    answer = client.chat.completions.create(
        model="support", messages=said, max_completion_tokens=5, temperature=0
    )
    assert answer.choices[0].message.content == "dcbax"


def test_a_chat_without_max_tokens_fills_the_context(client, engine):
    answer = client.chat.completions.create(model="support", messages=messages("a" * 500), temperature=0)
    assert answer.usage.completion_tokens == engine.max_length - 500


def test_the_models_are_the_base_and_its_adapters_without_a_path(client):
    found = {m.id: m for m in client.models.list()}
    assert list(found) == ["builtin:echo", "support", "shout", "broken"]
    card = found["support"].model_dump()
    assert card["parent"] == "builtin:echo"
    assert card["root"] == "sha256:aa11"
    assert card["adapter"]["method"] == "lora"
    assert card["max_model_len"] == 512
    assert client.models.retrieve("shout").id == "shout"
    assert client.models.retrieve("builtin:echo").id == "builtin:echo"
    assert "/" not in json.dumps(card)


def test_a_token_that_is_a_part_of_a_character_is_shown_as_its_bytes_and_a_special_one_by_its_name():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    engine = SimpleNamespace(
        tokenizer=tokenizer, decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    )
    pieces = Pieces(engine)
    for text in ("a é \n", "日本"):
        ids = tokenizer(text)["input_ids"]
        assert b"".join(pieces.get(i).bytes for i in ids) == text.encode()
    first, second = (pieces.get(i) for i in tokenizer("é")["input_ids"])
    assert (first.text, second.text) == ("bytes:\\xc3", "bytes:\\xa9")
    assert pieces.get(tokenizer.eos_token_id).text == "<end>"
    assert pieces.get(tokenizer.eos_token_id).length == 0


def test_the_space_before_a_word_belongs_to_its_token_in_vocabularies_that_mark_it():
    words = {0: "▁the", 1: "<0xE4>", 2: "re"}
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: [words[i] for i in ids])
    engine = SimpleNamespace(tokenizer=tokenizer, decode=lambda ids: {0: "the", 1: "\ufffd", 2: "re"}[ids[0]])
    found = [Pieces(engine).get(i) for i in words]
    assert [f.text for f in found] == [" the", "bytes:\\xe4", "re"]
    assert [f.bytes for f in found] == [b" the", b"\xe4", b"re"]


# -- streams -------------------------------------------------------------------------------------------------


def test_a_stream_of_a_chat_is_as_openai_writes_it(server):
    ask = {
        "model": "support", "messages": messages("abc"), "max_tokens": 4, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=ask) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        text = answer.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "cbac"
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4


def test_the_client_streams_completions_with_n_log_probabilities_and_echo(client):
    texts, tokens = ["", ""], [[], []]
    for chunk in client.completions.create(
        model="support", prompt="abc", n=2, max_tokens=4, logprobs=1, stream=True, temperature=0
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    assert texts == ["cbac", "cbac"]
    assert tokens == [[0, 1, 2, 3], [0, 1, 2, 3]]
    echoed = client.completions.create(
        model="support", prompt="abc", max_tokens=2, echo=True, stream=True, temperature=0
    )
    assert "".join(c.choices[0].text for c in echoed) == "abccb"


def test_the_asynchronous_client_streams_many_at_a_time_and_a_step_wakes_the_loop_once(server, engine):
    async def ask(client, text):
        stream = await client.chat.completions.create(
            model="support", messages=messages(text), max_tokens=30, stream=True, temperature=0
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, f"{i:02d}") for i in range(16)))

    calls, steps = engine.sink_calls, engine.steps
    found = asyncio.run(all_of_them())
    assert found == [(f"{i:02d}"[::-1] * 15) for i in range(16)]
    assert engine.sink_calls - calls == engine.steps - steps < 16 * 30


def test_a_failure_before_the_first_token_is_a_plain_error_without_the_servers_paths(client):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as failed:
            client.completions.create(model="broken", prompt="abc", stream=stream)
        assert "truncated" in failed.value.message
        assert "/srv/secret" not in failed.value.message


def test_a_failure_after_the_stream_began_is_an_event_that_the_client_raises(client, engine):
    stream = client.completions.create(model="support", prompt="abc", max_tokens=400, stream=True)
    next(stream)
    engine.broken.add("sha256:aa11")
    try:
        with pytest.raises(openai.APIError, match="truncated"):
            list(stream)
    finally:
        engine.broken.discard("sha256:aa11")


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_name_that_nothing_has_is_not_found_and_the_nearest_is_named(client):
    with pytest.raises(openai.NotFoundError) as failed:
        client.completions.create(model="suport", prompt="x")
    assert failed.value.code == "model_not_found"
    assert failed.value.param == "model"
    assert "support" in failed.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


BAD_BODIES = [
    ("completions", b"", None),
    ("completions", b"{", None),
    ("completions", b"[]", None),
    ("completions", b"null", None),
    ("completions", b"\xff\xfe", None),
    ("completions", b"[" * 100_000, None),
    ("completions", {"prompt": "x"}, "model"),
    ("completions", {"model": "support"}, "prompt"),
    ("completions", {"model": 3, "prompt": "x"}, "model"),
    ("completions", {"model": "support", "prompt": ""}, "prompt"),
    ("completions", {"model": "support", "prompt": []}, "prompt"),
    ("completions", {"model": "support", "prompt": [[]]}, "prompt"),
    ("completions", {"model": "support", "prompt": [1, "a"]}, "prompt"),
    ("completions", {"model": "support", "prompt": [-1]}, "prompt"),
    ("completions", {"model": "support", "prompt": [256]}, "prompt"),
    ("completions", {"model": "support", "prompt": {"a": 1}}, "prompt"),
    ("completions", {"model": "support", "prompt": ["x"] * 200}, "prompt"),
    ("completions", {"model": "support", "prompt": ["x"] * 20, "n": 20}, "n"),
    ("completions", {"model": "support", "prompt": "x" * 512}, "prompt"),
    ("completions", {"model": "support", "prompt": "x", "max_tokens": 512}, "max_tokens"),
    ("completions", {"model": "support", "prompt": "x", "max_tokens": -1}, "max_tokens"),
    ("completions", {"model": "support", "prompt": "x", "max_tokens": 0, "echo": True}, "max_tokens"),
    ("completions", {"model": "support", "prompt": "x", "max_tokens": "9"}, "max_tokens"),
    ("completions", {"model": "support", "prompt": "x", "temperature": -0.1}, "temperature"),
    ("completions", b'{"model": "support", "prompt": "x", "temperature": NaN}', "temperature"),
    ("completions", {"model": "support", "prompt": "x", "top_p": 0}, "top_p"),
    ("completions", {"model": "support", "prompt": "x", "n": 0}, "n"),
    ("completions", {"model": "support", "prompt": "x", "seed": 1 << 70}, "seed"),
    ("completions", {"model": "support", "prompt": "x", "stop": ["a"] * 5}, "stop"),
    ("completions", {"model": "support", "prompt": "x", "stop": ""}, "stop"),
    ("completions", {"model": "support", "prompt": "x", "stop": ["a", ""]}, "stop"),
    ("completions", {"model": "support", "prompt": "x", "logprobs": 21}, "logprobs"),
    ("completions", {"model": "support", "prompt": "x", "logprobs": 1, "echo": True}, "echo"),
    ("completions", {"model": "support", "prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ("completions", {"model": "support", "prompt": "x", "logit_bias": {"5": 101}}, "logit_bias"),
    ("completions", {"model": "support", "prompt": "x", "suffix": "y"}, "suffix"),
    ("completions", {"model": "support", "prompt": "x", "best_of": 3}, "best_of"),
    ("completions", {"model": "support", "prompt": "x", "prompt_logprobs": 1}, "prompt_logprobs"),
    ("completions", {"model": "support", "prompt": "x", "skip_special_tokens": False}, "skip_special_tokens"),
    ("completions", b'{"model": "support", "prompt": "\\ud800"}', "prompt"),
    ("completions", b'{"model": "\\ud800", "prompt": "x"}', "model"),
    ("chat/completions", {"model": "support", "messages": []}, "messages"),
    (
        "chat/completions",
        {"model": "support", "messages": [{"role": "king", "content": "x"}]},
        "messages.0.role",
    ),
    ("chat/completions", {"model": "support", "messages": messages("")}, "messages"),
    ("chat/completions", {"model": "support", "messages": [{"role": "system", "content": "x"}]}, "messages"),
    (
        "chat/completions",
        {"model": "support", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages.0.content.0",
    ),
    (
        "chat/completions",
        {"model": "support", "messages": messages("x"), "tools": [{"type": "function"}]},
        "tools",
    ),
    (
        "chat/completions",
        {"model": "support", "messages": messages("x"), "tool_choice": "required"},
        "tool_choice",
    ),
    (
        "chat/completions",
        {"model": "support", "messages": messages("x"), "response_format": {"type": "json_object"}},
        "response_format",
    ),
    ("chat/completions", {"model": "support", "messages": messages("x"), "top_logprobs": 3}, "top_logprobs"),
    (
        "chat/completions",
        {"model": "support", "messages": messages("x"), "chat_template_kwargs": {"chat_template": "x"}},
        "chat_template_kwargs",
    ),
]


@pytest.mark.parametrize(("route", "body", "param"), BAD_BODIES)
def test_a_body_that_cannot_be_answered_is_400_with_the_field(server, web, route, body, param):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = web.post(
        f"{server.url}/v1/{route}", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert error["message"]


def test_unknown_fields_are_passed_over_with_a_warning_and_refused_in_strict_mode(server, engine):
    ask = {"model": "support", "prompt": "x", "max_tokens": 1, "shiny": 1, "wow\n: bad": 2}
    answer = httpx.post(server.url + "/v1/completions", json=ask)
    assert answer.status_code == 200
    assert answer.headers["x-veneer-warning"] == "unknown fields were passed over: shiny, wow:bad"
    with running(create_app(engine, shelf(), Settings(strict=True))) as strict:
        answer = httpx.post(strict.url + "/v1/completions", json=ask)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "shiny")
        del ask["shiny"], ask["wow\n: bad"]
        assert httpx.post(strict.url + "/v1/completions", json=ask).status_code == 200


def test_what_is_not_there_and_what_is_not_taken_are_errors_of_the_same_form(server):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_base_without_a_chat_template_says_so(server, engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", None, raising=False)
    answer = httpx.post(
        server.url + "/v1/chat/completions", json={"model": "support", "messages": messages("x")}
    )
    assert answer.status_code == 400
    assert "no chat template" in answer.json()["error"]["message"]


# -- keys and limits -----------------------------------------------------------------------------------------


def test_keys_are_needed_have_scopes_and_only_their_hashes_are_kept(engine, tmp_path):
    file = tmp_path / "keys.json"
    secret = new_key(file, "phone", ["use"])
    assert secret not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    with running(create_app(engine, shelf(), keys=Keys(["letmein"], file))) as server:
        base = server.url + "/v1"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=base, api_key="wrong").models.list()
        assert httpx.get(base + "/models").status_code == 401
        assert httpx.get(server.url + "/metrics").status_code == 401
        assert httpx.get(server.url + "/health").status_code == 200
        for good in (secret, "letmein"):
            assert len(openai.OpenAI(base_url=base, api_key=good).models.list().data) == 4
        later = new_key(file, "desk", ["use", "manage"])
        found = openai.OpenAI(base_url=base, api_key=later, max_retries=0)
        assert until(lambda: _is_let_in(found))


def _is_let_in(client):
    try:
        client.models.list()
    except openai.AuthenticationError:
        return False
    return True


def test_a_key_for_some_adapters_neither_sees_nor_uses_the_others(engine, tmp_path):
    file = tmp_path / "keys.json"
    secret = new_key(file, "phone")
    found = json.loads(file.read_text())
    found["keys"][0]["adapters"] = ["support"]
    file.write_text(json.dumps(found))
    with running(create_app(engine, shelf(), keys=Keys(file=file))) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key=secret)
        assert [m.id for m in client.models.list()] == ["builtin:echo", "support"]
        client.completions.create(model="support", prompt="x", max_tokens=1)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="shout", prompt="x", max_tokens=1)


def test_a_full_queue_is_429_with_the_seconds_to_wait_and_none_of_its_rows_stay(server, engine, monkeypatch):
    monkeypatch.setattr(engine, "queue_limit", 2)
    answer = httpx.post(
        server.url + "/v1/completions", json={"model": "support", "prompt": "abc", "n": 3, "max_tokens": 400}
    )
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert answer.headers["retry-after"] == "3"
    assert not engine.running
    text = httpx.get(server.url + "/metrics").text
    assert 'veneer_requests_total{adapter="support",method="lora",outcome="refused"} 1.0' in text


def test_limits_of_a_key_hold_and_end(engine):
    settings = Settings(in_flight=1, tokens_per_minute=600)
    with running(create_app(engine, shelf(), settings)) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        first = client.completions.create(model="support", prompt="abc", max_tokens=400, stream=True)
        next(first)
        with pytest.raises(openai.RateLimitError) as failed:
            client.completions.create(model="support", prompt="abc")
        assert failed.value.response.headers["retry-after"] == "1"
        list(first)
        client.completions.create(model="support", prompt="a", max_tokens=400)  # 806 tokens by now
        with pytest.raises(openai.RateLimitError) as failed:
            client.completions.create(model="support", prompt="abc")
        assert failed.value.code == "tokens_per_minute"
        assert 10 < int(failed.value.response.headers["retry-after"]) < 30


def test_a_body_that_is_too_large_or_too_slow_is_refused(engine):
    with running(create_app(engine, shelf(), Settings(max_body=1000, body_seconds=0.2))) as server:
        body = json.dumps({"model": "support", "prompt": "x" * 2000}).encode()
        url, kind = server.url + "/v1/completions", {"content-type": "application/json"}
        assert httpx.post(url, content=body, headers=kind).status_code == 413
        in_pieces = httpx.post(url, content=iter([body[:500], body[500:]]), headers=kind)
        assert in_pieces.status_code == 413
        assert "1,000 bytes" in in_pieces.json()["error"]["message"]

        def slow():
            yield body[:10]
            threading.Event().wait(0.6)
            yield body[10:20]

        assert httpx.post(url, content=slow(), headers=kind).status_code == 408

        def drips():
            for i in range(8):
                yield body[i : i + 1]
                threading.Event().wait(0.08)

        assert httpx.post(url, content=drips(), headers=kind).status_code == 408


def test_pages_of_other_sites_and_other_hosts_are_kept_out(server):
    url = server.url + "/v1/models"
    assert httpx.get(url, headers={"origin": "http://evil.example"}).status_code == 403
    assert httpx.get(url, headers={"origin": "null"}).status_code == 403
    assert httpx.get(url, headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(url, headers={"origin": server.url}).status_code == 200


# -- leaving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(server, engine, monkeypatch, stream):
    monkeypatch.setattr(engine, "step_seconds", 0.02)
    ask = {"model": "support", "prompt": "abc", "n": 2, "max_tokens": 500, "stream": stream}
    before = len(engine.cancelled)
    if stream:
        with httpx.stream("POST", server.url + "/v1/completions", json=ask) as answer:
            next(answer.iter_bytes())
            steps = engine.steps
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/completions", json=ask, timeout=0.2)
        steps = engine.steps
    assert until(lambda: not engine.running)
    assert engine.steps - steps <= 2  # the step that was under way, and one
    assert len(engine.cancelled) - before == 2


def test_what_runs_is_finished_when_the_server_is_told_to_stop():
    engine = EchoEngine(step_seconds=0.01)
    with running(create_app(engine, shelf())) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="support", prompt="abc", max_tokens=60, stream=True, temperature=0
        )
        next(stream)
        server.server.should_exit = True
        assert "".join(c.choices[0].text for c in stream) == ("cba" * 20)[1:]
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    assert engine.cancelled == []
    engine.close()


# -- looking -------------------------------------------------------------------------------------------------


def test_a_request_keeps_the_id_that_it_came_with_and_the_log_says_nothing_of_the_prompt(server, caplog):
    ask = {"model": "support", "prompt": "secret words", "max_tokens": 2}
    with caplog.at_level("INFO", "veneer.serving"):
        answer = httpx.post(server.url + "/v1/completions", json=ask, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        assert until(lambda: any("mine-1" in r.getMessage() for r in caplog.records))
        other = httpx.get(server.url + "/version", headers={"x-request-id": "a b\x01"})
        assert len(other.headers["x-request-id"]) == 32
    (line,) = [json.loads(r.getMessage()) for r in caplog.records if "mine-1" in r.getMessage()]
    assert line["model"] == "support"
    assert (line["status"], line["outcome"]) == (200, "done")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (12, 2)
    assert "secret" not in caplog.text


def test_prompts_are_logged_when_asked_for(engine, caplog):
    with (
        caplog.at_level("INFO", "veneer.serving"),
        running(create_app(engine, shelf(), Settings(log_prompts=True))) as s,
    ):
        httpx.post(s.url + "/v1/completions", json={"model": "support", "prompt": "secret", "max_tokens": 2})
    assert "secret" in caplog.text


def test_metrics_count_by_adapter_and_the_rest_together(engine):
    with running(create_app(engine, shelf(), Settings(metric_labels=1, vllm_names=True))) as server:
        for model in ("support", "shout", "builtin:echo"):
            ask = {"model": model, "prompt": "abc", "max_tokens": 2}
            assert httpx.post(server.url + "/v1/completions", json=ask).status_code == 200
        httpx.get(server.url + "/v1/nothing")
        answer = httpx.get(server.url + "/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = answer.text
        open_form = httpx.get(server.url + "/metrics", headers={"accept": "application/openmetrics-text"})
        assert open_form.text.endswith("# EOF\n")
    assert 'veneer_requests_total{adapter="support",method="lora",outcome="done"} 1.0' in text
    assert 'veneer_requests_total{adapter="other",method="loreft",outcome="done"} 1.0' in text
    assert 'veneer_tokens_total{adapter="base",kind="generated"} 2.0' in text
    assert 'veneer_ttft_seconds_count{adapter="support"} 1.0' in text
    assert 'veneer_http_responses_total{status="404"} 1.0' in text
    assert "veneer_batch_rows 0.0" in text
    assert "vllm:num_requests_running 0.0" in text
    assert 'vllm:request_success_total{finished_reason="length"} 3.0' in text
    assert "vllm:time_to_first_token_seconds_count 3.0" in text
    assert "vllm:inter_token_latency_seconds_count 3.0" in text
    assert "vllm:e2e_request_latency_seconds_count 3.0" in text


def test_health_readiness_version_and_tokens(server):
    for path in ("/health", "/live", "/ready", "/ping", "/startup"):
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert httpx.head(server.url + path).status_code == 200
    assert set(httpx.get(server.url + "/version").json()) == {"version"}
    found = httpx.post(server.url + "/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
    assert found == {"count": 2, "max_model_len": 512, "tokens": [97, 98], "token_strs": ["a", "b"]}
    chat = httpx.post(server.url + "/tokenize", json={"messages": messages("ab")}).json()
    assert chat["tokens"] == [97, 98]
    assert httpx.post(server.url + "/detokenize", json={"tokens": [97, 98]}).json() == {"prompt": "ab"}
    assert httpx.post(server.url + "/detokenize", json={"tokens": [300]}).status_code == 400
    assert httpx.get(server.url + "/v1/load").json()["slots"] == 64


def test_a_server_that_still_reads_its_base_lives_but_is_not_ready():
    from veneer.serving.app import Late

    made, engine, names = EchoEngine(), Late(), Late()
    with running(create_app(engine, names)) as server:
        assert httpx.get(server.url + "/health").status_code == 200
        assert httpx.get(server.url + "/ready").status_code == 503
        answer = httpx.post(server.url + "/v1/completions", json={"model": "support", "prompt": "a"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert httpx.get(server.url + "/metrics").status_code == 200
        engine.put(made)
        names.put(shelf())
        assert httpx.get(server.url + "/ready").status_code == 200
        answer = httpx.post(server.url + "/v1/completions", json={"model": "support", "prompt": "a"})
        assert answer.status_code == 200
    made.close()
