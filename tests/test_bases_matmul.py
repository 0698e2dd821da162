"""Forms of the frozen matmul: what they compute, what they leave alone, and that nothing stale is multiplied with."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import training_tiny as tiny
import veneer
from veneer.bases import _matmul_layers, _matmul_products
from veneer.bases.matmul import FORMS, check_form, matmul_errors, matmul_of, plainly, set_matmul
from veneer.errors import BadOption, VeneerError

FAST = FORMS[1:]
ERROR = {"packed": 2e-6, "bf16": 2e-2, "int8": 6e-2}  # of outputs and gradients of two blocks, relative
METHODS = {  # a method of every port and of every way through the engine
    "lora": {"rank": 4}, "dora": {"rank": 4}, "ia3": {}, "bitfit": {}, "prefix_tuning": {"length": 3},
    "prompt_tuning": {"length": 3}, "pfeiffer_adapter": {}, "loreft": {"rank": 2, "positions": "all"}, "boft": {},
    "full": {},
}  # fmt: skip


def gpt2():
    import transformers

    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ).eval()


def moved(model, seed=1):
    """Every value moved away from its start, so that no form can be right by luck."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def adapted(form, method="lora", make=None, **options):
    make = make or (gpt2 if method == "bitfit" else lambda: tiny.llama(64))  # Llama has no biases
    model = moved(make())
    set_matmul(model, form)
    veneer.attach(model, method, name="mine", **(options or METHODS[method]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in veneer.trainable(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def batch():
    return {"input_ids": torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(3))}


def computed(model):
    output = model(**batch(), labels=batch()["input_ids"])
    trained = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(output.loss, trained, allow_unused=True)
    return output.logits.detach(), torch.cat([g.reshape(-1) for g in slopes if g is not None])


def apart(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def layers(model):
    return [m for m in model.modules() if "matmul_copies" in m.__dict__]


@pytest.mark.parametrize("form", FAST)
def test_a_layer_multiplies_forward_and_back_within_the_forms_error_of_float64(form):
    torch.manual_seed(0)
    plain = nn.Linear(96, 40).requires_grad_(False)
    x = torch.randn(2, 17, 96) * torch.logspace(-2, 2, 17)[:, None]  # rows of very different size
    exact = F.linear(x.double(), plain.weight.double(), plain.bias.double())
    g = torch.randn(2, 17, 40)
    exact_slope = g.double() @ plain.weight.double()
    model = nn.Sequential(plain)
    assert "1 linear layers" in str(set_matmul(model, form))
    x.requires_grad_(True)
    y = model(x)
    (slope,) = torch.autograd.grad(y, x, g)
    limit = {"packed": 1e-6, "bf16": 5e-3, "int8": 2e-2}[form]
    for got, wanted in ((y, exact), (slope, exact_slope)):
        rows = (got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(rows.max().detach()) < limit
        assert form == "packed" or float(rows.max().detach()) > 1e-6  # the form ran
    assert set(layers(model)[0].matmul_copies.made) == {False, True}


@pytest.mark.parametrize("form", FAST)
def test_a_gradient_of_the_wrong_side_is_told(form, monkeypatch):
    """The mutation: a backward that multiplies with another matrix must not pass the comparison."""
    square = nn.Sequential(nn.Linear(64, 64).requires_grad_(False))
    set_matmul(square, form)
    x, g = torch.randn(5, 64, requires_grad=True), torch.randn(5, 64)
    right = g @ square[0].weight
    assert apart(torch.autograd.grad(square(x), x, g)[0], right) < ERROR[form]
    multiply = _matmul_layers.Copies.multiply
    monkeypatch.setattr(
        _matmul_layers.Copies,
        "multiply",
        lambda self, x, W, bias, product, back: multiply(self, x, W, bias, product, False),
    )
    assert apart(torch.autograd.grad(square(x), x, g)[0], right) > 0.5


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("method", METHODS)
def test_methods_of_every_port_train_over_every_form(method, form):
    expected, expected_slopes = computed(adapted("plain", method))
    model = adapted(form, method)
    got, slopes = computed(model)
    assert apart(got, expected) < ERROR[form]
    assert apart(slopes, expected_slopes) < ERROR[form]
    if method != "full":  # nothing is frozen there
        assert any(layer.matmul_copies.made for layer in layers(model))
        assert form == "packed" or apart(got, expected) > 1e-5


@pytest.mark.parametrize("form", FAST)
def test_layers_that_keep_the_transpose_multiply_by_a_form_too(form):
    expected, slopes = computed(adapted("plain", make=gpt2))
    model = adapted(form, make=gpt2)
    got, got_slopes = computed(model)
    assert apart(got, expected) < ERROR[form]
    assert apart(got_slopes, slopes) < ERROR[form]
    assert sum(type(m).__name__.endswith("Conv1D") and bool(m.matmul_copies.made) for m in layers(model)) == 8


def test_a_weight_that_trains_is_multiplied_plainly_and_has_its_gradient():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False))
    set_matmul(model, "bf16")
    x = torch.randn(4, 8)
    model(x).sum().backward()
    assert not model[0].matmul_copies.made
    assert model[1].matmul_copies.made
    assert model[0].weight.grad.abs().sum() > 0
    assert model[1].weight.grad is None
    assert torch.equal(model[0](x), F.linear(x, model[0].weight, model[0].bias))


def test_a_bias_that_trains_over_a_frozen_weight_has_its_gradient():
    layer = nn.Sequential(nn.Linear(8, 6))
    layer[0].weight.requires_grad_(False)
    set_matmul(layer, "bf16")
    g = torch.randn(2, 3, 6)
    y = layer(torch.randn(2, 3, 8))
    y.backward(g)
    assert torch.allclose(layer[0].bias.grad, g.sum((0, 1)))


@pytest.mark.parametrize("form", FAST)
def test_plain_again_gives_every_bit_and_every_class_back(form):
    model = moved(tiny.llama(64))
    classes = [type(m) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = model(**batch()).logits
    set_matmul(model, form)
    veneer.attach(model, "lora", name="a")
    model(**batch())
    assert [k for k in model.state_dict() if not k.startswith("veneer.")] == list(state)
    set_matmul(model, "plain")
    veneer.detach(model, "a")
    assert [type(m) for m in model.modules()] == classes
    assert not layers(model)
    assert torch.equal(model(**batch()).logits, before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_form_may_be_chosen_under_adapters_that_are_there_already():
    expected = adapted("bf16")
    later = adapted("plain")
    set_matmul(later, "bf16")
    assert torch.equal(later(**batch()).logits, expected(**batch()).logits)


@pytest.mark.parametrize("form", FAST)
def test_a_changed_weight_is_seen_at_the_next_call(form):
    """By copying in place, by a new parameter, through another dtype, and by a merge and its undoing."""
    model = nn.Sequential(nn.Linear(16, 16).requires_grad_(False))
    set_matmul(model, form)
    x = torch.randn(4, 16)
    y = model(x)
    model.load_state_dict({k: 3 * v for k, v in model.state_dict().items()})
    assert apart(model(x), 3 * y) < ERROR[form]
    model.load_state_dict({k: v / 3 for k, v in model.state_dict().items()}, assign=True)
    assert apart(model(x), y) < ERROR[form]
    model.double()
    assert model(x.double()).dtype == torch.float64
    model.float()
    assert apart(model(x), y) < ERROR[form]

    adapter = adapted(form)
    live = adapter(**batch()).logits.detach()
    veneer.merge(adapter, "mine")
    assert apart(adapter(**batch()).logits, live) < ERROR[form]
    veneer.unmerge(adapter)
    assert torch.equal(adapter(**batch()).logits, live)


def test_a_weight_changed_before_its_backward_is_refused():
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False))
    set_matmul(model, "packed")
    y = model(torch.randn(2, 8, requires_grad=True))
    model[0].weight.mul_(2)
    with pytest.raises(VeneerError, match="changed between a forward and its backward"):
        y.sum().backward()


@pytest.mark.parametrize("form", FAST)
def test_merging_and_saving_write_what_they_write_over_the_plain_base(form, tmp_path):
    plain, model = adapted("plain"), adapted(form)
    for each, name in ((plain, "plain"), (model, form)):
        veneer.save(each, "mine", tmp_path / name)
        veneer.merge(each, "mine")
    written = dict(plain.named_parameters())
    assert all(torch.equal(p, written[n]) for n, p in model.named_parameters())
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("plain", form)]
    assert files[0] == files[1]


@pytest.mark.parametrize("form", FAST)
def test_copies_and_pickles_hold_no_packed_weight_and_multiply_alike(form):
    model = adapted(form, make=gpt2)
    expected = model(**batch()).logits
    again = copy.deepcopy(model)
    assert not any(layer.matmul_copies.made for layer in layers(again))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(again(**batch()).logits, expected)
    assert torch.equal(loaded(**batch()).logits, expected)


@pytest.mark.parametrize("form", FAST)
def test_mixed_rows_equal_each_adapter_alone(form):
    model = adapted(form)
    veneer.attach(model, "ia3", name="other")
    with torch.no_grad():
        for p in veneer.trainable(model).values():
            p.mul_(1.3)
    names, ids = ["mine", None, "other"], batch()["input_ids"]
    with torch.no_grad():
        with veneer.rows(model, names):
            mixed = model(input_ids=ids).logits
        for i, name in enumerate(names):
            veneer.activate(model, name)
            assert apart(mixed[i], model(input_ids=ids).logits[i]) < 1e-5


def test_checkpointing_gives_the_same_gradient():
    model = adapted("bf16")
    expected = computed(model)[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert torch.equal(computed(model)[1], expected)


def test_a_compiled_model_multiplies_plainly():
    model = nn.Sequential(nn.Linear(16, 16).requires_grad_(False))
    set_matmul(model, "bf16")
    x = torch.randn(4, 16)
    fast = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(fast(x), F.linear(x, model[0].weight, model[0].bias))
    assert not torch.equal(model(x), fast(x))


def test_transforms_counters_and_autocast_see_the_plain_product():
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Sequential(nn.Linear(16, 16, bias=False).requires_grad_(False))
    set_matmul(model, "int8")
    x = torch.randn(4, 16)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 2 * 4 * 16 * 16
    assert torch.allclose(torch.func.jacrev(model)(x[0]), model[0].weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_a_base_of_another_dtype_and_an_empty_batch_multiply_as_they_are():
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False))
    set_matmul(model, "int8")
    assert model(torch.zeros(0, 8)).shape == (0, 8)
    found = set_matmul(model.to(torch.bfloat16), "int8")
    assert found.layers == {"plain": 1}
    assert "bfloat16" in str(found)


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_an_input_is_rounded_once_for_the_layers_that_share_it_and_anew_when_it_changed(form, monkeypatch):
    two = nn.ModuleList([nn.Linear(16, 8).requires_grad_(False), nn.Linear(16, 4).requires_grad_(False)])
    set_matmul(two, form)
    name = "_to_bfloat16" if form == "bf16" else "_rounded"
    how, rounded = getattr(_matmul_products, name), []
    monkeypatch.setattr(_matmul_products, name, lambda x: rounded.append(1) or how(x))
    for needs in (False, True):
        x = torch.randn(3, 16, requires_grad=needs)
        [layer(x) for layer in two]
        rounded.clear()
        first = [layer(x).detach() for layer in two]
        assert not rounded
        with torch.no_grad():
            x.mul_(2)
        assert apart(two[0](x) - two[0].bias, 2 * (first[0] - two[0].bias)) < 1e-2
        assert len(rounded) == 1
    del x
    assert _matmul_products.ROUNDED.kept[0] is None  # nothing is held for an input that is gone


@pytest.mark.parametrize("form", FAST)
def test_inference_mode_multiplies_by_the_form_too(form):
    model = nn.Sequential(nn.Linear(16, 8).requires_grad_(False))
    set_matmul(model, form)
    x = torch.randn(3, 16)
    expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x.clone()), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_what_is_not_finite_stays_visible_in_every_form():
    for form in FAST:
        model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False))
        set_matmul(model, form)
        x = torch.randn(3, 8)
        x[1, 2] = float("nan")
        y = model(x)
        assert not torch.isfinite(y[1]).any()
        assert torch.isfinite(y[[0, 2]]).all()


def test_an_operator_that_is_gone_or_wrong_leaves_the_plain_product_and_says_so(monkeypatch):
    class Gone(_matmul_products.Packed):
        def copy(self, matrix):
            raise AttributeError("no such operator")

    class Wrong(_matmul_products.Packed):
        def product(self, x, kept, bias):
            return 1.1 * F.linear(x, kept.to_dense(), bias)

    model, x = nn.Sequential(nn.Linear(8, 8).requires_grad_(False)), torch.randn(2, 8)
    for product, words in ((Gone(), "no such operator"), (Wrong(), "off by")):
        monkeypatch.setitem(_matmul_products.CHOICES, "packed", (product,))
        _matmul_products._found.cache_clear()
        try:
            found = set_matmul(model, "packed")
            assert "plain" in str(found)
            assert words in str(found)
            assert torch.equal(model(x), F.linear(x, model[0].weight, model[0].bias))
        finally:
            _matmul_products._found.cache_clear()


def test_the_layer_of_the_logits_is_not_rounded_to_int8():
    model = tiny.llama(64)
    found = set_matmul(model, "int8")
    assert model.lm_head.matmul_copies.form == "bf16"
    assert sorted(found.layers.values()) == [1, 14]


def test_the_bytes_of_the_copies_are_those_that_are_kept():
    model = nn.Sequential(nn.Linear(64, 32, bias=False).requires_grad_(False))
    for form, one in (("packed", 4 * 2048), ("bf16", 2 * 2048), ("int8", 2048 + 4 * 32)):
        found = set_matmul(model, form)
        model(torch.randn(2, 64, requires_grad=True)).sum().backward()
        kept = [t for made in layers(model)[0].matmul_copies._state[2].values()
                for t in (made if isinstance(made, tuple) else (made,))]  # fmt: skip
        assert found.copies == one
        assert found.copies_in_training == sum(t.numel() * t.element_size() for t in kept)


def test_the_error_is_measured_on_the_users_batch_against_plain_float32():
    model = adapted("bf16")
    trained = [p for p in model.parameters() if p.requires_grad]
    rng = torch.random.get_rng_state()
    found = matmul_errors(model, lambda: model(**batch(), labels=batch()["input_ids"]), trained)
    assert torch.equal(torch.random.get_rng_state(), rng)
    logits, slopes = computed(model)
    with plainly(model):
        plain, plain_slopes = computed(model)
    assert found.output == pytest.approx(apart(logits, plain))
    assert found.gradient == pytest.approx(apart(slopes, plain_slopes), rel=1e-3)
    assert 1e-4 < found.output < ERROR["bf16"]
    assert all(p.grad is None for p in trained)
    assert "matmul=bf16" in str(found)
    alone = matmul_errors(model, lambda: SimpleNamespace(logits=torch.ones(2)))
    assert (alone.output, alone.gradient) == (0.0, None)


def test_a_form_that_there_is_not_and_a_quantised_base_are_refused():
    from veneer.bases.quantised import quantise_model

    assert check_form(None) == "plain"
    with pytest.raises(BadOption, match="bf17"):
        set_matmul(nn.Linear(2, 2), "bf17")
    model = nn.Sequential(nn.Linear(8, 8))
    quantise_model(model, "int8")
    with pytest.raises(BadOption, match="quantised"):
        set_matmul(model, "bf16")
    assert matmul_of(model).form == "plain"


def test_a_base_opens_with_a_form_and_says_what_runs(tmp_path):
    tiny.llama(64).save_pretrained(tmp_path)
    base = veneer.open_base(tmp_path, task="lm", matmul="bf16")
    assert matmul_of(base.model).form == "bf16"
    assert base.notes[-1].startswith("matmul=bf16: 15 linear layers")
    assert not layers(veneer.open_base(tmp_path, task="lm", matmul="plain").model)
    with pytest.raises(BadOption, match="fp8"):
        veneer.open_base(tmp_path, task="lm", matmul="fp8")
    with pytest.raises(BadOption, match="quantised"):
        veneer.open_base(tmp_path, task="lm", matmul="bf16", quantise="nf4")
