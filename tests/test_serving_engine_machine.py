"""The engine as a machine: adapters and requests come and go in any order, and nobody gets another's answer."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import veneer
from engine_tools import SMALL, add
from serving_tiny import Alone, Inbox, ask, folders, model, prompts
from veneer.serving import Engine, Request, UnknownVersion

CONTENTS: dict[str, Any] = {
    "lora": "lora",
    "prompt": ("prompt_tuning", {"length": 4}),
    "loreft": "loreft",
    "ladder": "ladder_side_tuning",
    "dora": "dora",
}
COUNT = 6
PROMPTS = [*prompts(6), *(p[:3] + [7] * 30 for p in prompts(2))]


@functools.cache
def _world() -> tuple[tempfile.TemporaryDirectory[str], dict[str, Path], Alone]:
    place = tempfile.TemporaryDirectory()
    there = folders("llama", CONTENTS, Path(place.name))
    return place, there, Alone("llama", there)


@functools.cache
def _answer(prompt: int, content: str | None) -> list[int]:
    return _world()[2](PROMPTS[prompt], content, COUNT)


class Machine(RuleBasedStateMachine):
    """Names move over versions; a request's answer is that of the version that its name meant when it came."""

    def __init__(self) -> None:
        super().__init__()
        self.threads = set(threading.enumerate())
        self.base = model()
        self.engine = Engine(self.base, slots=3, memory_budget=13_000, queue_limit=64, prefill=16)
        self.inbox = Inbox()
        self.made = 0
        self.names: dict[str, tuple[str, str]] = {}  # name -> version, content
        self.asked: list[tuple[Request, int, str | None]] = []
        self.cancelled: set[str] = set()

    @rule(name=st.sampled_from("abc"), content=st.sampled_from(sorted(CONTENTS)), warm=st.booleans())
    def put(self, name: str, content: str, warm: bool) -> None:
        """A new version under a name; the one before it is removed when its last request is done."""
        self.made += 1
        version = f"{name} {self.made}"
        self.engine.add(version, _world()[1][content], warm=warm)
        before = self.names.get(name)
        self.names[name] = (version, content)
        if before is not None:
            self.engine.remove(before[0])

    @precondition(lambda self: self.names)
    @rule(data=st.data(), drain=st.booleans())
    def take_away(self, data: st.DataObject, drain: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        version, _ = self.names.pop(name)
        if not drain:
            self.cancelled |= {r.id for r, _, _ in self.asked if r.version == version}
        self.engine.remove(version, drain=drain)
        with pytest.raises(UnknownVersion):
            self.engine.submit(ask([3], version), self.inbox)

    @rule(data=st.data(), prompt=st.integers(0, len(PROMPTS) - 1), key=st.sampled_from(["", "k", "l"]))
    def request(self, data: st.DataObject, prompt: int, key: str) -> None:
        name = data.draw(st.sampled_from([None, *sorted(self.names)]))
        version, content = (None, None) if name is None else self.names[name]
        request = ask(PROMPTS[prompt], version, COUNT, key)
        self.engine.submit(request, self.inbox)
        self.asked.append((request, prompt, content))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request, _, _ = data.draw(st.sampled_from(self.asked))
        self.cancelled.add(request.id)
        self.engine.cancel(request.id)

    @precondition(lambda self: self.asked)
    @rule()
    def wait(self) -> None:
        self.inbox.last(self.asked[-1][0])

    @invariant()
    def it_lives_within_its_bounds(self) -> None:
        stats = self.engine.stats()
        assert stats["alive"]
        assert stats["resident_bytes"] <= 13_000
        assert stats["rows"] <= 3

    def teardown(self) -> None:
        try:
            for request, prompt, content in self.asked:
                last = self.inbox.last(request)
                wanted = _answer(prompt, content)
                tokens = self.inbox.tokens(request)
                assert sum(e.finish is not None for e in self.inbox.by_id[request.id]) == 1
                if last.finish == "cancelled":
                    assert request.id in self.cancelled
                    assert tokens == wanted[: len(tokens)]
                else:
                    assert (last.finish, tokens) == ("length", wanted)
            for version, _ in self.names.values():
                self.engine.remove(version)
            assert self.engine.drain(20)
            for _ in range(2):
                self.engine._wake()
            assert self.engine.stats()["rows"] == 0
        finally:
            self.engine.close()
        assert self.engine.stats()["residents"] == {}
        assert self.engine.stats()["resident_bytes"] == 0
        assert "veneer" not in self.base._modules
        assert set(threading.enumerate()) <= self.threads


Machine.TestCase.settings = settings(
    max_examples=int(os.environ.get("VENEER_EXAMPLES", "6")),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestMachine = Machine.TestCase


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_every_method_that_a_causal_base_can_have_is_served_as_it_is_alone(
    family: str, tmp_path: Path
) -> None:
    there: dict[str, Path] = {}
    for i, info in enumerate(veneer.methods()):
        base = model(family)
        try:
            add(base, info.key, info.key, seed=i, **SMALL.get(info.key, {}))
            there[info.key] = veneer.save(base, info.key, tmp_path / info.key)
        except veneer.errors.VeneerError:  # it combines others, needs data, or finds no site in this base
            continue
    there.pop("q_peft", None)  # its prompt is made from inputs that a prompt is not
    assert len(there) > 30
    alone, inbox = Alone(family, there), Inbox()
    with Engine(model(family), slots=8) as engine:
        for name, folder in there.items():
            engine.add(name, folder)
        asked = [ask(p, name) for p, name in zip(prompts(2 * len(there)), [*there, *there])]
        for request in asked:
            engine.submit(request, inbox)
        found = {r.id: inbox.tokens(r) for r in asked}
    wrong = {r.version for r in asked if found[r.id] != alone(list(r.prompt), r.version, 8)}
    assert not wrong


@pytest.mark.slow
def test_a_thousand_adapters_come_and_go_and_nothing_grows(tmp_path: Path) -> None:
    there = folders("llama", {"lora": "lora", "dora": "dora"}, tmp_path)
    inbox = Inbox()
    with Engine(model(), slots=4, memory_budget=40_000) as engine:
        for i in range(1000):
            engine.add(f"v{i}", there[["lora", "dora"][i % 2]])
        sizes = []
        for i in range(300):
            request = ask(PROMPTS[i % 6], f"v{i * 37 % 1000}", 2)
            engine.submit(request, inbox)
            inbox.last(request)
            sizes.append((engine.stats()["resident_bytes"], len(engine.model.veneer.names)))
        assert max(b for b, _ in sizes) <= 40_000
        assert max(n for _, n in sizes) <= 6
        assert engine.stats()["evictions"] > 200
