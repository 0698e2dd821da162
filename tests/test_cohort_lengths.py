"""Batches of like length share a forward: the smallest sum of tokens and calls, and the same gradients."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from veneer.training.cohorts import shared_forward
from veneer.training.cohorts.lengths import of_like_length


def cost(groups, sizes, one_more):
    return sum(sum(sizes[i][0] for i in g) * max(sizes[i][1] for i in g) + one_more for g in groups)


def all_groupings(count):
    """Every way to give `count` batches to groups."""
    for labels in product(range(count), repeat=count):
        yield [[i for i in range(count) if labels[i] == label] for label in sorted(set(labels))]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("one_more", [0, 3, 20, 10_000])
def test_no_other_grouping_costs_less(seed, one_more):
    draw = torch.Generator().manual_seed(seed)
    sizes = [tuple(torch.randint(1, 12, (2,), generator=draw).tolist()) for _ in range(5)]
    found = of_like_length(sizes, one_more)
    assert sorted(i for group in found for i in group) == list(range(5))
    assert all(group == sorted(group) for group in found)
    assert cost(found, sizes, one_more) == min(cost(g, sizes, one_more) for g in all_groupings(5))


def test_batches_of_one_length_are_never_parted():
    assert of_like_length([(4, 9)] * 5, 1) == [[0, 1, 2, 3, 4]]
    assert of_like_length([], 1) == []


def test_members_in_groups_by_length_have_the_gradients_of_one_forward(monkeypatch):
    import transformers

    import veneer
    from veneer import engine

    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).double().eval()
    names = {"a": 30, "b": 4, "c": 29, "d": 5}
    for name in names:
        veneer.attach(model, "lora", name=name, rank=2)
    draw = torch.Generator().manual_seed(1)
    for adapter in engine.adapters(model).values():
        for value in adapter.named().values():
            value.copy_(torch.randn(value.shape, generator=draw) * 0.3)
    for name in names:
        engine.require_gradients(model, name)
    batches = {
        name: {
            "input_ids": torch.randint(5, 60, (2, tokens), generator=draw),
            "attention_mask": torch.ones(2, tokens, dtype=torch.long),
            "labels": torch.randint(0, 2, (2,), generator=draw),
        }
        for name, tokens in names.items()
    }
    calls = []
    whole = shared_forward._forward
    monkeypatch.setattr(
        shared_forward,
        "_forward",
        lambda m, group, s: calls.append([a.name for a in group]) or whole(m, group, s),
    )

    def gradients(one_more):
        monkeypatch.setattr(shared_forward, "ONE_MORE", one_more)
        calls.clear()
        losses = shared_forward.shared_losses(
            model, {n: (lambda m, b=b: torch.nn.functional.cross_entropy(
                m(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits, b["labels"]
            )) for n, b in batches.items()},
        )  # fmt: skip
        torch.stack(list(losses.values())).sum().backward()
        found = {}
        for name, adapter in engine.adapters(model).items():
            for key, gradient in adapter.gradients().items():
                found[name, key] = gradient.clone()
                gradient.zero_()
        return found, list(calls)

    together, one = gradients(10_000)
    apart, two = gradients(8)
    assert one == [["a", "b", "c", "d"]]
    assert two == [["a", "c"], ["b", "d"]]
    assert together
    assert all(value.abs().max() > 0 for value in together.values())
    for key, value in together.items():
        torch.testing.assert_close(apart[key], value, rtol=1e-9, atol=1e-12)
