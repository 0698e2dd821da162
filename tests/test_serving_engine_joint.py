"""Single tokens of rows that speak and of prompts that are read, in one forward; and the slots that they lie in."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from serving_tiny import Alone, Inbox, ask, folders, model, prompts
from veneer.serving import Engine
from veneer.serving._joint import grouped

METHODS: dict[str, Any] = {
    "lora": "lora",
    "narrow lora": ("lora", {"rank": 3}),
    "prefix": ("prefix_tuning", {"length": 5}),
    "prompt": ("prompt_tuning", {"length": 6}),
    "loreft": "loreft",
    "dora": "dora",
    "serial": "serial_adapter",
}


def counting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each forward of the base has."""
    plain, seen = engine._batch._forward, []

    def forward(rows: Any, inputs: Any, *args: Any) -> Any:
        seen.append(len(rows))
        return plain(rows, inputs, *args)

    monkeypatch.setattr(engine._batch, "_forward", forward)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_rows_that_speak_and_prompts_of_any_length_share_one_forward(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = folders(family, {"lora": "lora", "dora": "dora"}, tmp_path)
    alone, inbox = Alone(family, there), Inbox()
    with Engine(model(family), slots=8) as engine:
        assert engine._batch.joins
        for name, folder in there.items():
            engine.add(name, folder, warm=True)
            engine.generate([3, 4], name, max_tokens=1)
        seen = counting(engine, monkeypatch)
        asked = [ask(p, [None, "lora", "dora"][i % 3], 3 + 2 * (i % 4)) for i, p in enumerate(prompts(8))]
        engine.do(lambda _: [engine.submit(r, inbox) for r in asked]).result()
        found = [inbox.tokens(r) for r in asked]
        late = [ask(p, "lora", 4) for p in prompts(3, seed=5)]  # they are read while others speak
        long = ask([7, 8, 9], "dora", 30)
        engine.submit(long, inbox)
        engine.do(lambda _: [engine.submit(r, inbox) for r in late]).result()
        found += [inbox.tokens(r) for r in (*late, long)]
    assert seen[0] == 8, "eight prompts of unequal lengths, one forward"
    assert found == [alone(list(r.prompt), r.version, r.sampling.max_tokens) for r in (*asked, *late, long)]


def test_prompts_read_in_small_parts_beside_every_kind_of_method_change_no_answer(tmp_path: Path) -> None:
    there = folders("llama", METHODS, tmp_path)
    alone, inbox = Alone("llama", there), Inbox()
    chance = random.Random(3)
    asked = [
        ask(
            [chance.randrange(3, 90) for _ in range(chance.randrange(1, 40))],
            chance.choice([None, *there]),
            chance.randrange(1, 12),
        )
        for _ in range(36)
    ]
    with Engine(model(), slots=5, prefill=7, prefix_budget=0) as engine:
        for name, folder in there.items():
            engine.add(name, folder)
        for request in asked:
            engine.submit(request, inbox)
        found = [inbox.tokens(r) for r in asked]
    assert found == [alone(list(r.prompt), r.version, r.sampling.max_tokens) for r in asked]


def test_rows_of_one_kind_of_adapter_are_neighbours_whoever_comes_and_goes(tmp_path: Path) -> None:
    there = folders("llama", METHODS, tmp_path)
    inbox, orders = Inbox(), []
    with Engine(model(), slots=7) as engine:
        for name, folder in there.items():
            engine.add(name, folder)
        plain = engine._batch.step

        def step() -> Any:
            rows = engine._batch.rows
            orders.append([r.kind for r in rows])
            assert [r.slot for r in rows] == list(range(len(rows)))
            return plain()

        engine._batch.step = step  # type: ignore[method-assign]
        asked = [ask(p, [None, *there][i % 8], 2 + i % 7) for i, p in enumerate(prompts(40))]
        for request in asked:
            engine.submit(request, inbox)
        for request in asked:
            assert inbox.last(request).finish == "length"
    for kinds in orders:
        changes = sum(a != b for a, b in itertools.pairwise(kinds))
        assert changes == max(0, len(set(kinds)) - 1)
    assert max(len(set(kinds)) for kinds in orders) > 3


@pytest.mark.parametrize("heads", [1, 3])
def test_grouped_attention_over_strided_slots_is_attention(heads: int) -> None:
    memory = torch.randn(5, 2, 40, 8)
    q, k, v = torch.randn(3, 2 * heads, 1, 8), memory[1:4, :, :20], memory.flip(0)[1:4, :, :20]
    seen = torch.rand(3, 20) > 0.4
    seen[:, 0] = True
    bias = torch.zeros(3, 1, 1, 20).masked_fill(~seen[:, None, None], -torch.inf)
    got = grouped(q, k, v, bias.expand(-1, 2, -1, -1).flatten(0, 1), 0.3)
    wide = [x.repeat_interleave(heads, 1) for x in (k, v)]
    weights = ((q @ wide[0].mT) * 0.3).masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    assert torch.allclose(got, weights @ wide[1], atol=1e-5)


def test_prompts_of_one_length_and_many_adapters_answer_as_each_alone(tmp_path: Path) -> None:
    there = folders("llama", {f"lora{i}": "lora" for i in range(6)}, tmp_path)
    alone, inbox, rectangles = Alone("llama", there), Inbox(), []
    with Engine(model(), slots=6) as engine:
        for name, folder in there.items():
            engine.add(name, folder, warm=True)
            engine.generate([3, 4], name, max_tokens=1)
        plain = engine._batch._read
        engine._batch._read = lambda rows: rectangles.append(len(rows)) or plain(rows)  # type: ignore
        asked = [ask([5 + i, *range(20, 29)], name, 6) for i, name in enumerate(there)]
        engine.do(lambda _: [engine.submit(r, inbox) for r in asked]).result()
        found = [inbox.tokens(r) for r in asked]
    assert rectangles == [6]
    assert found == [alone(list(r.prompt), r.version, 6) for r in asked]
