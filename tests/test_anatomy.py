"""Anatomy: the roles that are found in each family, held against the model's own behaviour."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

from anatomy_tools import output, projections, randomise, rename, rows, seen_by
from veneer.anatomy import Anatomy, Site, read
from zoo import zoo

ZOO = zoo()
_CACHE: dict[str, tuple] = {}
QKVO = {f"attention.{r}": 2 for r in ("query", "key", "value", "output")}
CROSS = {f"cross_attention.{r}": 2 for r in ("query", "key", "value", "output")}
PLAIN = {**QKVO, "attention": 2, "mlp.up": 2, "mlp.down": 2, "mlp": 2, "block": 2}
GATED = {**PLAIN, "mlp.gate": 2}


def _twice(roles: dict[str, int]) -> dict[str, int]:
    return {role: 2 * count for role, count in roles.items()}


EXPECTED = {
    "bert": {**PLAIN, "norm": 5, "pooler": 2, "head": 1, "embedding": 1, "token_embedding": 1},
    "roberta": {**PLAIN, "norm": 5, "head": 3, "embedding": 1, "token_embedding": 1},
    "distilbert": {**PLAIN, "norm": 5, "head": 1},
    "gpt2": {**PLAIN, "norm": 5, "head": 1},
    "gpt_neox": {**PLAIN, "norm": 5, "head": 1},
    "falcon": {**PLAIN, "norm": 5, "head": 1},
    "llama": {**GATED, "norm": 5, "head": 1},
    "qwen3": {**GATED, "norm": 9, "head": 1},
    "phi3": {**GATED, "norm": 5, "head": 1},
    "mixtral": {**QKVO, "attention": 2, "mlp": 2, "router": 2, "expert.gate": 2, "expert.up": 2,
    "expert.down": 2, "norm": 5},
    "t5": {**_twice(PLAIN), **CROSS, "cross_attention": 2, "norm": 12, "head": 1, "token_embedding": 2},
    "bart": {**_twice(PLAIN), **CROSS, "cross_attention": 2, "norm": 12, "head": 1},
    "marian": {**_twice(PLAIN), **CROSS, "cross_attention": 2, "norm": 10, "head": 1},
    "whisper": {**_twice(PLAIN), **CROSS, "cross_attention": 2, "norm": 12, "convolution": 2, "head": 1},
    "vit": {**PLAIN, "norm": 5, "convolution": 1, "head": 1, "embedding": 1},
    "swin": {"attention.query": 3, "attention.output": 3, "mlp.up": 3, "mlp.down": 3, "block": 3,
    "attention": 3, "mlp": 3},
    "convnext": {"convolution": 5, "mlp.up": 3, "mlp.down": 3, "mlp": 3, "block": 3, "head": 1},
    "resnet": {"convolution": 10, "block": 3, "head": 2, "norm": 8},
    "clip": {**_twice(PLAIN), "convolution": 1, "embedding": 2},
    "mamba": {"mixer": 10, "convolution": 2, "norm": 3, "block": 2, "head": 1},
    "lstm": {"recurrent": 8, "head": 1, "token_embedding": 1},
    "torch_transformer": {**_twice(PLAIN), **CROSS, "cross_attention": 2, "norm": 12},
    "mlp": {"linear": 3},
}  # fmt: skip


def made(family: str) -> tuple[nn.Module, dict, Anatomy]:
    """A randomised model of the family, its arguments and its anatomy; built once."""
    if family not in _CACHE:
        model, arguments = ZOO[family]()
        randomise(model)
        _CACHE[family] = (model, arguments, read(model))
    return _CACHE[family]


def count_roles(anatomy: Anatomy) -> dict[str, int]:
    counts: dict[str, int] = {}
    for site in anatomy.sites:
        counts[site.role] = counts.get(site.role, 0) + 1
    return counts


@pytest.mark.parametrize("family", ZOO)
def test_the_roles_of_a_family_are_found(family):
    _model, _arguments, anatomy = made(family)
    counts = count_roles(anatomy)
    assert {role: counts.get(role, 0) for role in EXPECTED[family]} == EXPECTED[family]
    assert not anatomy.notes


@pytest.mark.parametrize("family", ZOO)
def test_reading_leaves_the_model_as_it_was(family):
    model, _ = ZOO[family]()
    model.train()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict(keep_vars=False).items()}
    buffers = {k: (id(v), v.clone()) for k, v in model.named_buffers()}
    attributes = [{k: id(v) for k, v in m.__dict__.items()} for m in model.modules()]
    random = torch.get_rng_state()
    read(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for name, buffer in model.named_buffers():
        assert id(buffer) == buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    assert [{k: id(v) for k, v in m.__dict__.items()} for m in model.modules()] == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ZOO)
def test_random_names_of_all_modules_change_no_role(family):
    model, _arguments = ZOO[family]()
    before = read(model)
    old = rename(model)
    after = read(model)
    assert not after.notes
    assert _facts(before, {}) == _facts(after, old)
    assert sorted(_roles(before, {})) == sorted(_roles(after, old))


def _roles(anatomy: Anatomy, old: dict[str, str]) -> list[tuple]:
    def name(new: str) -> str:
        return old.get(new, new)

    return [
        (
            s.role,
            name(s.module),
            s.ranges,
            s.shape,
            s.block,
            s.stack,
            name(s.source),
            name(s.norm),
            s.heads,
            s.kv_heads,
            s.causal,
        )
        for s in anatomy.sites
    ]


def _facts(anatomy: Anatomy, old: dict[str, str]) -> tuple:
    f = anatomy.facts

    def name(new: str) -> str:
        return old.get(new, new)

    def ends(pairs: tuple) -> list:
        return [(stack, name(module)) for stack, module in pairs]

    return (
        ends(f.embeddings), ends(f.token_embeddings), ends(f.finals), name(f.head), name(f.pooler),
            f.causal, f.positions,
        f.class_token, f.norm_place, f.width, f.vocabulary, f.encoder_decoder, [name(b) for b in f.backbones],
    )  # fmt: skip


# ---------------------------------------------------------------- the model itself as the oracle

WITH_ATTENTION = [f for f in ZOO if "attention.output" in EXPECTED[f] and f != "torch_transformer"]


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_without_value_rows_the_output_projection_sees_zeros(family):
    model, arguments, anatomy = made(family)
    for site in [s for s in anatomy.sites if s.role.endswith("attention.value") and s.block == 0]:
        changed = copy.deepcopy(model)
        last = projections(anatomy, dict(site.options)["core"])["output"]
        assert seen_by(changed, last.module, arguments).abs().max() > 0
        rows(changed, site, torch.zeros_like)
        assert seen_by(changed, last.module, arguments).abs().max() == 0


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_without_query_rows_the_keys_do_not_matter(family):
    model, arguments, anatomy = made(family)
    for site in [s for s in anatomy.sites if s.role.endswith("attention.query") and s.block == 0]:
        key = projections(anatomy, dict(site.options)["core"])["key"]
        changed = copy.deepcopy(model)
        rows(changed, key, lambda w: w + 1.5 * torch.randn_like(w))
        assert not torch.allclose(output(model, arguments), output(changed, arguments), atol=1e-6)
        without, with_key = copy.deepcopy(model), copy.deepcopy(changed)
        for m in (without, with_key):
            rows(m, site, torch.zeros_like)
        torch.testing.assert_close(output(without, arguments), output(with_key, arguments), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [f for f in ZOO if "mlp.gate" in EXPECTED[f]])
def test_without_up_or_gate_rows_the_down_projection_sees_zeros(family):
    model, arguments, anatomy = made(family)
    down = next(s for s in anatomy.sites if s.role == "mlp.down" and s.block == 0)
    for role in ("mlp.up", "mlp.gate"):
        changed = copy.deepcopy(model)
        rows(changed, next(s for s in anatomy.sites if s.role == role and s.block == 0), torch.zeros_like)
        assert seen_by(changed, down.module, arguments).abs().max() == 0


@pytest.mark.parametrize("family", [f for f in ZOO if EXPECTED[f].get("block")])
def test_a_sublayer_site_gives_what_is_added_to_the_stream(family):
    """Zeroing the output of every sub-layer of a pre-norm block makes the block the identity."""
    model, arguments, anatomy = made(family)
    if anatomy.facts.norm_place == "post":
        pytest.skip("a norm follows the sum")
    roles = ("attention", "cross_attention", "mlp", "mixer", "convolution")
    subs = [s for s in anatomy.sites if s.role in roles and not s.parameter and s.block == 0]
    assert subs
    for stack in {s.stack for s in subs}:
        block = dict(anatomy.facts.blocks)[stack][0]
        handles, caught = [], []
        for site in [s for s in subs if s.stack == stack]:
            handles.append(model.get_submodule(site.module).register_forward_hook(_zero))
        handles.append(
            model.get_submodule(block).register_forward_hook(
                lambda m, a, kw, o, kept=caught: kept.append((a, kw, o)), with_kwargs=True
            )
        )
        try:
            with torch.no_grad():
                model(**arguments)
        finally:
            for handle in handles:
                handle.remove()
        args, kwargs, out = caught[0]
        x = args[0] if args else kwargs["hidden_states"]
        torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, x, rtol=0, atol=1e-6)


def _zero(module, args, out):
    return (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0


@pytest.mark.parametrize("family", ZOO)
def test_widths_and_shapes_are_those_of_the_forward(family):
    model, arguments, anatomy = made(family)
    seen: dict[str, torch.Size] = {}

    def keep(name):
        def hook(module, args, out):
            first = (
                out[0]
                if isinstance(out, tuple | list)
                else next(iter(out.values()))
                if isinstance(out, dict)
                else out
            )
            seen.setdefault(name, first.shape)

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in model.named_modules()]
    with torch.no_grad():
        model(**arguments)
    for handle in handles:
        handle.remove()
    for site in anatomy.sites:
        if (
            site.module in seen
            and not site.ranges
            and site.kind not in ("recurrent", "parameter", "experts")
            and site.role != "norm"
        ):
            shape = seen[site.module]
            assert site.width in (shape[-1], shape[1]), site.name
        if site.parameter and site.kind in ("linear", "conv1d"):
            assert site.shape == (site.n_out, site.n_in)


# ---------------------------------------------------------------- single families


def by_name(family: str) -> dict[str, Site]:
    return {s.name: s for s in made(family)[2].sites}


def test_fused_projections_are_split_into_their_rows():
    gpt2 = by_name("gpt2")
    assert [gpt2[f"block.1.attention.{r}"].ranges for r in ("query", "key", "value")] == [
        ((0, 32),),
        ((32, 64),),
        ((64, 96),),
    ]
    assert gpt2["block.0.attention.query"].transposed
    assert gpt2["block.0.attention.query"].shape == (32, 32)
    neox = by_name("gpt_neox")  # each head has its query, key and value beside one another
    assert neox["block.0.attention.query"].ranges == ((0, 8), (24, 32), (48, 56), (72, 80))
    assert neox["block.0.attention.value"].ranges == ((16, 24), (40, 48), (64, 72), (88, 96))
    falcon = by_name("falcon")  # two groups: two queries, a key, a value
    assert falcon["block.0.attention.query"].ranges == ((0, 16), (32, 48))
    assert falcon["block.0.attention.key"].ranges == ((16, 24), (48, 56))
    phi3 = by_name("phi3")
    assert phi3["block.0.attention.value"].ranges == ((48, 64),)
    assert (phi3["block.0.mlp.gate"].ranges, phi3["block.0.mlp.up"].ranges) == (((0, 48),), ((48, 96),))


def test_experts_are_matrices_with_a_leading_axis():
    sites = by_name("mixtral")
    up, gate, down = (sites[f"block.0.expert.{r}"] for r in ("up", "gate", "down"))
    assert (up.kind, up.parameter, up.experts, up.shape, up.ranges) == (
        "experts",
        "gate_up_proj",
        4,
        (48, 32),
        ((48, 96),),
    )
    assert gate.ranges == ((0, 48),)
    assert (down.shape, down.transposed) == ((32, 48), False)
    assert sites["block.0.router"].shape == (4, 32)


def test_bert_has_its_sublayers_in_two_modules():
    sites = by_name("bert")
    attention, mlp = sites["block.0.attention"], sites["block.0.mlp"]
    layer = "bert.encoder.layer.0"
    assert (attention.module, attention.source) == (
        f"{layer}.attention.output.dense",
        f"{layer}.attention.self",
    )
    assert (mlp.module, mlp.source, mlp.norm) == (
        f"{layer}.output.dense",
        f"{layer}.intermediate",
        f"{layer}.output.LayerNorm",
    )
    assert dict(attention.options)["core"] == f"{layer}.attention.self"


def test_heads_masks_and_cross_attention_are_read_off_the_call():
    llama = by_name("llama")["block.0.attention"]
    assert (llama.heads, llama.kv_heads, llama.head_dim, llama.causal, llama.cross) == (4, 2, 8, True, False)
    t5 = by_name("t5")
    assert t5["encoder.block.0.attention"].causal is False
    assert t5["decoder.block.0.attention"].causal is True
    cross = t5["decoder.block.1.cross_attention"]
    assert (cross.causal, cross.cross, cross.stack, cross.blocks) == (False, True, "decoder", 2)


@pytest.mark.parametrize(
    ("family", "causal", "positions", "place", "class_token", "head"),
    [
        ("bert", False, "absolute", "post", True, "classifier"),
        ("gpt2", True, "absolute", "pre", False, "lm_head"),
        ("gpt_neox", True, "rotary", "parallel", False, "lm_head"),
        ("llama", True, "rotary", "pre", False, "lm_head"),
        ("t5", True, "relative", "pre", False, "lm_head"),
        ("bart", True, "absolute", "post", False, "lm_head"),
        ("vit", False, "absolute", "pre", True, "classifier"),
        ("swin", False, "relative", "pre", False, "classifier"),
        ("mamba", True, "none", "pre", False, "lm_head"),
    ],
)
def test_facts_of_the_whole(family, causal, positions, place, class_token, head):
    f = made(family)[2].facts
    assert (f.causal, f.positions, f.norm_place, f.class_token, f.head) == (
        causal,
        positions,
        place,
        class_token,
        head,
    )


def test_ends_of_the_stacks():
    t5 = made("t5")[2].facts
    assert t5.finals == (("encoder", "encoder.final_layer_norm"), ("decoder", "decoder.final_layer_norm"))
    assert t5.backbones == ("encoder", "decoder")
    assert t5.encoder_decoder
    assert ("shared.weight", "lm_head.weight") in t5.tied
    bert = made("bert")[2].facts
    assert (bert.embeddings, bert.pooler, bert.width, bert.vocabulary) == (
        (("", "bert.embeddings"),),
        "bert.pooler",
        32,
        64,
    )
    assert [stack for stack, _ in made("clip")[2].facts.blocks] == ["image", "text"]


def test_torch_attention_is_a_site_of_the_module_that_uses_the_weight():
    sites = by_name("torch_transformer")
    query, last = sites["encoder.block.0.attention.query"], sites["encoder.block.0.attention.output"]
    assert (query.module, query.parameter, query.ranges) == (
        "encoder.layers.0.self_attn",
        "in_proj_weight",
        ((0, 32),),
    )
    assert (last.module, last.parameter, last.bias) == (
        "encoder.layers.0.self_attn",
        "out_proj.weight",
        "out_proj.bias",
    )


def test_every_parameter_is_a_site_once_and_tied_ones_once():
    for family in ("t5", "mixtral", "lstm", "vit", "torch_transformer"):
        model, _, anatomy = made(family)
        names = [s.name for s in anatomy.parameter_sites()]
        assert names == [name for name, _ in model.named_parameters()]
    biases = {s.name for s in made("bert")[2].bias_sites()}
    assert biases == {name for name, _ in made("bert")[0].named_parameters() if name.endswith(".bias")}


@pytest.mark.parametrize("family", ZOO)
def test_names_of_sites_are_unique(family):
    names = [s.name for s in made(family)[2].sites]
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------- other ways in


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "vit", "phi3", "mixtral", "bart"])
def test_names_serve_where_no_forward_can_run(family):
    model, _ = ZOO[family]()
    traced = read(model)
    named = read(model.to("meta"))
    assert "no probe" in named.notes[0]
    roles = ("attention.", "cross_attention.", "mlp.", "expert.", "router")
    assert [(s.name, s.ranges) for s in named.sites if s.role.startswith(roles)] == [
        (s.name, s.ranges) for s in traced.sites if s.role.startswith(roles)
    ]


def test_a_probe_can_be_given():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, pair):
            return self.b(torch.relu(self.a(pair["x"])))

    assert read(Odd()).notes
    assert read(Odd(), probe={"pair": {"x": torch.randn(1, 4)}}).notes == []


def test_eager_attention_is_read_like_the_fused_call():
    import transformers

    for implementation in ("eager", "sdpa"):
        config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4,
                                          intermediate_size=48, num_key_value_heads=2,
                                              attn_implementation=implementation)  # fmt: skip
        anatomy = read(transformers.LlamaForCausalLM(config))
        assert _roles(anatomy, {}) == _roles(made("llama")[2], {})


def test_a_quantised_weight_keeps_its_true_shape():
    class Packed(nn.Linear):
        """Two values in a byte, as 4-bit forms store them."""

        def __init__(self):
            super().__init__(16, 8, bias=False)
            self.weight = nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return x[..., :8]

    assert read(nn.Sequential(Packed(), nn.ReLU())).sites[0].shape == (8, 16)


def test_reading_thirty_blocks_is_fast():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=30, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.LlamaForCausalLM(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting threads would count as time
    read(model)
    times = []
    for _ in range(3):
        start = time.process_time()
        read(model)
        times.append(time.process_time() - start)
    torch.set_num_threads(threads)
    assert min(times) < 1.0  # 0.3 s on a quiet machine, the probe forward included


def test_the_table_shows_role_count_module_and_shape():
    text = str(made("llama")[2])
    assert "LlamaForCausalLM: 2 blocks" in text
    line = next(row for row in text.splitlines() if row.startswith("attention.key"))
    assert line.split() == ["attention.key", "2", "model.layers.0.self_attn.k_proj", "16", "x", "32"]


def test_the_dictionary_is_plain_data():
    import json

    data = json.loads(json.dumps(made("t5")[2].to_dict()))
    assert data["facts"]["encoder_decoder"] is True
    assert data["roles"]["cross_attention.query"] == [
        f"decoder.block.{i}.layer.1.EncDecAttention.q" for i in (0, 1)
    ]
