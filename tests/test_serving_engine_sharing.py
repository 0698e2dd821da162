"""Shared beginnings, fairness and residency: what requests of one engine give and owe each other."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from engine_tools import add
from serving_tiny import WORDS, Alone, Inbox, ask, folders, model, prompts
from veneer.errors import VeneerError
from veneer.serving import Engine
from veneer.serving._prefix import BLOCK, Prefixes

METHODS: dict[str, Any] = {
    "lora": "lora",
    "prompt": ("prompt_tuning", {"length": 6}),
    "loreft": "loreft",
    "ladder": "ladder_side_tuning",
    "dora": "dora",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders("llama", METHODS, tmp_path_factory.mktemp("adapters"))


def long_prompts(count: int, common: int = 40) -> list[list[int]]:
    """Prompts that begin alike and end differently."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(3, WORDS, (common,), generator=generator).tolist()
    return [start + torch.randint(3, WORDS, (3 + i,), generator=generator).tolist() for i in range(count)]


# -- beginnings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_beginning_is_computed_once_and_changes_no_answer(family: str, tmp_path: Path) -> None:
    there = folders(family, METHODS, tmp_path)
    alone, inbox = Alone(family, there), Inbox()
    with Engine(model(family), slots=4, prefill=64) as engine:
        for name, folder in there.items():
            engine.add(name, folder)
        asked = [ask(p, name) for p in long_prompts(3) for name in (None, *there)]
        for request in asked:
            engine.submit(request, inbox)
        found = [inbox.tokens(r) for r in asked]
        cached = {r.id: inbox.last(r).cached_tokens for r in asked}
    assert found == [alone(list(r.prompt), r.version, 8) for r in asked]
    for version in (None, "lora", "prompt", "dora"):
        assert [cached[r.id] for r in asked if r.version == version] == [0, 2 * BLOCK, 2 * BLOCK]
    for version in ("loreft", "ladder"):  # its answers depend on where the prompt ends; it keeps a history
        assert [cached[r.id] for r in asked if r.version == version] == [0, 0, 0]


def test_requests_that_begin_alike_at_the_same_time_compute_their_beginning_once() -> None:
    inbox = Inbox()
    with Engine(model(), slots=4) as engine:
        asked = [ask(p) for p in long_prompts(4)]
        engine.do(lambda _: [engine.submit(r, inbox) for r in asked]).result()
        assert [inbox.last(r).cached_tokens for r in asked] == [0, 32, 32, 32]


def test_keys_share_no_beginnings_and_another_adapter_under_any_name_has_its_own() -> None:
    prefixes = Prefixes("base", 1 << 20)
    prompt = list(range(40))
    chains = [
        prefixes.chain(prompt, version, key) for version in (None, "a", "b", "base") for key in ("", "k", "l")
    ]
    chains.append(Prefixes("another base", 1 << 20).chain(prompt, None, ""))
    firsts = {c[0] for c in chains}
    assert len(firsts) == len(chains)
    assert len(chains[0]) == 2
    assert prefixes.chain([1, *prompt[1:]], None, "")[1] != chains[0][1]


def test_what_belongs_to_a_removed_adapter_is_forgotten(made: dict[str, Path]) -> None:
    inbox = Inbox()
    with Engine(model(), slots=2) as engine:
        engine.add("v", made["lora"])
        first = ask(long_prompts(1)[0], "v")
        engine.submit(first, inbox)
        inbox.last(first)
        assert engine.stats()["prefix"]["bytes"] > 0
        engine.remove("v")
        engine.do(lambda _: None).result()
        engine.do(lambda _: None).result()
        assert engine.stats()["prefix"]["bytes"] == 0
        engine.add("v", made["dora"])  # the engine cannot be talked into old values
        again = ask(long_prompts(1)[0], "v")
        engine.submit(again, inbox)
        assert inbox.last(again).cached_tokens == 0


def test_a_long_prompt_is_read_in_parts_while_others_speak() -> None:
    inbox = Inbox()
    with Engine(model(), slots=3, prefill=8, prefix_budget=0) as engine:
        speaker, reader = ask([3, 4, 5], count=60), ask(long_prompts(1, 90)[0], count=2)
        engine.submit(speaker, inbox)
        while not inbox.by_id:
            time.sleep(0.001)
        engine.submit(reader, inbox)
        inbox.last(reader)
        calls = [{e.id for e in call} for call in inbox.calls]
        before = next(i for i, ids in enumerate(calls) if reader.id in ids)
        assert sum(speaker.id in ids for ids in calls[:before]) >= 10
        assert inbox.tokens(reader) == Alone("llama", {})(list(reader.prompt), None, 2)


# -- fairness -----------------------------------------------------------------------------------------------------


def test_a_hundred_requests_of_one_adapter_hold_another_up_for_a_few_steps_alone(
    made: dict[str, Path],
) -> None:
    inbox = Inbox()
    with Engine(model(), slots=4) as engine:
        engine.add("heavy", made["lora"], warm=True)
        engine.add("light", made["dora"], warm=True)
        for name in ("heavy", "light"):
            engine.generate([3, 4], name, max_tokens=1)
        heavy = [ask(p, "heavy", 60) for p in prompts(100)]
        light = ask([3, 4, 5], "light", 4)
        for request in heavy:
            engine.submit(request, inbox)
        while len(inbox.calls) < 3:
            time.sleep(0.001)
        before = engine.stats()["steps"]
        engine.submit(light, inbox)
        assert inbox.last(light).finish == "length"
        took = engine.stats()["steps"] - before
        assert took <= 30, f"the light adapter waited {took} steps for 4 tokens"
        assert engine.stats()["queue"] > 90


def test_a_row_that_made_way_goes_on_where_it_was(made: dict[str, Path]) -> None:
    alone, inbox = Alone("llama", made), Inbox()
    with Engine(model(), slots=2) as engine:
        for name in made:
            engine.add(name, made[name])
        heavy = [ask(p, "ladder" if i % 2 else "prompt", 40, key="heavy") for i, p in enumerate(prompts(6))]
        light = [ask(p, "lora", 8, key="light") for p in long_prompts(6, 70)]  # they write over its slot
        for request in heavy:
            engine.submit(request, inbox)
        while len(inbox.calls) < 5:
            time.sleep(0.001)
        for request in light:
            engine.submit(request, inbox)
        found = [inbox.tokens(r) for r in (*heavy, *light)]
        assert engine.stats()["made_way"] > 0
    assert found == [alone(list(r.prompt), r.version, r.sampling.max_tokens) for r in (*heavy, *light)]


def test_weights_share_the_tokens_out() -> None:
    inbox = Inbox()
    with Engine(model(), slots=4, weights={"gold": 3.0, "lead": 1.0}) as engine:
        for i in range(40):
            for key in ("gold", "lead"):
                engine.submit(ask([3 + i, 4, 5], None, 20, key=key), inbox)
        while len(inbox.calls) < 60:
            time.sleep(0.001)
        served = engine.stats()["served"]
        gold, lead = 3 * served["key gold"], served["key lead"]
    assert 2 < gold / lead < 4


def test_nobody_waits_for_ever(made: dict[str, Path]) -> None:
    """An adapter for which there is no room while others are in use gets room when it has waited its time."""
    inbox = Inbox()
    with Engine(model(), slots=2, memory_budget=8000, patience=0.2) as engine:  # room for one
        engine.add("a", made["lora"])
        engine.add("b", made["dora"])
        waiting = None
        deadline = time.monotonic() + 20
        asked = []
        while time.monotonic() < deadline:  # a stream that would keep its adapter in use for ever
            if engine.stats()["queue"] < 3:
                asked.append(ask([3, 4, 5], "a", 30, key="busy"))
                engine.submit(asked[-1], inbox)
            if waiting is None:
                waiting = ask([5, 6], "b", 2, key="busy")
                engine.submit(waiting, inbox)
            if waiting.id in inbox.by_id:
                break
            time.sleep(0.002)
        assert inbox.last(waiting).finish == "length"
        assert engine.stats()["evictions"] >= 1


# -- residency ----------------------------------------------------------------------------------------------------


def test_adapters_beyond_the_budget_come_and_go_and_answer_right(made: dict[str, Path]) -> None:
    names = ["lora", "dora", "loreft", "prompt"]
    alone, inbox = Alone("llama", made), Inbox()
    with Engine(model(), slots=3, memory_budget=16000) as engine:
        for name in names:
            engine.add(name, made[name])
        asked = [ask(p, names[i * 7 % 4]) for i, p in enumerate(prompts(20))]
        for request in asked:
            engine.submit(request, inbox)
        assert [inbox.tokens(r) for r in asked] == [alone(list(r.prompt), r.version, 8) for r in asked]
        stats = engine.stats()
        assert stats["evictions"] > 0
        assert stats["resident_bytes"] <= 16000
        assert len(veneer.adapters(engine.model)) < 4


def test_a_folder_that_turns_out_broken_fails_its_own_requests_alone(
    made: dict[str, Path], tmp_path: Path
) -> None:
    broken = shutil.copytree(made["lora"], tmp_path / "broken")
    inbox = Inbox()
    with Engine(model(), slots=3) as engine:
        engine.add("good", made["dora"])
        engine.add("broken", broken)
        content = bytearray((broken / "adapter.safetensors").read_bytes())
        content[-3] ^= 0xFF  # the header still fits; the values are others
        (broken / "adapter.safetensors").write_bytes(content)
        asked = [ask(p, ["good", "broken", None][i % 3]) for i, p in enumerate(prompts(9))]
        for request in asked:
            engine.submit(request, inbox)
        for i, request in enumerate(asked):
            event = inbox.last(request)
            assert event.finish == ("error" if i % 3 == 1 else "length")
        assert "SHA-256" in str(inbox.last(asked[1]).error)
        shutil.copytree(made["lora"], broken, dirs_exist_ok=True)  # mended
        assert engine.generate([3, 4], "broken", max_tokens=2).completion_tokens == 2


def test_a_folder_of_another_base_or_shape_is_refused_at_once(made: dict[str, Path], tmp_path: Path) -> None:
    other = model()
    for p in other.parameters():
        p.data.add_(0.01)
    add(other, "lora", "x")
    trained_elsewhere = veneer.save(other, "x", tmp_path / "elsewhere")
    wide = shutil.copytree(made["lora"], tmp_path / "wide")
    record = json.loads((wide / "veneer.json").read_text())
    record["options"]["rank"] = 16
    (wide / "veneer.json").write_text(json.dumps(record))
    with Engine(model(), slots=2) as engine:
        with pytest.raises(VeneerError, match="other weights"):
            engine.add("elsewhere", trained_elsewhere)
        with pytest.raises(VeneerError, match="in the file, but"):
            engine.add("wide", wide)
        assert engine.versions == ()


def test_values_that_are_no_numbers_are_refused_with_the_tensors_name(
    made: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(made["lora"], tmp_path / "nan")
    values = load_file(str(folder / "adapter.safetensors"))
    key = sorted(values)[0]
    values[key][0] = float("nan")
    save_file(values, str(folder / "adapter.safetensors"))
    with Engine(model(), slots=2) as engine:
        engine.add("nan", folder)
        with pytest.raises(VeneerError, match=f"tensor '{key}'"):
            engine.generate([3, 4], "nan")
        assert engine.generate([3, 4]).finish == "length"


# -- failures -----------------------------------------------------------------------------------------------------


def test_a_row_that_raises_fails_alone(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alone, inbox = Alone("llama", made), Inbox()
    with Engine(model(), slots=4) as engine:
        for name in ("lora", "dora"):
            engine.add(name, made[name])
        plain = engine._batch._forward

        def forward(rows: Any, *args: Any, **kwargs: Any) -> Any:
            if any(r.request.prompt[0] == 96 and len(r.said) == 3 for r in rows):
                raise RuntimeError("this row")
            return plain(rows, *args, **kwargs)

        monkeypatch.setattr(engine._batch, "_forward", forward)
        asked = [ask(p, [None, "lora", "dora"][i % 3]) for i, p in enumerate(prompts(6))]
        bad = ask([96, 5, 6], "lora")
        for request in (*asked[:3], bad, *asked[3:]):
            engine.submit(request, inbox)
        assert inbox.last(bad).finish == "error"
        assert "this row" in str(inbox.last(bad).error)
        assert len(inbox.tokens(bad)) == 3
        assert [inbox.tokens(r) for r in asked] == [alone(list(r.prompt), r.version, 8) for r in asked]
        assert engine.alive


def test_numbers_that_are_none_stay_in_their_row(made: dict[str, Path]) -> None:
    """Keys and values of a spoilt row are zeroed: 0 times NaN in the next row's attention would be NaN."""
    alone, inbox = Alone("llama", made), Inbox()
    with Engine(model(), slots=3) as engine:
        engine.add("lora", made["lora"])
        engine.generate([3, 4], "lora", max_tokens=1)

        def spoil(served: Any) -> None:
            with torch.no_grad():
                for leaf in served.veneer.adapter("lora").leaves():
                    leaf.fill_(float("nan"))

        engine.do(spoil).result()
        # The short row moves into the spoilt slot, and sees as many positions as the long one has.
        long, short = ask(long_prompts(1, 60)[0], None, 40), ask([5, 6, 7], None, 40)
        bad = ask(long_prompts(1)[0], "lora", 20)
        engine.do(lambda _: [engine.submit(r, inbox) for r in (bad, long, short)]).result()
        assert inbox.last(bad).finish == "error"
        assert "NaN" in str(inbox.last(bad).error)
        after = ask([9, 8, 7], None, 60)
        engine.submit(after, inbox)
        for request in (long, short, after):
            assert inbox.tokens(request) == alone(list(request.prompt), None, request.sampling.max_tokens)


def test_a_sink_that_raises_hurts_nobody() -> None:
    inbox = Inbox()

    def sink(events: Any) -> None:
        raise RuntimeError("gone")

    with Engine(model(), slots=2) as engine:
        engine.submit(ask([3, 4], count=5), sink)
        request = ask([3, 4], count=5)
        engine.submit(request, inbox)
        assert inbox.last(request).finish == "length"
        assert engine.drain(10)


def test_work_runs_between_steps_on_the_models_thread() -> None:
    import threading

    with Engine(model(), slots=2) as engine:
        assert engine.do(lambda _: threading.current_thread().name).result() == "veneer-engine"
        future = engine.do(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            future.result()
        assert engine.alive


def test_taking_an_adapter_away_with_its_requests_leaves_the_others(made: dict[str, Path]) -> None:
    inbox = Inbox()
    with Engine(model(), slots=2) as engine:
        engine.add("a", made["lora"])
        engine.add("b", made["dora"])
        asked = [ask(p, "ab"[i % 2], 30) for i, p in enumerate(prompts(8))]
        for request in asked:
            engine.submit(request, inbox)
        engine.remove("a", drain=False)
        assert {inbox.last(r).finish for r in asked[::2]} <= {"cancelled", "length"}
        assert inbox.last(asked[6]).finish == "cancelled"
        assert {inbox.last(r).finish for r in asked[1::2]} == {"length"}
        assert engine.alive


def test_prompts_of_like_lengths_are_read_together_and_the_first_is_never_left_out() -> None:
    from types import SimpleNamespace as Waiting

    from veneer.serving._batch import _groups

    def lengths(waiting: list[int], budget: int) -> list[list[int]]:
        rows: Any = [Waiting(todo=[0] * n, length=0) for n in waiting]
        return [[len(r.todo) for r in group] for group in _groups(rows, budget)]

    assert lengths([], 64) == []
    assert lengths([100, 4, 5], 64) == [[100]]
    assert lengths([4, 100, 5], 256) == [[4, 5], [100]]
    assert lengths([30, 31, 32], 64) == [[30, 31]]
    assert lengths([28, 4, 24, 8, 20, 12, 16, 16], 256) == [[20, 24, 28], [4, 8, 12, 16, 16]]
