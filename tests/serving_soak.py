"""A server in a process of its own, what it has acknowledged, and clients that ask, change and disturb it at random."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from serving_tiny import WORDS, Alone, folders, model, prompts

METHODS: dict[str, Any] = {
    "lora": "lora", "other lora": ("lora", {"rank": 3}), "dora": "dora", "ia3": "ia3",
    "prefix": ("prefix_tuning", {"length": 5}), "loreft": "loreft", "serial": "serial_adapter", "vera": "vera",
}  # fmt: skip
TOKENS = 10  # of an answer
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
MALFORMED: list[tuple[str, str, bytes]] = [
    ("POST", "/v1/completions", b"{"), ("POST", "/v1/completions", b"[]"), ("POST", "/v1/completions", b"\xff\xfe"),
    ("POST", "/v1/completions", b'{"model": "base"}'), ("POST", "/v1/completions", b'{"model": 3, "prompt": "w5"}'),
    ("POST", "/v1/completions", b'{"model": "base", "prompt": [99999]}'),
    ("POST", "/v1/completions", b'{"model": "base", "prompt": "w5", "temperature": 1e999}'),
    ("POST", "/v1/chat/completions", b'{"model": "base", "messages": "hello"}'),
    ("POST", "/v1/adapters", b'{"name": "../up", "path": "/etc"}'), ("POST", "/v1/adapters", b'{"path": 5}'),
    ("PUT", "/v1/adapters/nobody/alias", b'{"version": "zz"}'), ("DELETE", "/v1/adapters/nobody", b""),
    ("POST", "/v1/fine_tuning/jobs", b'{"model": "base", "training_file": "file-none"}'),
    ("POST", "/v1/files", b"no form"), ("GET", "/v1/nothing", b""),
]  # fmt: skip


def tokenizer() -> Any:
    """Every token of the tiny base is a word: w0 w1 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w3", pad_token="w0", eos_token="w2")
    found.chat_template = CHAT
    return found


class World:
    """The base and adapters on a disk, and what each adapter answers to each prompt by itself."""

    def __init__(self, root: Path) -> None:
        self.base = root / "base"
        model().save_pretrained(self.base)
        self.tokenizer = tokenizer()
        self.tokenizer.save_pretrained(self.base)
        self.adapters = folders("llama", METHODS, root / "adapters")
        self.prompts = prompts(16)
        alone = self.alone = Alone("llama", self.adapters)
        self.tokens = {
            (n, i): alone(p, n, TOKENS) for n in (None, *METHODS) for i, p in enumerate(self.prompts)
        }
        self.answers = {key: self.text(tokens) for key, tokens in self.tokens.items()}
        self.archives = {name: _zipped(folder) for name, folder in self.adapters.items()}

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def is_a_tie(self, name: str | None, prompt: int, said: str) -> bool:
        """Whether the first token in which an answer differs was one of two that are as likely."""
        wanted = self.tokens[name, prompt]
        same = max(k for k in range(len(wanted) + 1) if said.startswith(self.text(wanted[:k])))
        ids = torch.tensor([[*self.prompts[prompt], *wanted[:same]]])
        logits = self.alone.model(input_ids=ids, adapters=[name]).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        return first - second < 1e-4


def _zipped(folder: Path) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            archive.write(path, path.name)
    return held.getvalue()


class Server:
    """`veneer serve` as a process, which may be killed and started again on the same state."""

    def __init__(self, base: Path, state: Path, log: Path) -> None:
        self.base, self.state, self.log = base, state, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.up = threading.Event()
        self.process: Any = None

    def start(self, seconds: float = 120) -> None:
        command = [sys.executable, "-m", "veneer", "serve", "--model", str(self.base), "--served-name", "base",
                   "--state", str(self.state), "--port", str(self.port), "--slots", "4", "--device", "cpu",
                   "--memory-budget", "200KB"]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stderr=log, stdout=log, env={**os.environ, "MALLOC_ARENA_MAX": "2"}
            )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + "/ready", timeout=5).status_code == 200:
                    self.up.set()
                    return
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.1)
        raise AssertionError("the server did not become ready: " + self.log.read_text()[-3000:])

    def kill(self) -> None:
        self.up.clear()
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """SIGTERM, and the exit status."""
        self.up.clear()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    @property
    def memory(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Name:
    """What a name may mean, as far as the server has said: one adapter or None; two while a change is under way."""

    past: list[tuple[float, frozenset[str | None]]] = field(
        default_factory=lambda: [(0.0, frozenset([None]))]
    )
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def now(self) -> frozenset[str | None]:
        return self.past[-1][1]

    def put(self, possible: frozenset[str | None]) -> None:
        with self.lock:
            self.past.append((time.monotonic(), possible))

    def since(self, began: float) -> frozenset[str | None]:
        """All that it may have meant at any time since then."""
        with self.lock:
            at = max(i for i, (when, _) in enumerate(self.past) if when <= began)
            return frozenset().union(*(p for _, p in self.past[at:]))


class Soak:
    """Clients at random, until told to end; `faults` holds what should not have been."""

    def __init__(self, world: World, server: Server, seed: int = 0) -> None:
        self.world, self.server, self.seed = world, server, seed
        self.names = {f"n{i}": Name() for i in range(6)}
        self.digests: dict[str, str] = {}  # version -> adapter
        self.files: dict[str, bytes] = {}
        self.jobs: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.ending = threading.Event()
        self.held = threading.Lock()

    def fault(self, what: str) -> None:
        with self.held:
            self.faults.append(what)

    def count(self, what: str) -> None:
        with self.held:
            self.counts[what] += 1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        works: list[Callable[..., None]] = [
            self.ask,
            self.ask,
            self.ask,
            self.go_away,
            self.disturb,
            self.train,
        ]
        changes = [[f"n{i}" for i in range(3)], [f"n{i}" for i in range(3, 6)]]
        threads = [
            threading.Thread(target=self._loop, args=(work, i), daemon=True) for i, work in enumerate(works)
        ]
        threads += [
            threading.Thread(target=self._loop, args=(self.change, 100 + i, own), daemon=True)
            for i, own in enumerate(changes)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.ending.set()
            self.server.up.set()  # whoever waits for it ends
            for thread in threads:
                thread.join(60)

    def _loop(self, work: Callable[..., None], seed: int, *more: Any) -> None:
        draw = random.Random(self.seed * 1000 + seed)
        with httpx.Client(base_url=self.server.url, timeout=60) as client:
            while not self.ending.is_set():
                self.server.up.wait()
                try:
                    work(client, draw, *more)
                except httpx.TransportError:
                    self.count("lost connections")
                    time.sleep(0.05)
                except Exception as error:
                    self.fault(f"{work.__name__}: {type(error).__name__}: {error}")

    # -- asking ----------------------------------------------------------------------------------------------------

    def ask(self, client: httpx.Client, draw: random.Random) -> None:
        """One answer is one adapter's, and one that the name meant."""
        name = draw.choice(["base", *self.names])
        prompt = draw.randrange(len(self.world.prompts))
        began = time.monotonic()
        body = self._body(name, prompt)
        if draw.random() < 0.5:
            answer = client.post("/v1/completions", json=body)
            text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else ""
        else:
            answer, text = self._streamed(client, body)
        may = frozenset([None]) if name == "base" else self.names[name].since(began)
        if answer.status_code != 200:
            self._refused(answer, name != "base" and None in may)
            return
        said = answer.headers["x-veneer-adapter-version"]
        adapter = None if said == "base" else self.digests.get(said.removeprefix("sha256:"), said)
        self.count("answers")
        if adapter not in may:
            self.fault(f"{name} answered as {adapter}, and meant {set(may)}")
        elif text != self.world.answers[adapter, prompt]:
            self.count("differing answers")
            if not self.world.is_a_tie(adapter, prompt, text):
                others = [n for (n, p), t in self.world.answers.items() if p == prompt and t == text]
                self.fault(f"{adapter} said {text!r} to prompt {prompt}; as says {others}")

    def _body(self, name: str, prompt: int, tokens: int = TOKENS) -> dict[str, Any]:
        return {"model": name, "prompt": self.world.prompts[prompt], "max_tokens": tokens, "temperature": 0,
                "ignore_eos": True}  # fmt: skip

    def _streamed(self, client: httpx.Client, body: dict[str, Any]) -> tuple[httpx.Response, str]:
        text, done = "", False
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                answer.read()
                return answer, ""
            for line in answer.iter_lines():
                done = done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    found = json.loads(line[6:])
                    if "error" in found:
                        raise httpx.ReadError(str(found["error"]))
                    text += "".join(c["text"] for c in found["choices"])
        if not done:
            raise httpx.ReadError("the stream ended early")
        return answer, text

    def _refused(self, answer: httpx.Response, may_be_gone: bool) -> None:
        self.count(f"status {answer.status_code}")
        good = answer.status_code in (429, 503) or (answer.status_code == 404 and may_be_gone)
        if not good:
            self.fault(f"refused with {answer.status_code}: {answer.text[:200]}")

    def go_away(self, client: httpx.Client, draw: random.Random) -> None:
        """A client that leaves in the midst of an answer."""
        name, prompt = draw.choice(["base", *self.names]), draw.randrange(len(self.world.prompts))
        body = {**self._body(name, prompt, 90), "stream": True, "n": draw.randrange(1, 3)}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            for _, _line in zip(range(draw.randrange(6)), answer.iter_lines()):
                pass
        self.count("disconnects")
        time.sleep(0.05)

    def disturb(self, client: httpx.Client, draw: random.Random) -> None:
        method, path, content = draw.choice(MALFORMED)
        answer = client.request(method, path, content=content, headers={"content-type": "application/json"})
        self.count("malformed")
        if not (400 <= answer.status_code < 500 or answer.status_code == 503) or "error" not in answer.json():
            self.fault(f"{method} {path} {content!r}: {answer.status_code} {answer.text[:200]}")
        time.sleep(0.05)

    # -- changing --------------------------------------------------------------------------------------------------

    def change(self, client: httpx.Client, draw: random.Random, own: list[str]) -> None:
        """Uploads, moves and removals of names that no other thread changes."""
        name = draw.choice(own)
        state = self.names[name]
        if len(state.now) > 1:
            self.settle(client, name)
        before = next(iter(state.now))
        kind = draw.choice(["upload", "upload", "move", "remove", "look"])
        if kind == "look":
            self.settle(client, name)
            if state.now != frozenset([before]):
                self.fault(f"{name} was {before} and is {set(state.now)}")
            return
        adapter = None if kind == "remove" else draw.choice(list(METHODS))
        digest = next((d for d, a in self.digests.items() if a == adapter), None)
        if kind == "move" and (digest is None or before is None):
            return
        state.put(frozenset([before, adapter]))
        if kind == "upload":
            answer = client.post("/v1/adapters", data={"name": name},
                                 files={"archive": ("a.zip", self.world.archives[adapter])})  # fmt: skip
        elif kind == "move":
            answer = client.put(f"/v1/adapters/{name}/alias", json={"version": digest})
        else:
            answer = client.delete(f"/v1/adapters/{name}")
        if answer.status_code in (200, 201):
            if kind == "upload":
                self.digests[answer.json()["version"].removeprefix("sha256:")] = adapter  # type: ignore[assignment]
            state.put(frozenset([adapter]))
            self.count(f"{kind}s")
        elif kind == "remove" and before is None and answer.status_code == 404:
            state.put(frozenset([None]))
        elif answer.status_code != 503:
            self.fault(f"{kind} of {name}: {answer.status_code} {answer.text[:200]}")

    def settle(self, client: httpx.Client, name: str) -> None:
        """Ask what a name means where its change was not answered; it is the old or the new, nothing else."""
        answer = client.get(f"/v1/adapters/{name}")
        if answer.status_code == 503:
            return
        found = None if answer.status_code == 404 else answer.json()["version"].removeprefix("sha256:")
        state = self.names[name]
        adapter = None if found is None else self.digests.get(found)
        if found is not None and adapter is None:  # an upload that was not answered, and was taken
            known = set(self.digests.values())
            new = [a for a in state.now if a is not None and a not in known]
            if len(new) == 1:
                adapter = self.digests[found] = new[0]
        if adapter not in state.now:
            self.fault(f"{name} is {adapter or found} and may be {set(state.now)}")
        state.put(frozenset([adapter]))

    def train(self, client: httpx.Client, draw: random.Random) -> None:
        """A job now and then; those that were acknowledged are there for ever."""
        rows = [{"prompt": f"w{draw.randrange(3, WORDS)} w9", "completion": "w11 w12"} for _ in range(6)]
        content = "\n".join(map(json.dumps, rows)).encode()
        file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", content)})
        if file.status_code == 200:
            self.files[file.json()["id"]] = content
            body = {"model": "base", "training_file": file.json()["id"], "suffix": f"job{len(self.jobs) % 3}",
                    "hyperparameters": {"n_epochs": draw.randrange(1, 30), "batch_size": 2}}  # fmt: skip
            job = client.post("/v1/fine_tuning/jobs", json=body)
            if job.status_code == 200:
                self.jobs.add(job.json()["id"])
                self.count("jobs")
                if draw.random() < 0.3:
                    client.post(f"/v1/fine_tuning/jobs/{job.json()['id']}/cancel")
        self.ending.wait(1.0 + 2 * draw.random())

    # -- after a start ---------------------------------------------------------------------------------------------

    def nothing_is_lost(self) -> None:
        """Names, files and jobs that were acknowledged are as they were."""
        with httpx.Client(base_url=self.server.url, timeout=60) as client:
            for name in self.names:
                self.settle(client, name)
            jobs = {j["id"] for j in client.get("/v1/fine_tuning/jobs?limit=10000").json()["data"]}
            if not self.jobs <= jobs:
                self.fault(f"jobs are lost: {self.jobs - jobs}")
            for file, content in list(self.files.items()):
                if client.get(f"/v1/files/{file}/content").content != content:
                    self.fault(f"file {file} is lost")


@contextlib.contextmanager
def fresh_server(world: World, folder: str | Path | None = None) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        server = Server(world.base, Path(place) / "state", Path(place) / "log")
        try:
            yield server
        finally:
            if server.process is not None and server.process.poll() is None:
                server.kill()
