"""Flat tokens: the same results and gradients as with padding, of every method, and no padding computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from engine_tools import SMALL
from training_tiny import bert_base, opened
from veneer import engine
from veneer.engine._flat import Layout
from veneer.testing import Subject, bases
from veneer.testing._subject import clear, gradients
from veneer.training import Hooks, train

OPTIONS = {
    "fish_mask": {"keep_ratio": 0.05}, "compacter": {"reduction": 4}, "hyperformer": {"tasks": 2},
    "mam": {"length": 4, "hidden": 8}, "p_tuning": {"length": 4}, "vera": {"rank": 16}, "hira": {"rank": 4},
    "lokr": {"rank": 3, "alpha": 6.0}, **SMALL, "boft": {"factors": 2}, "prompt_tuning": {"length": 4},
    "prefix_tuning": {"length": 4},
}  # fmt: skip
BASES = ("bert", "llama", "gpt2")


def loss_of(subject, model, contents, side="right"):
    """Depends on every real output; of an encoder's states and its logits."""
    return sum(subject.losses(model, contents, side=side))


def both(subject, model, adapter, contents, side="right"):
    """(loss, gradients of the adapter, whether the backbone saw one row) with padding and flat."""
    found = []
    for flat in (False, True):
        clear(adapter)
        shapes = []
        block = engine.host_of(model).anatomy.facts.blocks[0][1][0]
        handle = model.get_submodule(block).register_forward_hook(
            lambda m, i, o: shapes.append((o if isinstance(o, torch.Tensor) else o[0]).shape[0])  # noqa: B023
        )
        with engine.flat_tokens(model, flat):
            loss = loss_of(subject, model, contents, side)
            loss.backward()
        handle.remove()
        found.append((loss.detach(), gradients(adapter), 1 in shapes))
    return found


def agree(one, two):
    scale = max(float(g.abs().max()) for g in two[1].values() if g.numel())
    assert scale > 1e-6
    assert torch.allclose(one[0], two[0], rtol=1e-9, atol=1e-12)
    for name, expected in two[1].items():
        assert torch.allclose(one[1][name], expected, rtol=1e-8, atol=1e-9 * scale), name


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("key", sorted(m.key for m in veneer.methods()))
def test_every_method_gives_the_same_loss_and_gradients_flat_as_padded(key, base):
    subject = Subject(key, bases.get(base), OPTIONS.get(key))
    if subject.reason:
        pytest.skip(subject.reason)
    model = subject.model()
    adapter = subject.attach(model)
    contents = subject.base.contents(5)
    padded, flat = both(subject, model, adapter, contents)
    assert (padded[2], flat[2]) == (False, True)
    agree(flat, padded)


def of_rows(model):
    """Whether an edit was given rows because it asked for a fact of them, by site."""
    return {
        k: v for a in engine.adapters(model).values() for k, v in a.__dict__.get("_reads_rows", {}).items()
    }


@pytest.mark.parametrize(
    "key", ["lora", "dora", "vera", "ia3", "bitfit", "full", "serial_adapter", "pfeiffer_adapter"]
)
def test_edits_that_take_each_token_for_itself_are_not_given_rows(key):
    subject = Subject(key, bases.get("bert"))
    model = subject.model()
    adapter = subject.attach(model)
    both(subject, model, adapter, subject.base.contents(5))
    found = adapter.__dict__["_reads_rows"]
    assert found
    assert not any(found.values())


def test_edits_at_places_of_the_prompt_are_given_rows():
    subject = Subject("loreft", bases.get("llama"))
    model = subject.model()
    adapter = subject.attach(model)
    both(subject, model, adapter, subject.base.contents(5))
    assert all(adapter.__dict__["_reads_rows"].values())


@pytest.mark.parametrize("key", ["lora", "prefix_tuning", "prompt_tuning", "loreft", "unipelt"])
def test_padding_on_the_left_is_no_other(key):
    subject = Subject(key, bases.get("llama"), OPTIONS.get(key))
    model = subject.model()
    adapter = subject.attach(model)
    padded, flat = both(subject, model, adapter, subject.base.contents(5), side="left")
    assert flat[2]
    agree(flat, padded)


@pytest.mark.parametrize("key", ["lora", "loreft", "prefix_tuning", "serial_adapter", "ladder_side_tuning"])
def test_blocks_that_run_again_for_their_backward_are_flat_again(key):
    subject = Subject(key, bases.get("llama"), OPTIONS.get(key))
    model = subject.model()
    adapter = subject.attach(model)
    contents = subject.base.contents(5)
    model.train()
    padded, flat = both(subject, model, adapter, contents)
    agree(flat, padded)
    adapter.__dict__.pop("_reads_rows", None)  # as in a run that begins with checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, again = both(subject, model, adapter, contents)
    assert again[2]
    agree(again, padded)


@pytest.mark.parametrize("key", ["lora", "serial_adapter"])
def test_dropout_of_an_adapter_draws_what_it_draws_with_padding(key):
    subject = Subject(key, bases.get("bert"), {"dropout": 0.4})
    model = subject.model()
    adapter = subject.attach(model)
    model.train()
    with engine.without_dropout(model), engine.dropout_seeds(model, {"a": 3}):
        padded, flat = both(subject, model, adapter, subject.base.contents(5))
    agree(flat, padded)


def test_a_batch_without_padding_or_with_names_by_row_runs_as_it_is():
    subject = Subject("lora", bases.get("llama"))
    model = subject.model()
    adapter = subject.attach(model)
    contents = subject.base.contents(5)
    alike = [{**c, "ids": contents[0]["ids"]} for c in contents]
    assert not both(subject, model, adapter, alike)[1][2]
    with engine.rows(model, ["a", None, "a", None, "a"]):
        padded, flat = both(subject, model, adapter, contents)
    assert not flat[2]
    agree(flat, padded)


def roberta():
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, pad_token_id=1, type_vocab_size=1, num_labels=3,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config)


def windowed():
    import transformers

    config = transformers.MistralConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, sliding_window=4, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    return transformers.MistralForSequenceClassification(config)


def eager():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, pad_token_id=0, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


def experts():
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, num_local_experts=4, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    return transformers.MixtralForSequenceClassification._from_config(config, experts_implementation="eager")


def drawn(make):
    torch.manual_seed(0)
    model = make().double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def uneven(pad=0):
    draw = torch.Generator().manual_seed(1)
    lengths = (9, 3, 7, 7, 5)
    ids = torch.full((5, 9), pad)
    for i, n in enumerate(lengths):
        ids[i, :n] = torch.randint(5, 48, (n,), generator=draw)
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


@pytest.mark.parametrize("make", [roberta, windowed, eager, experts])
def test_positions_windows_masks_and_experts_of_other_bases_are_the_same(make):
    model = drawn(make)
    veneer.attach(model, "lora", name="a")
    leaves = [p for g in engine.parameters(model) for p in g["params"]]
    with torch.no_grad():
        for p in leaves:
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    inputs = uneven(pad=model.config.pad_token_id)
    found = []
    for flat in (False, True):
        with engine.flat_tokens(model, flat):
            logits = model(**inputs).logits
            found.append([logits, *torch.autograd.grad(logits.sin().sum(), leaves)])
    assert engine.why_not_flat(model) is None
    for one, two in zip(*found):
        assert torch.isfinite(one).all()
        assert torch.allclose(one, two, rtol=1e-8, atol=1e-9 * one.abs().max().item())
        assert one.abs().max() > 1e-6


def test_bases_that_cannot_be_flat_say_why():
    import transformers

    for name in ("t5", "bart", "vit", "mlp"):
        model = bases.get(name).model()
        engine.host_of(model, make=True)
        assert engine.why_not_flat(model), name
    config = transformers.MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = transformers.MambaForCausalLM(config)
    engine.host_of(model, make=True)
    assert engine.why_not_flat(model)


# ---- in the loop


def trained(**options):
    return train(
        model=bert_base(), data=opened(), learning_rate=1e-2, batch_size=8, progress=False, device="cpu",
        **{"method": "lora", "epochs": 1, **options},
    )  # fmt: skip


def losses(result):
    return torch.tensor([h["loss"] for h in result.history if "loss" in h and "split" not in h])


def blocks_seen(monkeypatch):
    """How many layouts were made."""
    made = []
    plain = Layout.__init__

    def note(self, mask):
        made.append(mask.shape)
        plain(self, mask)

    monkeypatch.setattr(Layout, "__init__", note)
    return made


def test_a_run_without_padding_takes_the_steps_of_a_run_with_it(monkeypatch):
    made = blocks_seen(monkeypatch)
    one = trained(base_dropout=False)
    assert len(made) > 5
    assert not any("padding" in n for n in one.notes)
    made.clear()
    two = trained(base_dropout=False, flat=False)
    assert not made
    assert torch.allclose(losses(one), losses(two), rtol=1e-4)
    assert len(losses(one)) > 5


class Reversed(nn.Module):
    """Mixes the tokens of a row in a way that no structure shows."""

    def forward(self, x):
        return x + 0.5 * x.flip(1)


def test_a_base_whose_rows_are_not_apart_when_flat_is_seen_and_trained_with_padding(monkeypatch):
    made = blocks_seen(monkeypatch)
    base = bert_base()
    layer = base.model.bert.encoder.layer[0].output
    layer.LayerNorm = nn.Sequential(layer.LayerNorm, Reversed())
    result = train(
        model=base, data=opened(), learning_rate=1e-2, batch_size=8, progress=False, device="cpu", max_steps=4
    )
    assert len(made) == 1  # it was looked at once
    assert any("padding is computed: flat, loss or gradients differ" in n for n in result.notes)


@pytest.mark.parametrize("method", ["lora", "lora:sites=block[-1:].attention.{query,value}"])
def test_the_look_costs_a_few_short_rows_whether_states_are_kept_or_not(method, monkeypatch):
    from veneer.training import _flat

    seen = []
    inside = _flat.FlatTokens._gradients

    def noted(self, batch):
        seen.append(batch.inputs["input_ids"].shape)
        return inside(self, batch)

    monkeypatch.setattr(_flat.FlatTokens, "_gradients", noted)
    made = blocks_seen(monkeypatch)
    trained(base_dropout=False, method=method)
    assert len(made) > 5
    assert len(seen) == 2  # both ways, once a run
    assert {shape[0] for shape in seen} == {3}


def test_what_a_run_found_of_flat_tokens_is_in_its_checkpoint(tmp_path):
    class Stop(Hooks):
        def between_steps(self, run, step):
            if step == 5:
                raise KeyboardInterrupt

    whole = trained(output=tmp_path / "whole", save_every=2, method="lora:dropout=0.3")
    with pytest.raises(KeyboardInterrupt):
        trained(output=tmp_path / "parts", save_every=2, method="lora:dropout=0.3", hooks=[Stop()])
    parts = trained(output=tmp_path / "parts", save_every=2, method="lora:dropout=0.3")
    assert parts.metrics == whole.metrics
    assert parts.predictions == whole.predictions
