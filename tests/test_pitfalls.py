"""Fifteen ways in which adapters fail without a word. Each test keeps one of them loud."""

import copy
import inspect
import io
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import veneer
from engine_tools import add, base, inputs, out
from veneer.edits import Tensors
from veneer.engine import between_steps, check_gradients, parameters, prepare_training
from veneer.errors import NoGradient, ShapeDiffers, Unsupported


def test_1_a_forward_set_on_the_instance_is_rebound_or_refused():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, given = base("bert"), inputs("bert", 2)
    query = model.bert.encoder.layer[0].attention.self.query
    add_hook_to_module(query, ModelHook())
    before = out(model, given)
    add(model, "lora", "a", sites=["layer.0.attention.self.query"])
    assert (out(model, given) - before).abs().max() > 1e-6

    other = base("bert")
    module = other.bert.encoder.layer[0].attention.self.query
    plain = module.forward
    module.forward = lambda x: plain(x)
    with pytest.raises(Unsupported, match="forward"):
        veneer.attach(other, "lora", sites=["layer.0.attention.self.query"])
    assert "veneer" not in other._modules


@pytest.mark.parametrize("normalise", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_2_parametrized_modules_see_the_edited_weight(normalise):
    model = nn.Sequential(normalise(nn.Linear(6, 5).double()), nn.ReLU(), nn.Linear(5, 3).double()).eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    before = model(x)
    add(model, "full", "a", sites=["0"], size=0.1)
    edited = model(x)
    W = dict(veneer.trainable(model).items())["a.0/W"]
    linear = nn.functional.linear(x, W, model[0].bias)
    torch.testing.assert_close(edited, model[2](linear.relu()))
    assert (edited - before).abs().max() > 1e-3
    veneer.detach(model, "a")
    assert torch.equal(model(x), before)


def test_3_deepcopy_and_pickle_rebuild_the_exact_class():
    model, given = base("llama"), inputs("llama", 2, padding="left")
    add(model, "prefix_tuning", "a", length=3)
    y = out(model, given)
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(out(other, given), y)
        add(other, "prefix_tuning", "b", length=3, seed=5)
        veneer.activate(other, "a")
        assert torch.equal(out(other, given), y)
        veneer.detach(other, "b")
        assert type(other.model.layers[0].self_attn) is type(model.model.layers[0].self_attn)
    with torch.no_grad():
        for leaf in veneer.adapters(copied)["a"].leaves():
            leaf.zero_()
    assert torch.equal(out(model, given), y)


@pytest.mark.parametrize(("family", "part"), [("llama", "model"), ("bert", "bert"), ("t5", "encoder")])
def test_4_a_backbone_called_by_itself_has_the_adapter(family, part):
    model, given = base(family), inputs(family, 2)
    given = {k: v for k, v in given.items() if not k.startswith("decoder")}
    before = out(getattr(model, part), given)
    add(model, "lora", "a")
    assert (out(getattr(model, part), given) - before).abs().max() > 1e-6


@pytest.mark.parametrize("padding", ["left", "right"])
def test_5_a_head_that_picks_a_position_finds_it_beside_prompts(padding):
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config).double().eval()
    given = inputs("llama", 4, padding=padding)
    given["input_ids"] = given["input_ids"] * given["attention_mask"]
    add(model, "prompt_tuning", "p", length=4)
    with veneer.rows(model, ["p", None, "p", None]):
        together = out(model, given)
    for i, name in enumerate(["p", None, "p", None]):
        keep = given["attention_mask"][i].bool()
        alone = {k: v[i : i + 1][:, keep] for k, v in given.items()}
        with veneer.active(model, name):
            torch.testing.assert_close(out(model, alone)[0], together[i], atol=1e-9, rtol=0)


def test_6_padding_changes_nothing_where_positions_are_given():
    model = base("bert")
    add(model, "lora", "a")
    ids = torch.randint(5, 40, (1, 6))
    plain = out(model, {"input_ids": ids, "position_ids": torch.arange(6)[None]})
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    model_out = model.bert(
        input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).last_hidden_state[:, 3:]
    torch.testing.assert_close(
        model_out,
        model.bert(input_ids=ids, position_ids=torch.arange(6)[None]).last_hidden_state,
        atol=1e-10,
        rtol=0,
    )
    assert plain.isfinite().all()


def test_7_every_class_keeps_its_own_signature():
    bert, llama = base("bert"), base("llama")
    before = inspect.signature(bert.forward), inspect.signature(llama.forward)
    veneer.attach(bert, "lora")
    veneer.attach(llama, "lora")
    assert (inspect.signature(bert.forward), inspect.signature(llama.forward)) == before
    assert "labels" in inspect.signature(bert.forward).parameters


def test_8_weight_decay_leaves_neutral_tensors_alone():
    model = base("bert")
    veneer.attach(model, "ia3")
    groups = parameters(model, weight_decay=0.1)
    assert [g["weight_decay"] for g in groups] == [0.0]
    veneer.attach(model, "lora", name="l")
    assert {g["weight_decay"] for g in parameters(model, weight_decay=0.1)} == {0.1}


def test_9_a_trained_tensor_that_the_loss_never_reaches_is_an_error():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Half()
    veneer.attach(model, "lora", name="a", sites=["used", "unused"])
    prepare_training(model)
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(NoGradient, match="unused"):
        check_gradients(model)
    veneer.detach(model, "a")
    veneer.attach(model, "lora", name="b", sites=["used"])
    prepare_training(model)
    model(torch.randn(2, 4)).sum().backward()
    check_gradients(model)


def test_10_half_keeps_the_precision_of_adapters_and_frozen_tensors_move():
    model = base("llama", double=False)
    adapter = veneer.attach(model, "vera")
    model.to(torch.bfloat16)
    assert {p.dtype for p in adapter.leaves()} == {torch.float32}
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert out(model, inputs("llama", 2)).isfinite().all()
    model.to("meta")
    assert {t.device.type for t in model.veneer.shared.values()} == {"meta"}


def test_11_detach_gives_requires_grad_back():
    model = base("bert")
    model.bert.embeddings.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    veneer.attach(model, "lora", name="a")
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.startswith("veneer"))
    veneer.detach(model, "a")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_12_tensors_go_through_vmap_and_name_what_is_missing():
    t = Tensors(A=torch.randn(3, 2, 4), B=torch.randn(3, 4, 2))
    made = torch.vmap(lambda t: t.B @ t.A)(t)
    torch.testing.assert_close(made, t.B @ t.A)
    with pytest.raises(AttributeError, match="A, B"):
        _ = t.C
    assert not hasattr(t, "C")


def test_13_recurrent_modules_take_edits_for_some_rows():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            y, last = self.rnn(x)
            return self.head(y) + self.head(last[-1])[:, None]

    torch.manual_seed(0)
    model = Tagger().double().eval()
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    add(model, "lora", "a", sites=["rnn"])
    add(model, "lora", "b", sites=["rnn"], seed=5)
    names = ["a", None, "b", "a"]
    with veneer.rows(model, names):
        together = model(x)
    for i, name in enumerate(names):
        with veneer.active(model, name):
            torch.testing.assert_close(model(x[i : i + 1])[0], together[i], atol=1e-12, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-6
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))


def test_14_save_pretrained_keeps_base_and_adapters_apart(tmp_path):
    from safetensors.torch import load_file

    model, given = base("bert", double=False), inputs("bert", 2)
    keys = set(model.state_dict())
    add(model, "lora", "a")
    y = out(model, given)
    model.save_pretrained(tmp_path)
    written = set(load_file(str(tmp_path / "model.safetensors")))
    assert written <= keys
    again = type(model).__mro__[1].from_pretrained(tmp_path).eval()
    veneer.load(again, tmp_path / "veneer" / "a")
    torch.testing.assert_close(out(again, given), y, atol=1e-6, rtol=0)


def test_15_an_adapter_on_a_resized_embedding_refuses():
    model = base("gpt2")
    add(model, "lora", "head", sites="attention.query")
    add(model, "full", "table", sites="token_embedding")
    model.resize_token_embeddings(80)
    assert type(model.transformer.wte).__name__ == "Embedding"
    with veneer.active(model, "head"):
        assert out(model, inputs("gpt2", 2)).shape[-1] == 80
    with pytest.raises(ShapeDiffers, match="table"):
        out(model, inputs("gpt2", 2))


def test_between_steps_without_a_schedule_changes_nothing():
    model = base("bert")
    adapter = add(model, "lora", "a")
    before = [p.clone() for p in adapter.leaves()]
    between_steps(model, 1, 10)
    assert all(torch.equal(p, q) for p, q in zip(adapter.leaves(), before))


@pytest.mark.parametrize("fused", [False, True])
def test_evaluation_after_a_step_sees_the_step(fused):
    """torch's fused optimisers move tensors without raising their version."""
    model, given = base("bert"), inputs("bert", 2)
    add(model, "loreft", "a")
    optimizer = torch.optim.AdamW(parameters(model, lr=0.1), fused=fused)
    labels = torch.tensor([0, 1])
    seen = []
    for _ in range(3):
        model.eval()
        with torch.no_grad():
            seen.append(out(model, given).clone())
        model.train()
        model(**given, labels=labels).loss.backward()
        model.eval()
        with torch.no_grad():
            out(model, given)
        optimizer.step()
        with torch.no_grad():
            seen.append(out(model, given).clone())
        optimizer.zero_grad()
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changed == [True, False, True, False, True]


@pytest.mark.parametrize("name", ["adapter", "active", "forward", "a.b", "a b", "lora", "weight", "x/y", "ü"])
def test_any_printable_name_is_safe(name, tmp_path):
    model, given = base("bert"), inputs("bert", 2)
    add(model, "lora", name)
    y = out(model, given)
    veneer.save(model, name, tmp_path / "saved")
    other = base("bert")
    assert veneer.load(other, tmp_path / "saved").name == name
    assert torch.equal(out(other, given), y)
    veneer.detach(model, name)
    assert "veneer" not in model._modules
