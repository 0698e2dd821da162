"""Quantised linear layers against values worked by hand, the published table, and their dense form."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from veneer.bases.quantised import (
    FORMS,
    NF4,
    Int8Linear,
    NF4Linear,
    dynamic_map,
    is_quantised,
    normal_float,
    quantise_model,
    quantised_linear,
)
from veneer.errors import BadOption, ShapeDiffers

FORM_NAMES = list(FORMS)


def layer(n_in=70, n_out=48, bias=True, seed=0):
    torch.manual_seed(seed)
    made = nn.Linear(n_in, n_out, bias=bias)
    with torch.no_grad():
        made.weight.normal_()
    return made


def test_the_table_of_nf4_is_the_one_that_its_quantiles_give():
    assert max(abs(a - b) for a, b in zip(normal_float(4), NF4)) < 2e-7
    assert normal_float(2) == pytest.approx([-1, 0, 0.337915, 1], abs=1e-6)
    assert normal_float(3) == pytest.approx(
        [-1, -0.478629, -0.217142, 0, 0.16093, 0.337915, 0.562617, 1], abs=1e-6
    )


def test_the_map_of_scales_has_its_published_ends():
    values = dynamic_map()
    assert len(values) == len(set(values)) == 256
    assert values[-2:] == pytest.approx([0.9929688, 1.0], abs=1e-7)
    assert min(v for v in values if v > 0) == pytest.approx(5.5e-7)
    assert -1.0 not in values


def test_nf4_by_hand():
    """One row of values that stand in the table is stored exactly, and the first code is the high half."""
    W = torch.tensor([[2.0, -2.0, 0.0, 2 * NF4[9]]])
    made = NF4Linear(W)
    assert made.codes[:, 0].tolist() == [15 << 4 | 0, 7 << 4 | 9]
    torch.testing.assert_close(made.dense_weight(), W, rtol=1e-6, atol=0)


def test_a_value_on_a_midpoint_takes_the_lower_code():
    middle = (torch.tensor(NF4[8]) + torch.tensor(NF4[9])) / 2
    made = NF4Linear(torch.tensor([[1.0, middle.item()]]))
    assert made.codes[0, 0].item() & 15 == 8


def test_int8_by_hand():
    """Row maximum 2: codes are 127 W / 2, rounded."""
    made = Int8Linear(torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]]))
    assert made.codes.tolist() == [[127, -64, 32], [0, 0, 0]]
    torch.testing.assert_close(made.dense_weight()[0], torch.tensor([127, -64, 32]) * 2 / 127)
    assert made.dense_weight()[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("shape", [(48, 70), (1, 3), (64, 64), (3, 333)])
def test_the_error_of_a_weight_is_within_half_a_step(form, shape):
    torch.manual_seed(1)
    W = torch.randn(shape)
    error = (FORMS[form](W).dense_weight() - W).abs()
    if form == "int8":
        assert (error <= W.abs().amax(1, keepdim=True) / 254 + 1e-6).all()
    else:
        # The widest gap of the table is 0.304; the 8-bit scales add about 1 % of their spread.
        flat, blocks = W.reshape(-1), F.pad(W.reshape(-1), (0, -W.numel() % 64)).view(-1, 64)
        scale = blocks.abs().amax(1).repeat_interleave(64)[: flat.numel()]
        assert (error.reshape(-1) <= 0.153 * scale + 0.02 * scale.max()).all()
        assert error.norm() / W.norm() < 0.11
    assert error.max() > 0


def test_bits_a_weight_are_those_of_the_paper():
    W = torch.randn(512, 1024)
    assert NF4Linear(W).nbytes * 8 / W.numel() == pytest.approx(4.127, abs=1e-3)
    assert Int8Linear(W).nbytes == W.numel() + 4 * 512


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_dense_weight(form, bias):
    made = quantised_linear(layer(bias=bias), form)
    dense, x = made.dense_weight(), torch.randn(3, 5, 70, requires_grad=True)
    weights = torch.randn(3, 5, 48)
    wanted = torch.autograd.grad((F.linear(x, dense, made.bias) * weights).sum(), [x, *made.parameters()])
    found = torch.autograd.grad((made(x) * weights).sum(), [x, *made.parameters()])
    torch.testing.assert_close(made(x), F.linear(x, dense, made.bias), rtol=0, atol=0)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORM_NAMES)
def test_the_backward_keeps_no_dense_weight(form):
    made, kept = quantised_linear(layer(512, 512), form), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        made(torch.randn(2, 512, requires_grad=True))
    assert max(kept, default=0) < 512 * 512


@pytest.mark.parametrize("form", FORM_NAMES)
def test_scales_stay_exact_when_the_dtype_changes(form):
    made = quantised_linear(layer(), form)
    before = made.dense_weight()
    made.to(torch.bfloat16)
    assert made.dense_weight().dtype == made(torch.randn(2, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16
    torch.testing.assert_close(made.dense_weight(), before.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(made.float().dense_weight(), before, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORM_NAMES)
def test_the_stored_codes_travel_by_state_dict_deepcopy_and_pickle(form):
    made, other = quantised_linear(layer(), form), quantised_linear(layer(seed=3), form)
    assert not torch.equal(made.dense_weight(), other.dense_weight())
    other.load_state_dict(made.state_dict())
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for copied in (other, copy.deepcopy(made), torch.load(file, weights_only=False)):
        assert torch.equal(copied.dense_weight(), made.dense_weight())


@pytest.mark.parametrize("form", FORM_NAMES)
def test_requantise_stores_another_weight_and_the_old_codes_come_back_bit_for_bit(form):
    made = quantised_linear(layer(), form)
    stored, before = copy.deepcopy(made.state_dict()), made.dense_weight()
    W = torch.randn(48, 70) * 3
    made.requantise_(W)
    assert (made.dense_weight() - W).norm() / W.norm() < 0.11
    made.load_state_dict(stored)
    assert torch.equal(made.dense_weight(), before)
    with pytest.raises(ShapeDiffers, match=r"\(70, 48\)"):
        made.requantise_(W.T)


@pytest.mark.parametrize("form", FORM_NAMES)
def test_requantising_what_was_dequantised_changes_little(form):
    made = quantised_linear(layer(), form)
    before = made.dense_weight()
    made.requantise_(before)
    torch.testing.assert_close(made.dense_weight(), before, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("form", FORM_NAMES)
def test_it_compiles_without_a_break_and_maps_over_batches(form):
    made, x = quantised_linear(layer(), form), torch.randn(4, 2, 70)
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.func.vmap(made)(x), made(x))


@pytest.mark.parametrize("form", FORM_NAMES)
def test_a_transposed_layer_becomes_one_in_the_usual_layout(form):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    transposed = Conv1D(48, 70)  # 70 inputs, 48 outputs; weight (in, out)
    nn.init.normal_(transposed.weight)
    made, x = quantised_linear(transposed, form), torch.randn(2, 70)
    assert (made.in_features, made.out_features, made.dense_weight().shape) == (70, 48, (48, 70))
    assert (made(x) - transposed(x)).norm() / transposed(x).norm() < 0.15


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.head.weight = self.embedding.weight
        self.again, self.special = self.body, nn.ModuleDict({"classifier": nn.Linear(8, 3)})
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids):
        x = self.again(self.body(self.embedding(ids)))
        x = x + self.attention(x, x, x)[0]
        return self.head(x), self.special["classifier"](x)


def test_a_model_keeps_tied_and_skipped_layers_and_a_shared_one_stays_one():
    torch.manual_seed(0)
    model = Tied().eval()
    before = model(torch.arange(6)[None])
    names = quantise_model(model, "int8", skip=("classifier",))
    assert names == ["body", "again", "attention.out_proj"]
    assert model.again is model.body
    assert is_quantised(model.body)
    assert type(model.head) is type(model.special["classifier"]) is nn.Linear
    for one, two in zip(model(torch.arange(6)[None]), before, strict=True):
        assert 0 < (one - two).norm() / two.norm() < 0.05


def test_the_output_layer_of_a_language_model_stays_dense_and_generation_works():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=40, tie_word_embeddings=False)
    )
    names = quantise_model(model.eval(), "nf4")
    assert len(names) == 8
    assert all(name.startswith("transformer.h.") for name in names)
    assert type(model.lm_head) is nn.Linear
    made = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)


def test_unknown_forms_and_models_without_linear_layers_are_errors():
    with pytest.raises(BadOption, match="nf5"):
        quantise_model(nn.Sequential(nn.Linear(2, 2)), "nf5")
    with pytest.raises(BadOption, match="no linear layer"):
        quantise_model(nn.Sequential(nn.Conv2d(2, 2, 1)), "nf4")
