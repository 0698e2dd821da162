"""`veneer serve` at the prompt: what it refuses before anything is read, its keys, and one whole run on a tiny base."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from typer.testing import CliRunner

import training_tiny as tiny
import veneer
from registry_tiny import adapter
from serving_tools import until
from veneer.cli._app import app
from veneer.cli.serve import bytes_of, named_folders
from veneer.errors import BadOption
from veneer.serving.app import Keys


def run(*arguments, **environment):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)], prog_name="veneer", env=environment)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.saved_llama(tmp_path_factory.mktemp("llama") / "tiny-llama")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "needs a base"),
        (("--model", "x", "--host", "0.0.0.0"), "open to other machines, and no key was given"),
        (("--model", "x", "--adapter", "a=nowhere"), "there is no folder nowhere"),
        (("--model", "x", "--adapters", "nowhere"), "--adapters nowhere is no folder"),
        (("--model", "x", "--keys", "nowhere.json"), "no file of keys at nowhere.json"),
        (("--model", "x", "--memory-budget", "much"), "'much' is no number of bytes"),
        (("--model", "x", "--api-key", ""), "An empty API key"),
        (("--new-key", "phone"), "--new-key needs --keys FILE"),
        (("--new-key", "phone", "--keys", "keys.json", "--scope", "mange"), "No scope is called 'mange'"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_read(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(*arguments)
    assert found.exit_code in (1, 2)
    assert said in found.stderr
    assert "next:" in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_said_at_once(llama):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = run("--model", llama, "--port", taken.getsockname()[1])
    assert found.exit_code == 2
    assert "cannot be listened on" in found.stderr


def test_a_base_or_an_adapter_that_cannot_be_read_ends_the_command_with_its_message(llama, tmp_path):
    found = run("--model", tmp_path / "nothing", "--port", 0)
    assert found.exit_code != 0
    assert "nothing" in found.stderr
    other = adapter(tmp_path / "other", model=tiny.llama(40, hidden_act="relu"))
    found = run("--model", llama, "--port", 0, "--adapter", f"support={other}")
    assert found.exit_code == 1
    assert found.stderr.count("next:") == 1


def test_a_new_key_is_printed_once_works_and_has_the_scopes_that_were_asked_for(tmp_path):
    file = tmp_path / "keys.json"
    first = run("--new-key", "phone", "--keys", file)
    second = run("--new-key", "desk", "--keys", file, "--scope", "use", "--scope", "manage")
    assert first.exit_code == second.exit_code == 0
    keys = Keys(file=file)
    assert keys.find(first.stdout.strip()).scopes == {"use"}
    assert keys.find(second.stdout.strip()).scopes == {"use", "manage"}
    assert keys.find("phone") is None
    again = run("--new-key", "desk", "--keys", file)
    assert again.exit_code == 2
    assert len(json.loads(file.read_text())["keys"]) == 2


def test_a_file_of_keys_that_is_half_written_leaves_the_old_keys_in_force(tmp_path, monkeypatch):
    from veneer.serving.app import keys as room

    monkeypatch.setattr(room, "LOOK_AGAIN", 0.0)
    file = tmp_path / "keys.json"
    secret = room.new_key(file, "phone")
    keys = Keys(file=file)
    whole = file.read_text()
    file.write_text(whole[:-20])
    assert keys.find(secret).name == "phone"
    file.write_text(json.dumps({"keys": []}))
    assert keys.find(secret) is None


def test_names_of_folders_and_sizes_are_read(tmp_path):
    (tmp_path / "two").mkdir()
    two = tmp_path / "two"
    assert named_folders([f"support={two}", str(two)]) == {"support": two, "two": two}
    with pytest.raises(BadOption, match="Two adapters"):
        named_folders([f"a={two}", f"a={two}"])
    assert [bytes_of(t) for t in ("12", "2KiB", "1.5 MiB", "3gb")] == [12, 2048, 3 << 19, 3 * 10**9]


@pytest.mark.slow
def test_a_tiny_base_is_served_whole_from_the_command_to_its_end(llama, tmp_path):
    """A folder that is dropped in appears; the base's folder is nobody's business; SIGTERM ends with code 0."""
    made = adapter(tmp_path / "made", model=veneer.open_base(llama, task="lm").model)
    (tmp_path / "adapters").mkdir()
    command = [sys.executable, "-m", "veneer", "serve", "--model", llama, "--port", "0", "--slots", "2"]
    command += ["--adapters", str(tmp_path / "adapters"), "--adapter", f"support={made}", "--state", "state"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True).start()
    try:
        assert until(lambda: any(line.startswith("ready:") for line in lines), 60), lines
        url = next(line.split()[2].rstrip(",") for line in lines if line.startswith("listening on"))
        with httpx.Client(base_url=url) as client:
            assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny-llama", "support"]
            shutil.copytree(made, tmp_path / "adapters" / "later")
            assert until(lambda: "later" in client.get("/v1/models").text, 15)
            ask = {"model": "later", "messages": [{"role": "user", "content": "good"}], "max_tokens": 3}
            answer = client.post("/v1/chat/completions", json=ask)
            assert answer.status_code == 200, answer.text
            assert client.post("/v1/completions", json={"model": llama, "prompt": "good"}).status_code == 200
            assert str(tmp_path) not in client.get("/v1/models").text + client.get("/v1/adapters").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
