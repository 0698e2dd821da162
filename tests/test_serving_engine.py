"""The serving engine: rows of many adapters and lengths share forwards, and each answers as if it were alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import veneer
from serving_tiny import Alone, Inbox, ask, folders, model, prompts
from veneer.errors import VeneerError
from veneer.serving import Engine, PromptTooLong, QueueFull, UnknownVersion

METHODS: dict[str, Any] = {
    "lora": "lora",
    "narrow lora": ("lora", {"rank": 3}),
    "dora": "dora",
    "ia3": "ia3",
    "prefix": ("prefix_tuning", {"length": 5}),
    "prompt": ("prompt_tuning", {"length": 6}),
    "loreft": "loreft",
    "llama adapter": "llama_adapter",
    "serial": "serial_adapter",
    "ladder": "ladder_side_tuning",
    "vera": "vera",
    "unipelt": "unipelt",
    "visual": "visual_prompt_tuning",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders("llama", METHODS, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def engine() -> Any:
    with Engine(model(), slots=4) as running:
        yield running


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_every_row_of_a_mixed_batch_answers_as_its_adapter_does_alone(family: str, tmp_path: Path) -> None:
    there = folders(family, METHODS, tmp_path)
    alone = Alone(family, there)
    inbox, asked = Inbox(), []
    with Engine(model(family), slots=6) as engine:
        assert engine.stats()["in_slots"]
        for name, folder in there.items():
            engine.add(name, folder)
        for i, prompt in enumerate(prompts(28)):
            request = ask(prompt, [None, *there][i % 14], 10)
            engine.submit(request, inbox)
            asked.append(request)
            time.sleep(0.002 * (i % 3))  # rows join at different steps
        found = [inbox.tokens(r) for r in asked]
    wanted = [alone(list(r.prompt), r.version, 10) for r in asked]
    assert found == wanted
    bare = [alone(list(r.prompt), None, 10) for r in asked]
    same = sum(a == b for a, b, r in zip(wanted, bare, asked) if r.version)
    assert same < 4, "the adapters do nothing, so nothing was shown"


def test_one_call_of_a_sink_brings_the_news_of_all_its_requests(engine: Engine) -> None:
    inbox = Inbox()
    asked = [ask(p, None, 6) for p in prompts(3)]
    for request in asked:
        engine.submit(request, inbox)
    for request in asked:
        inbox.last(request)
    assert any(len({e.id for e in call}) == 3 for call in inbox.calls)


def test_a_cancelled_row_is_free_at_once_and_says_so(engine: Engine) -> None:
    inbox = Inbox()
    request = ask(prompts(1)[0], None, 100)
    engine.submit(request, inbox)
    while not inbox.by_id:
        time.sleep(0.001)
    engine.cancel(request.id)
    assert inbox.last(request).finish == "cancelled"
    assert len(inbox.tokens(request)) < 100
    assert engine.stats()["rows"] == 0
    engine.cancel("nobody")


def test_an_answer_can_be_waited_for_and_followed(engine: Engine, made: dict[str, Path]) -> None:
    engine.add("lora", made["lora"])
    prompt = prompts(1)[0]
    answer = engine.generate(prompt, "lora", max_tokens=7, ignore_eos=True)
    events = list(engine.stream(prompt, "lora", max_tokens=7, ignore_eos=True))
    assert [t for e in events for t in e.tokens] == list(answer.tokens)
    assert answer.finish == "length"
    assert answer.completion_tokens == 7
    assert answer.prompt_tokens == len(prompt)


def test_what_cannot_be_served_is_said_when_it_is_asked(
    engine: Engine, made: dict[str, Path], tmp_path: Path
) -> None:
    inbox = Inbox()
    with pytest.raises(UnknownVersion, match="no adapter of version 'lorra'"):
        engine.submit(ask([3, 4], "lorra"), inbox)
    with pytest.raises(PromptTooLong, match="128 positions"):
        engine.submit(ask([3] * 128), inbox)
    with pytest.raises(VeneerError, match="token 97 is none"):
        engine.submit(ask([97]), inbox)
    with pytest.raises(VeneerError, match="top_p"):
        engine.submit(ask([3], top_p=0.0), inbox)
    with pytest.raises(VeneerError, match=r"holds no adapter|has no veneer"):
        engine.add("empty", tmp_path)
    engine.add("lora", made["lora"])
    with pytest.raises(VeneerError, match="known already"):
        engine.add("lora", made["dora"])


def test_a_full_queue_says_when_to_come_back() -> None:
    inbox = Inbox()
    with Engine(model(), slots=1, queue_limit=2) as engine:
        many = [ask(prompt, None, 60) for prompt in prompts(50)]
        with pytest.raises(QueueFull) as caught:
            [engine.submit(request, inbox) for request in many]  # type: ignore[func-returns-value]
        assert caught.value.retry_after >= 1


def test_an_adapter_that_is_removed_finishes_what_it_began_and_gives_its_memory_back(
    engine: Engine, made: dict[str, Path]
) -> None:
    inbox = Inbox()
    engine.add("lora", made["lora"])
    engine.add("dora", made["dora"])
    engine.generate([3, 4, 5], "dora", max_tokens=2)
    before = engine.stats()["resident_bytes"]
    request = ask(prompts(1)[0], "lora", 40)
    engine.submit(request, inbox)
    engine.remove("lora")
    with pytest.raises(UnknownVersion):
        engine.submit(ask([3, 4], "lora"), inbox)
    assert inbox.last(request).finish == "length"
    assert engine.drain(10)
    assert "lora" not in engine.stats()["residents"]
    assert engine.stats()["resident_bytes"] == before
    assert list(veneer.adapters(engine.model)) == ["dora"]


def test_closing_leaves_no_thread_and_a_bare_base(made: dict[str, Path]) -> None:
    inbox, base = Inbox(), model()
    before = set(threading.enumerate())
    engine = Engine(base, slots=2)
    engine.add("lora", made["lora"])
    asked = [ask(p, "lora", 100) for p in prompts(4)]
    for request in asked:
        engine.submit(request, inbox)
    engine.close()
    assert {inbox.last(r).finish for r in asked} == {"cancelled"}
    assert set(threading.enumerate()) == before
    assert not engine.alive
    assert "veneer" not in base._modules
    with pytest.raises(VeneerError, match="closed"):
        engine.submit(ask([3]), inbox)


def test_asking_and_looking_wait_for_no_forward_and_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's thread stands in a forward, then in the choice of a token: others come and go meanwhile."""
    from veneer.serving import _loop

    inbox = Inbox()
    with Engine(model(), slots=2) as engine:
        engine.generate([3, 4, 5], max_tokens=2)
        for place, name in ((engine._batch, "step"), (_loop, "choose")):
            inside, go_on = threading.Event(), threading.Event()
            plain = getattr(place, name)

            def held(*args: Any, plain: Any = plain, inside: Any = inside, go_on: Any = go_on) -> Any:
                inside.set()
                assert go_on.wait(20)
                return plain(*args)

            monkeypatch.setattr(place, name, held)
            first, second = ask([3, 4, 5], count=3), ask([6, 7], count=3)
            engine.submit(first, inbox)
            assert inside.wait(20)
            done = threading.Event()

            def others(first: Any = first, second: Any = second, done: Any = done) -> None:
                engine.submit(second, inbox)
                engine.cancel(first.id)
                assert engine.stats()["steps"] >= 1
                done.set()

            thread = threading.Thread(target=others)
            thread.start()
            free = done.wait(5)
            monkeypatch.setattr(place, name, plain)
            go_on.set()
            thread.join(20)
            assert free, f"others waited while the model's thread was in `{name}`"
            assert inbox.last(first).finish == "cancelled"
            assert inbox.last(second).finish == "length"


def test_requests_that_come_together_begin_together() -> None:
    inbox = Inbox()
    with Engine(model(), slots=4) as engine:
        engine.generate([3, 4], max_tokens=2)
        engine._seconds.append((2.0, 1))  # as if a step took two seconds: some milliseconds are nothing then
        asked = [ask(p, count=2) for p in prompts(4)]
        for request in asked:
            engine.submit(request, inbox)
            time.sleep(0.005)
        for request in asked:
            inbox.last(request)
    assert len(inbox.calls) == 2, "four requests, two tokens each"
