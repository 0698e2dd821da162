"""Bases of many kinds under the engine: sliding windows, eager attention, no cache at all, two stacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import veneer
from engine_tools import add
from serving_tiny import COMMON, WORDS, Inbox, ask, prompts
from veneer.serving import Engine

GROUPED = {**COMMON, "num_key_value_heads": 2}
SMALL = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2}
WINDOW = {**GROUPED, "sliding_window": 6, "head_dim": 8}

BASES: dict[str, tuple[Callable[[], Any], bool]] = {  # and whether its rows run in slots
    "a window in all layers": (lambda: t.MistralForCausalLM(t.MistralConfig(**WINDOW)), True),
    "a window in some layers": (
        lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**WINDOW, layer_types=["sliding_attention", "full_attention"])
        ),
        True,
    ),
    "masks that are added": (
        lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED, attn_implementation="eager")),
        True,
    ),
    "experts": (lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=4)), True),
    "biases by distance": (
        lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4)),
        False,
    ),
    "no attention": (lambda: t.MambaForCausalLM(t.MambaConfig(**SMALL, state_size=4)), False),
    "two stacks": (
        lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=WORDS,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
        False,
    ),
}


def fresh(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = BASES[kind][0]().eval()
        for p in made.parameters():
            if p.dim() > 1:
                p.data.normal_(0, 0.3)
    return made


@pytest.mark.parametrize("kind", BASES)
def test_a_base_of_any_kind_answers_as_through_generate(kind: str, tmp_path: Path) -> None:
    base, inbox = fresh(kind), Inbox()
    add(base, "lora", "x", size=0.3, **({"sites": "*.in_proj"} if kind == "no attention" else {}))
    add(base, "lora", "y", seed=3, size=0.3, **({"sites": "*.in_proj"} if kind == "no attention" else {}))
    for name in ("x", "y"):
        veneer.save(base, name, tmp_path / name)
    with Engine(fresh(kind), slots=3) as engine:
        assert engine.stats()["in_slots"] is BASES[kind][1]
        for name in ("x", "y"):
            engine.add(name, tmp_path / name)
        asked = [ask(p, [None, "x", "y"][i % 3], 9) for i, p in enumerate(prompts(6))]
        for request in asked:
            engine.submit(request, inbox)
        found = [inbox.tokens(r) for r in asked]
    for request, tokens in zip(asked, found):
        out = base.generate(
            torch.tensor([request.prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0,
            adapters=[request.version],
        )[0].tolist()  # fmt: skip
        assert tokens == (out[1:] if kind == "two stacks" else out[len(request.prompt) :])
