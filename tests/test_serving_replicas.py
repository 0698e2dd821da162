"""Several replicas through Ray Serve: the gate by itself, and two real replicas of which one is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket

import httpx
import pytest
from transformers import LlamaForCausalLM

import training_tiny as tiny
from registry_tiny import adapter
from serving_tools import until
from veneer.serving.app import Settings
from veneer.serving.app.replicas import named, respond
from veneer.serving.app.running import Plan


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model": "support"}', "support"),
        (b"", ""),
        (b"[1]", ""),
        (b'{"model": 3}', ""),
        (b'{"model": "' + b"x" * 900 + b'"}', "x" * 200),
    ],
)
def test_the_gate_reads_which_adapter_a_request_names(body, name):
    assert named(body) == name


def test_a_client_that_leaves_is_told_to_the_application():
    seen = []

    async def app(scope, receive, send):
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        seen.append((await receive())["type"])

    async def leave():
        messages = respond(app, {"type": "http"}, b"asked")
        assert (await anext(messages))["status"] == 200
        assert (await anext(messages))["body"] == b"one"
        await messages.aclose()
        for _ in range(100):
            if len(seen) == 2:
                return
            await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert seen == [b"asked", "http.disconnect"]


def test_a_failure_of_the_application_reaches_the_gate():
    async def app(scope, receive, send):
        raise ValueError("broken")

    async def ask():
        async for _ in respond(app, {"type": "http"}, b""):
            pass

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(ask())


@pytest.mark.slow
def test_two_replicas_answer_alike_and_one_may_die(tmp_path):
    pytest.importorskip("ray", reason="pip install 'veneer[ray]'")
    from veneer.serving.app.replicas import deployed

    base = tiny.saved_llama(tmp_path / "tiny-llama")
    watched = tmp_path / "adapters"
    watched.mkdir()
    adapter(watched / "support", model=LlamaForCausalLM.from_pretrained(base))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    plan = Plan(str(base), watched=watched, port=port, engine={"slots": 2})
    with (
        deployed(plan, Settings(), replicas=2) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):

        def ask(name, **more):
            return client.post(
                "/v1/completions",
                json={"model": name, "prompt": "hello", "max_tokens": 6, "temperature": 0, **more},
            )

        first = ask("support")
        assert first.status_code == 200, first.text
        text = first.json()["choices"][0]["text"]
        assert {ask("support").json()["choices"][0]["text"] for _ in range(4)} == {text}
        with client.stream(
            "POST", "/v1/completions",
            json={"model": "support", "prompt": "hello", "max_tokens": 6, "temperature": 0, "stream": True},
        ) as stream:  # fmt: skip
            lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert ask("supprt").status_code == 404
        refused = client.delete("/v1/adapters/support")
        assert refused.status_code == 501
        assert "--adapters" in refused.json()["error"]["message"]
        pids = workers()
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        for _ in range(6):
            again = ask("support")
            assert again.status_code == 200, again.text
            assert again.json()["choices"][0]["text"] == text
        assert until(lambda: len(set(workers()) - {pids[0]}) == 2, 90)


def workers() -> list[int]:
    """Process ids of the replicas, which Ray names by their deployment."""
    import psutil

    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "ServeReplica:veneer:Worker" in line:
            found.append(process.info["pid"])
    return found
