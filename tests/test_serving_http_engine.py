"""The whole server over a real base: every layer together, from OpenAI's client down to the forward."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch

import veneer
from engine_tools import add
from serving_tools import running, until
from test_docs import ROOT, blocks_of
from training_tiny import llama, word_tokenizer
from veneer.serving import Engine, Registry, check_on, ready_on
from veneer.serving.app import Settings, create_app

METHODS = {"soft": "lora", "bright": "ia3", "deep": ("prefix_tuning", {"length": 4}), "odd": "loreft"}
WORDS = [f"w{i}" for i in range(40)]
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"


def base():
    tokenizer = word_tokenizer(WORDS, pair=False)
    tokenizer.chat_template = TEMPLATE
    model = llama(len(tokenizer))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(p.numel()))
    return model, tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("adapters"), base()[0]
    for i, (name, what) in enumerate(METHODS.items()):
        key, options = what if isinstance(what, tuple) else (what, {})
        add(model, key, name, seed=i, size=0.5, **options)
        veneer.save(model, name, root / name)
        veneer.detach(model, name)
    add(model, "lora", "soft", seed=99, size=0.5)
    veneer.save(model, "soft", root / "later")
    return root


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    model, tokenizer = base()
    with Engine(model, tokenizer, name="tiny", slots=4) as engine:
        registry = Registry(tmp_path_factory.mktemp("registry"), [folders], check=check_on(model))
        for name in METHODS:
            registry.register(name, folders / name, ready=ready_on(engine))
        with running(create_app(engine, registry, Settings())) as found:
            yield SimpleNamespace(url=found.url, engine=engine, registry=registry)
        registry.close()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_mixed_adapters_asked_together_answer_as_the_engine_does_one_by_one(server, client):
    asked = [(name, " ".join(WORDS[i : i + 3 + i % 4])) for i in range(5) for name in [*METHODS, "tiny"]]

    def ask(one):
        stream = client.completions.create(
            model=one[0],
            prompt=one[1],
            max_tokens=6,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, asked))
    versions = {name: v.digest for name, v in server.registry.aliases().items()}
    alone = [
        server.engine.generate(prompt, versions.get(name), max_tokens=6, ignore_eos=True).text
        for name, prompt in asked
    ]
    assert found == alone
    assert len(set(alone[:5])) == 5  # the adapters do differ


def test_a_chat_is_the_template_and_then_the_engine(server, client):
    said = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
    ]
    answer = client.chat.completions.create(
        model="odd", messages=said, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    version = server.registry.resolve("odd").digest
    alone = server.engine.generate("w1 w2 w3 w4 ", version, max_tokens=5, logprobs=3)
    assert answer.choices[0].message.content == alone.text
    content = answer.choices[0].logprobs.content
    assert [c.logprob for c in content] == pytest.approx([p.logprob for p in alone.logprobs])
    assert all(len(c.top_logprobs) == 3 for c in content)
    assert answer.usage.prompt_tokens == alone.prompt_tokens
    assert answer.usage.completion_tokens == alone.completion_tokens


def test_the_same_seed_draws_the_same_text_and_n_answers_differ(client):
    ask = {"model": "soft", "prompt": "w1 w2 w3", "max_tokens": 12, "temperature": 1.5, "seed": 7, "n": 4}
    first, second = ([c.text for c in client.completions.create(**ask).choices] for _ in range(2))
    assert first == second
    assert len(set(first)) > 1


def test_what_was_read_before_is_counted_as_cached_apart_by_salt(client):
    ask = {"model": "soft", "prompt": " ".join(WORDS[:37]), "max_tokens": 1}
    cached = []
    for salt in ("a", "a", "b"):
        answer = client.completions.create(**ask, extra_body={"cache_salt": salt})
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == cached[2] == 0
    assert cached[1] > 0


def test_a_new_version_under_a_name_answers_at_once_and_goes_back(server, client, folders):
    def text():
        raw = client.completions.with_raw_response.create(
            model="soft", prompt="w5 w6 w7", max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        return raw.parse().choices[0].text, raw.headers["x-veneer-adapter-version"]

    before = text()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        for file in (folders / "later").iterdir():
            out.write(file, file.name)
    answer = httpx.post(
        server.url + "/v1/adapters", data={"name": "soft"}, files={"archive": ("a.zip", archive.getvalue())}
    )
    assert answer.status_code == 201, answer.text
    after = text()
    assert after[0] != before[0]
    assert after[1] == answer.json()["version"] != before[1]
    moved = httpx.put(server.url + "/v1/adapters/soft/alias", json={"rollback": True})
    assert moved.status_code == 200
    assert text() == before


def test_an_adapter_that_is_removed_is_not_found_and_one_that_is_bad_hurts_nobody(
    server, client, folders, tmp_path
):
    bad = folders / "bad"
    shutil.copytree(folders / "deep", bad)
    tensors = next(bad.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-8])
    answer = httpx.post(server.url + "/v1/adapters", json={"name": "bad", "path": str(bad)})
    assert answer.status_code == 400
    assert str(folders) not in answer.text
    taken = httpx.post(server.url + "/v1/adapters", json={"name": "short", "path": str(folders / "later")})
    assert taken.status_code == 201
    assert client.completions.create(model="short", prompt="w1", max_tokens=2).choices[0].text
    assert httpx.delete(server.url + "/v1/adapters/short").status_code == 200
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="short", prompt="w1")
    assert client.completions.create(model="deep", prompt="w1", max_tokens=2).choices[0].text


def test_a_client_that_leaves_frees_its_row_in_the_engine(server):
    ask = {"model": "deep", "prompt": "w1 w2", "max_tokens": 200, "stream": True, "ignore_eos": True, "n": 2}
    with httpx.stream("POST", server.url + "/v1/completions", json=ask) as answer:
        next(answer.iter_bytes())
    counts = server.engine.stats
    version = server.registry.resolve("deep").digest
    assert until(lambda: counts()["rows"] == 0 and counts()["tokens"][version]["cancelled"] == 2)


def saved_support(folder):
    """A small adapter of the real base, and the base opened."""
    opened = veneer.open_base("builtin:smollm2")
    add(opened.model, "lora", "support", seed=1, size=0.02)
    veneer.save(opened.model, "support", folder)
    return opened


@contextlib.contextmanager
def child(command, folder):
    """The command in a process of its own; what it says on standard error, line by line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True)
    reader.start()
    try:
        assert until(lambda: any(line.startswith("ready:") for line in lines), 120), lines
        yield SimpleNamespace(process=process, lines=lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, lines
        reader.join(10)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_command_serves_a_real_base_and_finishes_what_runs_on_sigterm(tmp_path):
    opened = saved_support(tmp_path / "adapters" / "support")
    ids = opened.tokenizer("The sky is", return_tensors="pt")
    made = opened.model.generate(**ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
    expected = opened.tokenizer.decode(made[0, ids["input_ids"].shape[1] :])
    command = [
        sys.executable, "-m", "veneer", "serve", "--model", "builtin:smollm2", "--port", "0",
        "--adapters", "adapters", "--api-key", "letmein", "--state", "state",
    ]  # fmt: skip
    with child(command, tmp_path) as server:
        url = next(line.split()[2].rstrip(",") for line in server.lines if line.startswith("listening on"))
        client = openai.OpenAI(base_url=url + "/v1", api_key="letmein", max_retries=0)
        assert "support" in {m.id for m in client.models.list()}
        stream = client.completions.create(
            model="builtin:smollm2:support", prompt="The sky is", max_tokens=40, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        text = next(stream).choices[0].text
        server.process.send_signal(signal.SIGTERM)
        assert text + "".join(chunk.choices[0].text for chunk in stream) == expected
    logged = [json.loads(line) for line in server.lines if line.startswith("{")]
    assert logged[-1]["outcome"] == "done"
    assert "sky" not in "".join(server.lines)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_server_lines_of_the_readme_do_what_they_say(tmp_path):
    saved_support(tmp_path / "adapters" / "support")
    blocks = [b.text for b in blocks_of(ROOT / "README.md")]
    (serve,) = [text for text in blocks if text.startswith("veneer serve")]
    (ask,) = [text for text in blocks if text.startswith("curl ")]
    with socket.socket() as found:  # 8000 may be somebody's
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    words = shlex.split(serve.replace("8000", port), comments=True)
    with child([sys.executable, "-m", *words], tmp_path):
        answer = subprocess.run(
            ask.replace("8000", port), shell=True, capture_output=True, check=True, timeout=120
        )
    found = json.loads(answer.stdout)
    assert found["model"] == "support"
    assert found["choices"][0]["message"]["content"]
