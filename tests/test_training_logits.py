"""Only needed logits: the gradient that is made in the forward, and what stands behind an output layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from veneer.tasks._answers import answer_losses, shifted
from veneer.tasks._collate import IGNORED
from veneer.tasks._logits import losses_in_chunks

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (3, 11), generator=draw)
    labels = torch.where(torch.rand(3, 11, generator=draw) < 0.4, ids, IGNORED)
    mask = torch.ones_like(ids)
    mask[1, 7:], labels[1, 7:] = 0, IGNORED
    return {"input_ids": ids, "attention_mask": mask}, labels


def whole_losses(model, inputs, labels):
    targets = shifted(labels)
    wanted = targets != IGNORED
    return F.cross_entropy(model(**inputs).logits[wanted], targets[wanted], reduction="none")


def gradients(model, losses):
    """Of a sum in which every label has a weight of its own, of all that requires one."""
    weights = torch.linspace(0.5, 2.0, len(losses), dtype=losses.dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad((losses * weights).sum(), trained)


def llama(tied=False, trained_head=False):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    ).double()
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.3)
        p.requires_grad_("q_proj" in name or (trained_head and "lm_head" in name))
    if tied and trained_head:
        model.lm_head.weight.requires_grad_()
    return model.eval()


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_gradients_in_pieces_are_those_of_the_whole_logits_in_float64(tied, trained_head):
    model = llama(tied, trained_head)
    inputs, labels = batch()
    expected = whole_losses(model, inputs, labels)
    found, rows = answer_losses(model, inputs, shifted(labels), chunk_bytes=4 * VOCABULARY * 2)
    assert found.dtype == torch.float64
    assert len(rows) == len(found) > 4
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(gradients(model, found), gradients(model, expected)):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))
        assert theirs.abs().max() > 1e-3


def test_a_bias_of_the_output_layer_counts():
    torch.manual_seed(0)
    head = nn.Linear(8, 5).double().requires_grad_(False)
    hidden = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 5, (7,))
    found = losses_in_chunks(head, hidden, targets, chunk_bytes=4 * 5 * 3)
    expected = F.cross_entropy(head(hidden), targets, reduction="none")
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)
    weights = torch.arange(7.0, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), hidden)[0] for y in (found, expected))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)


def test_nothing_as_wide_as_the_vocabulary_is_kept_for_the_backward():
    model, (inputs, labels) = llama(), batch()
    widths = []

    weight = model.lm_head.weight

    def note(x):
        if x.data_ptr() != weight.data_ptr():
            widths.append(x.shape[-1] if x.dim() else 0)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        losses = answer_losses(model, inputs, shifted(labels), chunk_bytes=4 * VOCABULARY * 2)[0]
    assert VOCABULARY not in widths
    assert SIZES["hidden_size"] in widths
    widths.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        whole_losses(model, inputs, labels)
    assert VOCABULARY in widths, "the plain way keeps them, or this test would hold whatever was done"
    assert losses.requires_grad
    assert not weight.requires_grad


def test_a_batch_without_labels_has_a_loss_of_zero_that_can_be_differentiated():
    model, (inputs, labels) = llama(), batch()
    losses, _ = answer_losses(model, inputs, torch.full_like(labels, IGNORED))
    losses.sum().backward()
    assert len(losses) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def capped():
    config = transformers.Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=0.5)
    return transformers.Gemma2ForCausalLM(config)


def scaled():
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=3.0))


@pytest.mark.parametrize("make", [capped, scaled])
def test_what_stands_behind_the_output_layer_is_done_at_the_picked_places_alone(make):
    torch.manual_seed(0)
    model = make().double().eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.3)
        p.requires_grad_("q_proj" in name)
    inputs, labels = batch()
    expected = whole_losses(model, inputs, labels)
    answer_losses(model, inputs, shifted(labels))  # the first looks whether places can be picked
    made = []
    model.lm_head.register_forward_hook(lambda m, i, o: made.append(o.shape[:-1].numel()))
    found, _ = answer_losses(model, inputs, shifted(labels))
    assert made == [len(found)]
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(gradients(model, found), gradients(model, expected)):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9 * float(theirs.abs().max()))
        assert theirs.abs().max() > 1e-4


class Mixing(nn.Module):
    """A model whose logits are less than the largest of their row: no place has them by itself."""

    def __init__(self):
        super().__init__()
        self.inner = llama()
        self.config = self.inner.config

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, input_ids, attention_mask):
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = output.logits - 0.1 * output.logits.amax(1, keepdim=True)
        return output


def test_logits_that_need_the_whole_row_are_made_whole():
    model, (inputs, labels) = Mixing().eval(), batch()
    expected = whole_losses(model, inputs, labels)
    for _ in range(2):
        found, _ = answer_losses(model, inputs, shifted(labels))
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_looking_whether_places_can_be_picked_moves_no_random_number():
    torch.manual_seed(0)
    model, (inputs, labels) = capped().train(), batch()
    before = torch.random.get_rng_state()
    answer_losses(model, inputs, shifted(labels))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(m.training for m in model.modules())
