"""Networks beside and behind sub-layers, rescaling and made prompts: by hand, by reference, on whole models."""

import copy

import pytest
import torch
from torch import tensor
from torch.nn import functional as F
from torch.testing import assert_close

import veneer
from references import (
    compacter,
    direft,
    mam,
    p_tuning,
    parallel_adapter,
    pfeiffer_adapter,
    ssf,
)
from test_methods_activation import count, gradients_agree, leaves, site, sublayers
from veneer import testing
from veneer.edits import At, Tensors, build
from veneer.engine import plan
from veneer.errors import BadOption, Unsupported
from zoo import zoo

torch.set_num_threads(1)


def cases(module):
    return [pytest.param(c, id=c["name"]) for c in module.cases()]


def inputs(case, *names):
    return {n: case["inputs"][n].clone().requires_grad_() for n in names if n in case["inputs"]}


def base(name, dtype=torch.float64):
    """A tiny base with its inputs for three rows."""
    found = testing.bases.get(name)
    return found.model(dtype), found.inputs(found.contents(3), dtype)


def attached(model, key, seed=0, **options):
    """An adapter with every tensor moved off its start, and its tensors by name."""
    adapter = veneer.attach(model, key, name="a", **options)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in adapter.named().values():
            value.add_(0.5 * torch.randn(value.shape, generator=draw, dtype=torch.float64))
    adapter._cached.clear()
    return adapter.named()


def states(model, batch):
    return model(**batch, output_hidden_states=True).hidden_states[-1]


# ---- Pfeiffer's adapter


@pytest.mark.parametrize("case", cases(pfeiffer_adapter))
def test_pfeiffer_adapter_equals_its_reference(case):
    options, norm = case["options"], case["base"]
    adapter = build("pfeiffer_adapter", activation=options["activation"], scale=options["scale"])
    t, given = leaves(case), inputs(case, "y", "r")
    at = At()
    if norm:
        at = At(_norm=lambda h: F.layer_norm(h, h.shape[-1:], norm["gain"], norm["shift"], norm["eps"]))
    output = adapter.output(t, given["y"], given.get("r"), at)
    assert_close(output, pfeiffer_adapter.reference(case)["output"])
    gradients_agree(pfeiffer_adapter, case, output, t, given)


def small(named, z, activation=torch.relu):
    """f of the adapter in the first block: the tensors by their last names."""
    t = {key.split("/")[1]: v for key, v in named.items() if key.startswith("block.0.")}
    return activation(z @ t["D"].mT + t["D_bias"]) @ t["U"].mT + t["U_bias"]


def test_pfeiffer_adapter_in_a_post_norm_block_reads_the_normalised_sum():
    model, batch = base("bert")
    other = copy.deepcopy(model)
    named = attached(model, "pfeiffer_adapter", reduction=4, layers=[0])
    last = other.bert.encoder.layer[0].output

    def forward(hidden, stream):
        y = last.dense(hidden)
        return last.LayerNorm(stream + y + small(named, last.LayerNorm(stream + y)))

    bare = states(other, batch)
    last.forward = forward
    assert not torch.allclose(states(model, batch), bare)
    assert_close(states(model, batch), states(other, batch))


def test_pfeiffer_adapter_in_a_pre_norm_block_reads_the_sum():
    model, batch = base("llama")
    other = copy.deepcopy(model)
    named = attached(model, "pfeiffer_adapter", reduction=4, layers=[0])
    other.model.layers[0].register_forward_hook(lambda m, given, h: h + small(named, h))
    assert_close(model(**batch).logits, other(**batch).logits)


def test_a_norm_trained_by_another_adapter_stays_out_of_pfeiffers_sum_merged_or_not():
    model, batch = base("bert")
    attached(model, "pfeiffer_adapter", reduction=4)
    norms = veneer.attach(model, "ssf", name="norms", sites="norm")
    with torch.no_grad():
        for value in norms.named().values():
            value.add_(0.3 * torch.randn(value.shape, dtype=torch.float64))
    veneer.activate(model, ["a", "norms"])
    together = states(model, batch)
    try:
        veneer.merge(model, "norms")
    except Unsupported:
        return
    assert_close(states(model, batch), together)


def test_a_fusion_of_pfeiffer_adapters_gives_its_members_what_they_read():
    model, batch = base("bert")
    for name, seed in (("one", 1), ("two", 1)):
        member = veneer.attach(model, "pfeiffer_adapter", name=name, reduction=4, activate=False)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in member.named().values():
                value.copy_(0.5 * torch.randn(value.shape, generator=draw, dtype=torch.float64))
    veneer.attach(model, "adapter_fusion", name="f", of=["one", "two"], variant="static", sites="mlp")
    with veneer.active(model, "one"):
        alone = states(model, batch)
    with veneer.active(model, "f"):  # equal members: their mean is each of them
        assert_close(states(model, batch), alone)
    rows = model(**batch, adapters=["f", None, "one"], output_hidden_states=True).hidden_states[-1]
    mask = batch["attention_mask"].bool()
    assert_close(rows[0][mask[0]], alone[0][mask[0]])


# ---- parallel adapter


@pytest.mark.parametrize("case", cases(parallel_adapter))
def test_parallel_adapter_equals_its_reference(case):
    adapter = build("parallel_adapter", **case["options"])
    t, given = leaves(case), inputs(case, "x", "y", "r")
    output = adapter.output(t, given["x"], given["y"], given.get("r"), At())
    assert_close(output, parallel_adapter.reference(case)["output"])
    read = parallel_adapter._read(case)
    gradients_agree(parallel_adapter, case, output, t, {n: given[n] for n in ("y", read)})


@pytest.mark.parametrize("reads", ["residual", "normed"])
def test_parallel_adapter_reads_the_stream_or_what_the_norm_makes_of_it(reads):
    model, batch = base("llama")
    other = copy.deepcopy(model)
    named = attached(model, "parallel_adapter", reduction=4, layers=[0], reads=reads)
    block, seen = other.model.layers[0], {}
    read = block.post_attention_layernorm if reads == "residual" else block.mlp
    read.register_forward_pre_hook(lambda m, given: seen.update(r=given[0]))
    block.mlp.register_forward_hook(lambda m, given, y: y + 4.0 * small(named, seen["r"]))
    assert_close(model(**batch).logits, other(**batch).logits)


@pytest.mark.parametrize(("key", "sites"), [("parallel_adapter", "mlp.up"), ("mam", {"output": "mlp.up"})])
def test_an_adapter_beside_a_layer_that_changes_the_width_is_refused(key, sites):
    model, _ = base("bert")
    with pytest.raises(Unsupported, match="32 features, and its output has"):
        veneer.attach(model, key, sites=sites)


# ---- SSF


@pytest.mark.parametrize("case", cases(ssf))
def test_ssf_equals_its_reference_beside_the_weight_and_merged_into_it(case):
    method, t, given = build("ssf", shift=case["options"]["shift"]), leaves(case), inputs(case, "x")
    W, gain, bias = (case["base"].get(n) for n in ("W", "gain", "bias"))
    x = given["x"]
    y = F.linear(x, W, bias) if W is not None else F.layer_norm(x, x.shape[-1:], gain, bias)
    output, expected = method.output(t, y), ssf.reference(case)
    assert_close(output, expected["output"])
    gradients_agree(ssf, case, output, t, given)
    scale, shift = method.affine(t)
    assert_close(scale[:, None] * W if W is not None else scale * gain, expected["merged_W"])
    if bias is not None:
        assert_close(scale * bias + shift, expected["merged_bias"])


@pytest.mark.parametrize("name", ["bert", "vit", "conv"])
def test_ssf_merges_into_linear_layers_norms_and_convolutions(name):
    found = testing.bases.get(name)
    model, batch = base(name)
    bare = torch.cat(found.read(model(**batch), batch))
    attached(model, "ssf")
    inner = {sp.site.kind for sp in veneer.adapters(model)["a"].plan.sites}
    assert {"bert": {"linear", "norm"}, "vit": {"linear", "norm", "conv"}, "conv": {"norm", "conv"}}[
        name
    ] <= inner
    live = torch.cat(found.read(model(**batch), batch))
    veneer.merge(model, "a")
    assert_close(torch.cat(found.read(model(**batch), batch)), live)
    assert not torch.allclose(bare, live)


def test_a_norm_that_adds_one_to_its_weight_takes_no_scale():
    transformers = pytest.importorskip("transformers")
    config = transformers.GemmaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = transformers.GemmaForCausalLM(config).eval()
    attached(model, "ssf", shift=False)
    with pytest.raises(Unsupported, match="norm"):
        veneer.merge(model, "a")
    veneer.detach(model, "a")
    attached(model, "ssf", shift=False, sites="linear")
    batch = {"input_ids": torch.arange(6)[None]}
    live = model(**batch).logits
    veneer.merge(model, "a")
    assert_close(model(**batch).logits, live, rtol=1e-4, atol=1e-5)


def test_ssf_starts_near_the_base_when_asked():
    specs = build("ssf", init="normal").tensors(site(width=5000))
    draw = torch.Generator().manual_seed(0)
    for name, mean in (("scale", 1.0), ("shift", 0.0)):
        value = specs[name].start(specs[name].shape, draw)
        assert abs(value.mean() - mean) < 2e-3
        assert abs(value.std() - 0.02) < 1e-3


def test_decay_pulls_neither_scales_nor_shifts_nor_biases():
    for method in (build("ssf"), build("ssf", init="normal")):
        assert not any(spec.decay for spec in method.tensors(site()).values())
    for key in ("pfeiffer_adapter", "parallel_adapter", "compacter"):
        for name, spec in build(key, reduction=1).tensors(site(width=8)).items():
            assert spec.decay == (not name.endswith("_bias")), (key, name)


# ---- DiReFT


@pytest.mark.parametrize("case", cases(direft))
def test_direft_equals_its_reference(case):
    o = case["options"]
    ends = [f"prompt[:{o['first']}]"] * bool(o["first"]) + [f"prompt[-{o['last']}:]"] * bool(o["last"])
    method = build("direft", rank=o["rank"], tied=o["tied"], positions=" + ".join(ends))
    t, given = leaves(case), inputs(case, "x")
    output = method.output(t, given["x"], At(prompt=case["inputs"]["prompt"]))
    assert_close(output, direft.reference(case)["output"])
    gradients_agree(direft, case, output, t, given)


def test_direft_is_lorefts_variant_without_constraint_and_without_option():
    mine, other = build("direft"), build("loreft", variant="direft")
    assert {n: s.shape for n, s in mine.tensors(site()).items()} == {
        n: s.shape for n, s in other.tensors(site()).items()
    }
    assert all(s.keep is None for s in mine.tensors(site()).values())
    with pytest.raises(veneer.VeneerError, match="no option 'variant'"):
        build("direft", variant="loreft")


# ---- P-tuning


@pytest.mark.parametrize("case", cases(p_tuning))
def test_p_tuning_equals_its_reference(case):
    method, t = build("p_tuning", **case["options"]), leaves(case)
    width = case["tensors"]["E"].shape[1]
    shapes = {name: spec.shape for name, spec in method.tensors(site("tokens", width)).items()}
    assert shapes == {name: tuple(value.shape) for name, value in case["tensors"].items()}
    output = method.tokens(t.with_(**method.derive(t)), At())
    assert_close(output, p_tuning.reference(case)["output"])
    gradients_agree(p_tuning, case, output, t, {})


def test_p_tuning_is_the_prompt_that_its_network_makes():
    model, batch = base("bert")
    named = attached(model, "p_tuning", length=3, encoder="lstm", hidden=4)
    t = Tensors({key.split("/")[1]: v for key, v in named.items()})
    rows = build("p_tuning", length=3, encoder="lstm", hidden=4).derive(t)["prompt"]
    made = states(model, batch)
    veneer.detach(model, "a")
    flat = veneer.attach(model, "p_tuning", name="flat", length=3, encoder="none")
    with torch.no_grad():
        (value,) = flat.named().values()
        value.copy_(rows)
    assert_close(states(model, batch), made)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning_is_hf_pefts_in_training_with_the_gradients_of_its_network(encoder):
    peft = pytest.importorskip("peft")
    model, batch = zoo()["llama"]()
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8,
        encoder_reparameterization_type=encoder.upper(),
    )  # fmt: skip
    other = peft.get_peft_model(copy.deepcopy(model), config)
    adapter = veneer.attach(model, "p_tuning", name="a", length=3, hidden=8, encoder=encoder)
    net = dict(other.prompt_encoder.default.named_parameters())
    names = {"E": "embedding.weight"}
    for i in range(3 if encoder == "mlp" else 2):
        names |= {f"L{i + 1}": f"mlp_head.{2 * i}.weight", f"L{i + 1}_bias": f"mlp_head.{2 * i}.bias"}
    for layer in range(2 if encoder == "lstm" else 0):
        for end, its in (("", ""), ("_back", "_reverse")):
            for mine, kind in (("W", "ih"), ("V", "hh")):
                names[f"{mine}{layer}{end}"] = f"lstm_head.weight_{kind}_l{layer}{its}"
                names[f"{mine}{layer}{end}_bias"] = f"lstm_head.bias_{kind}_l{layer}{its}"
    with torch.no_grad():
        for key, value in adapter.named().items():
            value.copy_(net[names[key.split("/")[1]]])
    adapter._cached.clear()
    found, expected = model(**batch).logits, other(**batch).logits[:, 3:]
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for y in (found, expected):
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    for key, slope in adapter.gradients().items():
        assert slope.abs().max() > 0
        assert_close(slope, net.pop(names[key.split("/")[1]]).grad, rtol=1e-4, atol=1e-6)
    assert not net, "every tensor has a partner"


# ---- mix and match


@pytest.mark.parametrize("case", cases(mam))
def test_mam_equals_its_reference(case):
    options, t = case["options"], leaves(case)
    if options["part"] == "mlp":
        given = inputs(case, "y", "r")
        method = build("mam", scale=options["scale"])
        output = method.output(t, None, given["y"], given["r"])
    else:
        given = inputs(case, "q", "k", "v")
        method = build("mam", length=options["length"], projection=False)
        mask = case["inputs"]["mask"]
        tokens = mask.shape[1]
        seen = mask[:, None, None, :].expand(-1, 1, tokens, -1)
        if options["causal"]:
            seen = seen & torch.ones(tokens, tokens, dtype=torch.bool).tril()

        def attend(q, k, v, m):
            groups = q.shape[1] // k.shape[1]
            k, v = (z.repeat_interleave(groups, 1) for z in (k, v))
            return F.scaled_dot_product_attention(q, k, v, m)

        output = method.attention(t, *given.values(), seen, attend) * mask[:, None, :, None]
    assert_close(output, mam.reference(case)["output"])
    gradients_agree(mam, case, output, t, given)


def test_mam_is_prefix_tuning_and_a_parallel_adapter_in_one_stack():
    model, batch = base("bert")
    named = attached(model, "mam", length=3, hidden=8, reduction=4)
    whole = states(model, batch)
    veneer.detach(model, "a")
    parts = {
        "p": veneer.attach(model, "prefix_tuning", name="p", length=3, hidden=8, projection=True),
        "q": veneer.attach(model, "parallel_adapter", name="q", reduction=4),
    }
    for part in parts.values():
        for key, value in part.named().items():
            with torch.no_grad():
                value.copy_(named[key])
    veneer.activate(model, ["p", "q"])
    assert_close(states(model, batch), whole)


# ---- Compacter


@pytest.mark.parametrize("case", cases(compacter))
def test_compacter_equals_its_reference(case):
    method, t, given = build("compacter", **case["options"]), leaves(case), inputs(case, "y")
    shapes = {n: s.shape for n, s in method.tensors(site(width=given["y"].shape[-1])).items()}
    assert shapes == {name: tuple(value.shape) for name, value in case["tensors"].items()}
    output = method.output(t.with_(**method.derive(t)), given["y"], At())
    assert_close(output, compacter.reference(case)["output"])
    gradients_agree(compacter, case, output, t, given)


def test_a_compacter_of_n_that_does_not_divide_the_width_is_refused_with_ones_that_do():
    with pytest.raises(BadOption, match="n=5 does not divide the width 768"):
        build("compacter", n=5).tensors(site(width=768))
    assert build("compacter", reduction=400).tensors(site(width=768))["D_bias"].shape == (4,)  # rounded up


def test_compacter_by_hand():
    """n = 1 is a plain low-rank adapter: A = 2, S T = (1 0)^T 3: D = 6 on the first feature."""
    method = build("compacter", n=1, reduction=2, activation="relu")
    t = Tensors(
        A=tensor([[[2.0]]]), D_S=tensor([[[1.0], [0.0]]]), D_T=tensor([[[3.0]]]), D_bias=tensor([1.0]),
        U_S=tensor([[[1.0]]]), U_T=tensor([[[0.0, 1.0]]]), U_bias=tensor([0.0, 0.5]),
    )  # fmt: skip
    t = t.with_(**method.derive(t))
    assert_close(method.output(t, tensor([[[1.0, 5.0]]]), At()), tensor([[[1.0, 5.0 + 2 * 7.0 + 0.5]]]))


# ---- what they count


def test_counts_are_those_published():
    mlps, both = sublayers(768, 12, "mlp"), sublayers(768, 12, "attention", "mlp")
    assert count(build("pfeiffer_adapter"), *mlps) == 894_528
    assert count(build("parallel_adapter"), *mlps) == 7_091_712
    assert count(build("compacter"), *both) == 57_088
    assert count(build("compacter"), *mlps) == 28_576
    large = sublayers(1024, 24, "mlp")
    assert count(build("pfeiffer_adapter", reduction=16), *large) == 3_171_840
    assert count(build("pfeiffer_adapter", reduction=64), *large) == 811_392
    prompt = build("p_tuning", length=20)
    assert count(prompt, site("tokens", 3072, "embedding")) == 28_382_208
    assert count(build("direft", rank=8), *sublayers(4096, 32, "block")) == 2_097_408


def test_the_count_of_compacter_on_t5_takes_the_norms_in():
    """48 places, 64 numbers of A, 62 norms of 768."""
    places = sublayers(768, 24, "attention", "mlp")
    assert count(build("compacter"), *places) + 62 * 768 == 161_728
    assert count(build("compacter"), *sublayers(768, 24, "mlp")) + 62 * 768 == 104_704


def test_the_count_of_ssf_on_a_vision_transformer_is_that_published():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(transformers.ViTConfig())
    assert plan(model, build("ssf")).trainable_parameters == 205_824
