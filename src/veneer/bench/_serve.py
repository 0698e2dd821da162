"""Serving: 64 requests from another process over HTTP, beside HF PEFT's `generate` on the same base.

The server runs in this process and the load in another, so that the CPU time of this process is what serving costs,
its HTTP included. The references are HF PEFT's `generate` request by request with each one's adapter set, and its
batches with one adapter, which mix nothing. Costs are CPU seconds a generated token; notes tell wall-clock figures.
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.errors import VeneerError, missing_package

from . import _bases, _drawn, _peer
from ._clock import Arm, _sample
from ._report import Expectation, Row
from ._size import Size

PROMPT, NEW = 16, 8
ONE, BATCH = "HF PEFT generate, one by one", "HF PEFT generate, batches of one adapter"
MIXED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lora", {"rank": 8}), ("dora", {"rank": 8}), ("ia3", {}), ("vera", {}), ("loreft", {}),
    ("prefix_tuning", {"length": 8}), ("serial_adapter", {}), ("norm_tuning", {}),
)  # fmt: skip
LEAST_AGREEMENT = 0.9  # of greedy tokens: rounding may turn a near tie


@dataclass(frozen=True)
class Version:
    """What the application asks of an adapter's record."""

    name: str
    method: str
    bytes: int = 0
    created: float = 0.0
    state: str = "verified"
    score: None = None

    @property
    def digest(self) -> str:
        return self.name


class Shelf:
    """A registry without a disk: every name is its own version."""

    def __init__(self) -> None:
        self.found: dict[str, Version] = {}

    def resolve(self, name: str) -> Version:
        return self.found[name]

    def versions(self) -> list[Version]:
        return list(self.found.values())


@dataclass
class Load:
    """Requests as one arm sends them, and what came of them at each repeat."""

    requests: list[dict[str, Any]]
    at_once: int
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(r["max_tokens"] for r in self.requests)

    @property
    def note(self) -> str:
        """Wall-clock figures, over all repeats."""
        first = sorted(r["first"] - r["began"] for a in self.answers for r in a["rows"])
        speed = statistics.median(self.tokens / a["seconds"] for a in self.answers)
        at = [first[min(len(first) - 1, int(q * len(first)))] for q in (0.5, 0.99)]
        return (
            f"by the clock: {speed:.0f} tokens/s, first token p50 {at[0]:.2f} s, p99 {at[1]:.2f} s, "
            f"fairness {statistics.median(self.fairness(a) for a in self.answers):.3f}"
        )

    def fairness(self, answer: dict[str, Any]) -> float:
        """Jain's index of the tokens a second that each adapter's requests had; 1 is the same for all."""
        size = {r["model"]: 0.0 for r in answer["rows"]}
        seconds = dict(size)
        for row, request in zip(answer["rows"], self.requests):
            size[row["model"]] += request["max_tokens"]
            seconds[row["model"]] += row["ended"] - row["began"]
        speeds = [size[m] / max(seconds[m], 1e-9) for m in size]
        return sum(speeds) ** 2 / (len(speeds) * sum(s * s for s in speeds))


class World:
    """The server with its adapters, the load generator, and HF PEFT's model on a base of its own."""

    def __init__(self, size: Size, open_: contextlib.ExitStack) -> None:
        self.size, self.count = size, 8 if size.toy else 64
        self.many = 4 if size.toy else 32
        self.few = 2 if size.toy else 8
        self.vocabulary = _bases.TOY_VOCABULARY if size.toy else _bases.VOCABULARY["smollm2"]
        ours, theirs, tokenizer, self.base_name = self._bases()
        self.loras = [f"lora{i}" for i in range(self.many)]
        self.mixed = [f"mixed{i}" for i in range(self.many)]
        self.theirs = self._peer(theirs)
        place = Path(open_.enter_context(tempfile.TemporaryDirectory()))
        self.folders = self._folders(ours, place)
        self.engine, self.shelf, self.url = open_.enter_context(_server(ours, tokenizer, self.many))
        for name in self.folders:
            self.add(name, self.folders[name])
        self.child = open_.enter_context(_child())
        self.error = self._compare()
        warm = self.load([*self.loras, *self.mixed], self.many, even=True, count=2 * self.many)
        self.serve(warm)
        warm.answers.clear()

    def _bases(self) -> tuple[Any, Any, Any, str]:
        """Two bases of the same weights, and a tokenizer; ours multiplies as the server does by default."""
        if self.size.toy:
            return _bases.causal(0, True), _bases.causal(0, True), _words(self.vocabulary), "a toy"
        from veneer.bases import open_base

        ours = open_base("builtin:smollm2", task="lm", matmul="packed")
        return ours.model, open_base("builtin:smollm2", task="lm").model, ours.tokenizer, "builtin:smollm2"

    def _peer(self, base: Any) -> Any:
        config = _peer.lora(_bases.QUERY_VALUE["smollm2"], 8, init_lora_weights=False)
        found = _peer.adapted(base, config, self.loras[0])
        _peer.add(found, config, self.loras[1 : self.few])
        return found

    def _folders(self, model: Any, place: Path) -> dict[str, Path]:
        """Every adapter in a folder: HF PEFT's own, further LoRA, and the methods in turn."""
        found: dict[str, Path] = {}
        _peer.copy(self.theirs, model, self.loras[: self.few])
        for i, name in enumerate([*self.loras[self.few :], *self.mixed]):
            key, options = ("lora", {"rank": 8}) if name in self.loras else MIXED[i % len(MIXED)]
            _drawn.draw(veneer.attach(model, key, name=name, activate=False, **options), i)
        for name in (*self.loras, *self.mixed):
            found[name] = veneer.save(model, name, place / name)
        for name in reversed(veneer.adapters(model)):
            veneer.detach(model, name)
        return found

    def add(self, name: str, folder: Path) -> None:
        self.engine.add(name, folder)
        self.shelf.found[name] = Version(name, "")

    # -- requests --------------------------------------------------------------------------------------------------

    def load(self, names: Sequence[str], at_once: int, *, even: bool, count: int | None = None) -> Load:
        """Requests over these adapters in turn. even: a prompt of 16 and 8 new tokens; else 4 to 28, and 2 to 14."""
        generator = torch.Generator().manual_seed(self.size.seed)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        requests = []
        for i in range(count or self.count):
            length, new = (PROMPT, NEW) if even else (draw(4, 28), draw(2, 14))
            ids = torch.randint(3, self.vocabulary, (length,), generator=generator).tolist()
            requests.append({"model": names[i % len(names)], "prompt": ids, "max_tokens": new})
        return Load(requests, at_once)

    def serve(self, load: Load) -> None:
        """All requests of a load, from the other process."""
        plan = {"url": self.url, "at_once": load.at_once, "requests": load.requests}
        self.child.stdin.write(json.dumps(plan) + "\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            raise VeneerError("the load generator ended.", next_step="its own error stands above")
        load.answers.append(json.loads(line))

    @torch.no_grad()
    def one_by_one(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        made = []
        for request in requests:
            self.theirs.set_adapter(request["model"])
            made += self._generate([request["prompt"]], request["max_tokens"])
        return made

    @torch.no_grad()
    def batches(self, requests: list[dict[str, Any]], rows: int) -> None:
        self.theirs.set_adapter(self.loras[0])
        for at in range(0, len(requests), rows):
            part = requests[at : at + rows]
            self._generate([r["prompt"] for r in part], part[0]["max_tokens"])

    def _generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = self.theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    def _compare(self) -> float:
        """The part of greedy tokens that differ from HF PEFT's, over the adapters that both have."""
        requests = self.load(self.loras[: self.few], self.few, even=True, count=self.few).requests
        ends = self.engine.words.eos
        wanted = self.one_by_one(requests)
        got = [
            list(self.engine.generate(r["prompt"], r["model"], max_tokens=r["max_tokens"], min_tokens=r["max_tokens"],
                                      stop_tokens=tuple(ends)).tokens)
            for r in requests
        ]  # fmt: skip
        pairs = [(a, b) for x, y in zip(wanted, got) for a, b in zip(x, y, strict=True)]
        agree = sum(a == b for a, b in pairs) / len(pairs)
        if agree < LEAST_AGREEMENT:
            raise VeneerError(
                f"serve: {agree:.3f} of the greedy tokens equal HF PEFT's, fewer than {LEAST_AGREEMENT}; nothing was "
                "timed.",
                next_step="a speed of wrong results is no speed: look at the adapters first",
            )
        return 1 - agree


def _words(count: int) -> Any:
    """A tokenizer whose tokens are w0 w1 ..."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0")


@contextlib.contextmanager
def _server(model: Any, tokenizer: Any, slots: int) -> Iterator[tuple[Any, Shelf, str]]:
    """An engine and its application on a free port of this machine. Beginnings of prompts are not kept."""
    try:
        import uvicorn

        from veneer.serving import Engine
        from veneer.serving.app import create_app
    except ImportError as error:
        raise missing_package(error.name or "uvicorn", "serve", "veneer bench serve") from None
    shelf = Shelf()
    with (
        Engine(model, tokenizer, name="base", slots=slots, max_length=128, prefix_budget=0) as engine,
        socket.socket() as listening,
    ):
        listening.bind(("127.0.0.1", 0))
        listening.listen(256)
        server = uvicorn.Server(uvicorn.Config(create_app(engine, shelf), log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield engine, shelf, f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@contextlib.contextmanager
def _child() -> Iterator[Any]:
    script = str(Path(__file__).with_name("_serve_load.py"))
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


# -- rows --------------------------------------------------------------------------------------------------------------


def serve(size: Size) -> list[Row]:
    with contextlib.ExitStack() as open_:
        return _rows(World(size, open_), size)


def _in_turn(arms: dict[str, Arm], repeats: int) -> dict[str, list[float]]:
    """As `interleaved`, without calls that warm: these arms take minutes, and the server is warm."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(repeats):
        for name in arms if i % 2 == 0 else reversed(arms):
            found[name].append(_sample(arms[name], 1))
    return found


def _rows(w: World, size: Size) -> list[Row]:
    few, many = w.few, w.many
    # "many" come all at once, twice as many as there are rows: half of them wait.
    loads = {
        "1 few": w.load(w.loras[:1], few, even=True), "few": w.load(w.loras[:few], few, even=True),
        "1 many": w.load(w.loras[:1], w.count, even=True), "many": w.load(w.loras, w.count, even=True),
        "mixed few": w.load(w.mixed[:few], few, even=False), "mixed many": w.load(w.mixed, w.count, even=False),
        "5 known": w.load(w.loras[:few], few, even=True), "1000 known": w.load(w.loras[:few], few, even=True),
    }  # fmt: skip
    peers = w.load(w.loras[:few], 1, even=True).requests
    known = [f"cold{i}" for i in range(10 if size.toy else 1000 - 2 * many)]
    arms = {name: Arm(lambda load=load: w.serve(load), once=True) for name, load in loads.items()}  # type: ignore[misc]
    alone = peers[
        : len(peers) // 4
    ]  # the cost of a token is the same for each, and all of them would take minutes
    arms["one"] = Arm(lambda: w.one_by_one(alone), once=True)
    arms["batch few"] = Arm(lambda: w.batches(peers, few), once=True)
    arms["batch many"] = Arm(lambda: w.batches(peers, many), once=True)
    thousand = arms.pop("1000 known")
    spent = _in_turn(arms, size.repeats)
    for name in known:
        w.add(name, w.folders[w.loras[0]])
    # The same arm again beside a thousand, and as often: what was there before cannot be taken back in turn.
    spent |= _in_turn({"1000 known": thousand}, size.repeats)
    tokens = {name: load.tokens for name, load in loads.items()}
    tokens |= {
        name: NEW * len(alone if name == "one" else peers) for name in ("one", "batch few", "batch many")
    }
    cost = {name: [s / tokens[name] for s in found] for name, found in spent.items()}
    expected = {
        ("few", "one"): 5.0, ("many", "one"): 7.0, ("few", "batch few"): 1.3, ("many", "batch many"): 1.3,
        ("mixed few", "few"): 0.8, ("mixed many", "many"): 0.8, ("many", "1 many"): 0.9, ("few", "1 few"): 0.9,
        ("1000 known", "5 known"): 0.95,
    }  # fmt: skip
    titles = {
        "few": f"{few} LoRA, {few} at once", "many": f"{many} LoRA, {w.count} at once in {many} rows",
        "1 few": f"1 LoRA, {few} at once", "1 many": f"1 LoRA, {w.count} at once in {many} rows",
        "mixed few": f"{few} of {len(MIXED)} methods, uneven, {few} at once",
        "mixed many": f"{many} of {len(MIXED)} methods, uneven, {w.count} at once in {many} rows",
        "5 known": f"{few} LoRA, {few} at once, {2 * many} known",
        "1000 known": f"the same, {2 * many + len(known)} known",
        "one": ONE, "batch few": f"{BATCH}, {few} rows", "batch many": f"{BATCH}, {many} rows",
    }  # fmt: skip
    rows = []
    for (name, reference), least in expected.items():
        over = (
            titles[reference]
            if reference in ("one", "batch few", "batch many")
            else f"veneer, {titles[reference]}"
        )
        rows.append(
            Row.of("serve", f"{w.base_name}, {titles[name]}", cost[name], cost[reference], error=w.error,
                   expected=size.expects(Expectation(least)), reference=over, notes=[loads[name].note])
        )  # fmt: skip
    return rows
