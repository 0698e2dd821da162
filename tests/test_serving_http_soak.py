"""A soak of the real command: random requests, leaving clients, bad bodies, uploads, moves, removals and kills.

Nothing that was acknowledged is lost, every answer is that of the one version which its header names, and memory stays
where it was. `VENEER_SOAK_SECONDS=600` makes it as long as one likes.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile

import httpx
import pytest

import training_tiny as tiny
import veneer
from registry_tiny import adapter
from serving_tools import until
from veneer.serving import Engine, Registry

SECONDS = float(os.environ.get("VENEER_SOAK_SECONDS", "45"))
METHODS = ("lora", "ia3", "loreft", "prefix_tuning", "lora", "dora")
NAMES = ("a", "b", "c", "d")
PROMPTS = ("good", "good film bad", "the story is good and the plot", "nice nice nice")
BAD = (b"", b"{", b"[1]", b'{"model": "a"}', b'{"model": "a", "prompt": "x", "n": -1}', b"\xff" * 50)
LEAST_GROWTH = 24 << 20  # bytes that an allocator may take and keep


class Child:
    """The command on one port, started again as often as it is killed."""

    def __init__(self, model, folder):
        self.model, self.folder, self.process, self.log = model, folder, None, []
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [
            sys.executable,
            "-X",
            "faulthandler",
            "-m",
            "veneer",
            "serve",
            "--model",
            self.model,
            "--port",
            str(self.port),
        ]
        command += ["--state", "state", "--slots", "4", "--queue", "64", "--memory-budget", "100KiB"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=self.folder, stderr=subprocess.PIPE, text=True, env=environment
        )
        lines = self.log = []
        read = self.process.stderr.readline
        threading.Thread(target=lambda: lines.extend(iter(read, "")), daemon=True).start()
        if not until(lambda: any(line.startswith("ready:") for line in lines), 300):
            self.process.send_signal(signal.SIGABRT)  # it says where every thread stands
            self.process.wait(10)
            raise AssertionError("".join(line for line in lines if not line.startswith("{")))

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def bytes(self):
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    def __init__(self, child, archives, answers):
        self.child, self.archives, self.answers = child, archives, answers
        self.names: dict[str, str | None] = dict.fromkeys(NAMES)  # as acknowledged
        self.wrong: list[str] = []
        self.counts = dict.fromkeys(("answers", "left", "refused", "bad", "changes", "kills", "lost"), 0)
        self.ending, self.down = threading.Event(), threading.Event()
        self.lock = threading.Lock()

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    # -- readers -------------------------------------------------------------------------------------------------

    def read(self, seed):
        draw = random.Random(seed)
        while not self.ending.is_set():
            try:
                with httpx.Client(base_url=self.child.url, timeout=20) as client:
                    for _ in range(20):
                        self.once(client, draw)
                        if self.ending.is_set():
                            break
            except httpx.TransportError:
                self.count("lost")
                if not self.down.is_set() and self.child.process.poll() is None and not self.ending.is_set():
                    time.sleep(0.2)  # the kill may be about to be said
                    if not self.down.is_set():
                        self.wrong.append("a connection was lost while nobody killed the server")
                time.sleep(0.1)

    def once(self, client, draw):
        if draw.random() < 0.1:
            answer = client.post(
                "/v1/completions", content=draw.choice(BAD), headers={"content-type": "application/json"}
            )
            self.count("bad")
            if answer.status_code not in (400, 503):
                self.wrong.append(f"a bad body was answered with {answer.status_code}: {answer.text[:200]}")
            return
        name, i = draw.choice([*NAMES, "tiny-llama"]), draw.randrange(len(PROMPTS))
        ask = {"model": name, "prompt": PROMPTS[i], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        ask["stream"] = draw.random() < 0.6
        with client.stream("POST", "/v1/completions", json=ask) as answer:
            if answer.status_code != 200:
                self.count("refused")
                if answer.status_code == 503:
                    time.sleep(0.3)  # sooner than it asks for, but not so that it cannot start
                if answer.status_code not in (404, 429, 503):
                    self.wrong.append(f"{answer.status_code}: {answer.read().decode()[:300]}")
                return
            if ask["stream"] and draw.random() < 0.25:
                next(answer.iter_bytes())
                self.count("left")
                return
            text, version = said(answer, ask["stream"]), answer.headers["x-veneer-adapter-version"]
        self.count("answers")
        expected = self.answers[version.removeprefix("sha256:")][i]
        if text != expected:
            self.wrong.append(
                f"{name} {version[:16]} said {text!r} to {PROMPTS[i]!r}, alone it says {expected!r}"
            )

    # -- the manager ---------------------------------------------------------------------------------------------

    def change(self, client, draw):
        """One change; what it should have come to is kept once it is acknowledged."""
        name, action = draw.choice(NAMES), draw.random()
        if action < 0.6 or self.names[name] is None:
            digest = draw.choice(list(self.archives))
            files = {"archive": ("adapter.zip", self.archives[digest])}
            answer = client.post("/v1/adapters", data={"name": name}, files=files)
            if answer.status_code == 201:
                self.names[name] = answer.json()["version"].removeprefix("sha256:")
                if self.names[name] != digest:
                    self.wrong.append(f"{name} became {self.names[name][:8]}, not {digest[:8]}")
        elif action < 0.8:
            answer = client.put(f"/v1/adapters/{name}/alias", json={"rollback": True})
            if answer.status_code == 200:
                self.names[name] = answer.json()["version"].removeprefix("sha256:")
        else:
            answer = client.delete(f"/v1/adapters/{name}")
            if answer.status_code == 200:
                self.names[name] = None
        self.count("changes")
        if answer.status_code >= 500:
            self.wrong.append(f"a change was answered with {answer.status_code}: {answer.text[:300]}")

    def kill_in_a_change(self, draw):
        """The server dies at any moment of a change: afterwards all is as before it, or all as behind it."""
        before = dict(self.names)

        def try_it():
            try:
                with httpx.Client(base_url=self.child.url, timeout=20) as client:
                    self.change(client, draw)
            except httpx.TransportError:
                pass

        changing = threading.Thread(target=try_it)
        changing.start()
        time.sleep(draw.random() * 0.15)
        self.down.set()
        self.child.kill()
        changing.join()
        acknowledged = dict(self.names)
        self.child.start()
        self.down.clear()
        self.count("kills")
        now = self.registered()
        if now != acknowledged:
            changed = [n for n in NAMES if now[n] != acknowledged[n]]
            if acknowledged != before or len(changed) > 1:
                self.wrong.append(f"after a kill {now} is there, and {acknowledged} was acknowledged")
            self.names = now

    def registered(self):
        listed = httpx.get(self.child.url + "/v1/adapters", timeout=20).json()["data"]
        found = {one["id"]: one["version"].removeprefix("sha256:") for one in listed}
        return {name: found.get(name) for name in NAMES}


def said(answer, is_stream):
    if not is_stream:
        return json.loads(answer.read())["choices"][0]["text"]
    text = ""
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            found = json.loads(line[6:])
            assert "error" not in found, found
            text += found["choices"][0]["text"]
    return text


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base; archives of adapters and what each says to every prompt alone, by digest."""
    root = tmp_path_factory.mktemp("soak")
    model = tiny.saved_llama(root / "tiny-llama")
    opened = veneer.open_base(model, task="lm")
    registry, archives, answers = Registry(root / "digests"), {}, {}
    for i, method in enumerate(METHODS):
        folder = adapter(root / f"{i}", method, seed=i, model=opened.model)
        digest = registry.register(f"m{i}", folder, trusted=True).digest
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as file:
            for path in folder.iterdir():
                file.write(path, path.name)
        archives[digest] = out.getvalue()
    with Engine(opened.model, opened.tokenizer, slots=1) as engine:
        for digest in archives:
            engine.add(digest, registry.folder(digest))
        for version in (None, *archives):
            texts = [engine.generate(p, version, max_tokens=12, ignore_eos=True).text for p in PROMPTS]
            answers[version or "base"] = texts
    registry.close()
    assert len({tuple(t) for t in answers.values()}) == len(answers)
    return root, model, archives, answers


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory as Linux tells it")
def test_a_server_under_fire_loses_nothing_mixes_nothing_and_keeps_its_size(world):
    root, model, archives, answers = world
    child = Child(model, root)
    child.start()
    soak, draw = Soak(child, archives, answers), random.Random(0)
    readers = [threading.Thread(target=soak.read, args=(i,), daemon=True) for i in range(6)]
    try:
        for reader in readers:
            reader.start()
        began = time.monotonic()
        while time.monotonic() - began < SECONDS * 0.6:
            with httpx.Client(base_url=child.url, timeout=20) as client:
                for _ in range(draw.randrange(5, 25)):
                    soak.change(client, draw)
                    time.sleep(draw.random() * 0.2)
            soak.kill_in_a_change(draw)
        time.sleep(SECONDS * 0.1)
        size = child.bytes
        while time.monotonic() - began < SECONDS:
            with httpx.Client(base_url=child.url, timeout=20) as client:
                soak.change(client, draw)
                time.sleep(0.05)
        grown = child.bytes - size
        soak.ending.set()
        for reader in readers:
            reader.join(30)
        assert soak.wrong == [], (soak.wrong[:5], soak.counts)
        assert soak.registered() == soak.names
        load = httpx.get(child.url + "/v1/load").json()
        assert (load["rows"], load["queue"]) == (0, 0)
        assert grown < LEAST_GROWTH + 0.02 * size, (grown, size)
        assert min(soak.counts[what] for what in ("answers", "left", "bad", "changes", "kills")) > 0, (
            soak.counts
        )
        child.process.send_signal(signal.SIGTERM)
        assert child.process.wait(30) == 0
        print(soak.counts, f"grew by {grown / 1e6:.1f} MB")
    finally:
        soak.ending.set()
        if child.process.poll() is None:
            child.kill()
