"""The memory forecast: its formula by hand, and its order of magnitude against a real step."""

from __future__ import annotations

import pytest
import torch

from veneer.anatomy import BaseFacts, memory, read
from veneer.errors import BadOption

FACTS = BaseFacts(blocks=(("", ("a", "b")),), width=10, vocabulary=100, causal=True)


def test_the_forecast_by_hand():
    """1000 frozen float32 numbers, 50 trained beside them, 2 rows of 3 tokens, width 10, two blocks."""
    assert memory(FACTS, 1000, 50, batch_size=2, length=3) == {
        "weights": 4000 + 200,
        "gradients": 200,
        "optimiser": 400,
        "activations": 2 * 16 * (2 * 3 * 10 * 4),
        "logits": 2 * 2 * 3 * 100 * 4,
        "total": 4200 + 200 + 400 + 7680 + 4800,
    }


def test_checkpointing_keeps_one_state_a_block_and_one_block():
    state = 2 * 3 * 10 * 4
    assert memory(FACTS, 1000, 50, 2, 3, checkpointing=True)["activations"] == 2 * state + 16 * state


def test_what_lies_below_the_lowest_trained_block_keeps_nothing():
    assert (
        memory(FACTS, 1000, 50, 2, 3, lowest_block=1)["activations"] * 2
        == memory(FACTS, 1000, 50, 2, 3)["activations"]
    )
    assert memory(FACTS, 1000, 0, 2, 3)["activations"] == 0


def test_full_training_does_not_count_the_weights_twice():
    assert memory(FACTS, 1000, 1000, 1, 1)["weights"] == 4000
    assert memory(FACTS, 1000, 50, 1, 1, dtype=torch.bfloat16)["weights"] == 2000 + 200
    assert memory(FACTS, 1000, 50, 1, 1, bytes_of_weights=600)["weights"] == 800


def test_unfused_scores_grow_with_the_square_of_the_length():
    extra = [
        memory(FACTS, 1, 1, 2, n, heads=4, fused_attention=False)["activations"]
        - memory(FACTS, 1, 1, 2, n)["activations"]
        for n in (3, 6)
    ]
    assert extra == [2 * 2 * 4 * 9 * 4, 2 * 2 * 4 * 36 * 4]


def test_odd_numbers_are_refused():
    with pytest.raises(BadOption, match="batch_size=-1"):
        memory(FACTS, 1, 1, batch_size=-1)
    with pytest.raises(BadOption, match="adamw"):
        memory(FACTS, 1, 1, optimiser="adamv")


def test_the_activations_of_a_small_llama_are_within_a_factor_of_two():
    """Bytes of the tensors that autograd saves, each storage once, against the formula (inner width 4, no
    dropout)."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=64,
        n_layer=4,
        n_head=4,
        n_positions=64,
        resid_pdrop=0,
        attn_pdrop=0,
        embd_pdrop=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 64, (4, 48))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(ids, labels=ids).loss.backward()
    found = memory(read(model).facts, 1, 1, 4, 48)
    assert 0.5 < (found["activations"] + found["logits"]) / sum(saved.values()) < 2
