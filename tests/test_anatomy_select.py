"""Selectors: every way to name sites, and what the errors say when nothing is named."""

from __future__ import annotations

import functools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from veneer.anatomy import Anatomy, Site, read
from veneer.errors import BadOption, NoSiteFound, VeneerError
from zoo import zoo


@functools.cache
def anatomy(family: str) -> Anatomy:
    return read(zoo()[family]()[0])


def names(sites: list[Site]) -> list[str]:
    return [site.name for site in sites]


def modules(sites: list[Site]) -> list[str]:
    return [site.module for site in sites]


# ---------------------------------------------------------------- roles


def test_a_role_names_its_sites_in_the_order_of_the_model():
    assert names(anatomy("llama").select("attention.query")) == [
        "block.0.attention.query",
        "block.1.attention.query",
    ]


def test_braces_are_a_union():
    a = anatomy("llama")
    assert a.select("attention.{query,value}") == a.select(["attention.query", "attention.value"])
    assert names(a.select("{attention.query,mlp.up}", layers=0)) == [
        "block.0.attention.query",
        "block.0.mlp.up",
    ]


def test_a_site_named_twice_comes_once():
    a = anatomy("llama")
    assert a.select(["attention.query", "q_proj", "block[0].attention.query"]) == a.select("attention.query")


@pytest.mark.parametrize(
    ("selector", "blocks"),
    [
        ("block[-1:].mlp.down", [1]),
        ("block[0].mlp.down", [0]),
        ("block[-1].mlp.down", [1]),
        ("block[0,1].mlp.down", [0, 1]),
        ("block[::2].mlp.down", [0]),
        ("block[-4:].mlp.down", [0, 1]),
        ("block.mlp.down", [0, 1]),
    ],
)
def test_blocks_are_sliced_as_python_lists(selector, blocks):
    assert [site.block for site in anatomy("llama").select(selector)] == blocks


def test_a_stack_can_be_named():
    a = anatomy("t5")
    assert names(a.select("encoder.attention.query")) == [
        f"encoder.block.{i}.attention.query" for i in (0, 1)
    ]
    assert names(a.select("decoder.block[1].cross_attention.value")) == [
        "decoder.block.1.cross_attention.value"
    ]
    assert len(a.select("attention.query")) == 4


def test_the_name_of_a_site_selects_it():
    for family in ("bert", "t5", "mixtral", "mamba", "lstm"):
        for site in anatomy(family).sites:
            port = "weight" if site.parameter else "output"
            found = anatomy(family).select(site.name, port=port)
            assert site.name in names(found) or (not site.parameter and site.module in modules(found))


# ---------------------------------------------------------------- modules, as HF PEFT names them


def test_suffixes_select_modules():
    assert modules(anatomy("llama").select(["q_proj", "v_proj"], layers=[1])) == [
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
    ]  # fmt: skip
    assert modules(anatomy("bert").select("output.dense", layers=0)) == [
        "bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.output.dense",
    ]  # fmt: skip


def test_a_set_is_accepted_and_has_an_order():
    a = anatomy("llama")
    assert a.select({"q_proj", "v_proj"}) == a.select(["v_proj", "q_proj"])


def test_a_glob_and_a_regular_expression_match_whole_names():
    a = anatomy("llama")
    glob = a.select("model.layers.*.self_attn.q_proj")
    assert glob == a.select("attention.query") == a.select(r"model\.layers\.\d+\.self_attn\.q_proj")
    assert len(a.select(r".*\.(q|v)_proj")) == 4
    assert len(a.select(r"model\.layers\.[01]{1}\.mlp\.(up|down)_proj")) == 4


def test_a_fused_module_is_one_site_where_the_module_is_named():
    site = anatomy("gpt2").select(["c_attn"])[0]
    assert (site.ranges, site.shape, site.transposed, site.n_out) == ((), (96, 32), True, 96)
    # The whole takes the place of its parts.
    assert anatomy("gpt2").select(["c_attn", "attention.query"]) == anatomy("gpt2").select(["c_attn"])


def test_all_linear_is_every_linear_layer_but_the_head():
    import transformers

    for family in ("llama", "gpt2", "bert", "t5"):
        model = zoo()[family]()[0]
        kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
        expected = [
            n for n, m in model.named_modules() if isinstance(m, kinds) and n not in ("lm_head", "classifier")
        ]
        assert modules(anatomy(family).select("all-linear")) == expected
        assert anatomy(family).select("linear") == anatomy(family).select("all-linear")
    assert modules(anatomy("mlp").select("all-linear")) == ["first", "second", "third"]


def test_bias_and_parameter_name_parameters():
    model = zoo()["bert"]()[0]
    a = anatomy("bert")
    assert names(a.select("bias")) == [n for n, _ in model.named_parameters() if n.endswith("bias")]
    assert names(a.select("all")) == names(a.select("parameter")) == [n for n, _ in model.named_parameters()]
    assert all(site.block == 1 for site in a.select("block[1].bias"))
    assert not [
        n for n in names(a.select("all", exclude=["norm", "head"])) if "LayerNorm" in n or "classifier" in n
    ]


# ---------------------------------------------------------------- options


def test_exclude_takes_any_selector():
    a = anatomy("llama")
    assert modules(a.select("all-linear", exclude=["mlp.{up,gate,down}", "o_proj"], layers=0)) == [
        f"model.layers.0.self_attn.{p}_proj" for p in "qkv"
    ]
    assert names(a.select("attention.query", exclude="block[0].attention.query")) == [
        "block.1.attention.query"
    ]
    # A sub-layer leaves out all weights below it.
    assert {s.role.split(".")[0] for s in a.select("all-linear", exclude="mlp")} == {"attention", ""} - {""}


def test_layers_are_block_numbers():
    a = anatomy("llama")
    for layers in (1, [1], (1,), range(1, 2), "1", "-1:", "[1]", -1):
        assert names(a.select("mlp.up", layers=layers)) == ["block.1.mlp.up"]


@pytest.mark.parametrize(
    ("selector", "port", "kind", "count"),
    [
        ("attention", "output", "attention", 2),
        ("attention", "attention", "attention", 2),
        ("attention", "input", "attention", 2),
        ("mlp", "output", "mlp", 2),
        ("block", "around", "block", 2),
        ("block", "output", "block", 2),
        ("block[-1:]", "output", "block", 1),
        ("embedding", "output", "other", 1),
        ("embedding", "tokens", "other", 1),
        ("norm", "output", "norm", 5),
        ("mlp.up", "output", "linear", 2),
        ("attention.{key,value}", "output", "linear", 4),
        ("head", "output", "linear", 1),
        ("pooler", "output", "other", 1),
        ("final", "exit", "other", 1),
        ("norm", "weight", "norm", 5),
        ("token_embedding", "weight", "embedding", 1),
    ],
)
def test_a_port_decides_what_can_be_selected(selector, port, kind, count):
    sites = anatomy("bert").select(selector, port=port)
    assert [(site.kind, site.port) for site in sites] == [(kind, port)] * count


def test_the_width_follows_the_port():
    up = {
        port: anatomy("llama").select("block[0].mlp.up", port=port)[0].width
        for port in ("input", "output", "weight")
    }
    assert up == {"input": 32, "output": 48, "weight": 48}


def test_any_module_has_an_output():
    site = anatomy("gpt2").select("transformer.h.0.mlp.act", port="output")[0]
    assert (site.module, site.width, site.block, site.role) == ("transformer.h.0.mlp.act", 128, 0, "")


def test_one_module_that_is_a_weight_may_be_named_by_its_place():
    assert modules(anatomy("llama").select("embedding")) == ["model.embed_tokens"]
    assert modules(anatomy("roberta").select("head")) == ["classifier.dense", "classifier.out_proj"]


# ---------------------------------------------------------------- errors


def message(family: str, *args, **kwargs) -> str:
    with pytest.raises(NoSiteFound) as caught:
        anatomy(family).select(*args, **kwargs)
    return str(caught.value)


def test_a_misspelt_role_names_the_nearest():
    text = message("llama", "attention.qurey")
    assert text.startswith("sites='attention.qurey' matches nothing in LlamaForCausalLM (2 blocks).")
    assert "attention.query (2 sites)" in text
    assert "veneer anatomy MODEL" in text


def test_a_misspelt_module_names_the_nearest():
    assert "q_proj (2 modules)" in message("llama", ["qproj"])


def test_a_partial_match_names_exactly_what_is_missing():
    text = message("llama", ["q_proj", "nope", "attention.{key,valeu}"])
    first = text.splitlines()[0]
    assert "'nope', 'attention.valeu' match" in first
    assert "'attention.key'" not in first
    kept = anatomy("llama").select(["q_proj", "nope"], allow_partial=True)
    assert kept == anatomy("llama").select("attention.query")


def test_a_whole_sublayer_has_no_weight_and_the_error_names_its_parts():
    text = message("llama", "attention")
    assert "'weight'" in text
    assert "attention.query (2 sites)" in text


def test_a_block_number_beyond_the_last_is_an_error():
    assert "block [7] is not among the 2 blocks" in message("llama", "block[7].mlp.up")
    assert "block [2] is not among the 2 blocks" in message("llama", "mlp.up", layers=[0, 2])
    assert "cannot be read" in message("llama", "block[a].mlp.up")
    assert "no site in layers" in message("llama", "head", layers=0)


def test_nothing_left_after_exclude_is_an_error():
    assert "leaves nothing" in message("llama", "mlp.up", exclude="mlp")
    assert message("llama", "mlp.up", exclude="mlp.upp").startswith("exclude=['mlp.upp'] matches nothing")


@pytest.mark.parametrize(
    "selector", ["", [], "  ", [""], None, 3, ["q_proj", 3], "block[", "a{b,c", "(", "{", "[]", "block[].x"]
)
def test_odd_selectors_are_refused_in_words(selector):
    with pytest.raises(VeneerError):
        anatomy("llama").select(selector)


def test_an_unknown_port_and_odd_layers_are_bad_options():
    with pytest.raises(BadOption, match="weight"):
        anatomy("llama").select("mlp.up", port="wieght")
    with pytest.raises(BadOption):
        anatomy("llama").select("mlp.up", layers=2.5)


# ---------------------------------------------------------------- any string at all

PIECES = st.sampled_from(
    ["block", "[", "]", "0", "-1", "5", ":", ",", ".", "attention", "query", "mlp", "{", "}", "*", "?",
     "encoder", "(", ")", "|", "+",
     "q_proj", "bias", "all", "model", "layers", "\\", "d", "^", "$", " ", "head", "norm"]
)  # fmt: skip
TEXT = st.one_of(st.text(max_size=20), st.lists(PIECES, max_size=9).map("".join))
PORTS = st.sampled_from(["weight", "input", "output", "attention", "tokens", "exit", "around"])


@settings(max_examples=400, deadline=None)
@given(
    selector=st.one_of(TEXT, st.lists(TEXT, max_size=3)),
    port=PORTS,
    exclude=st.one_of(st.none(), TEXT),
    layers=st.one_of(st.none(), st.integers(-4, 4), st.lists(st.integers(-3, 3), max_size=3), TEXT),
    family=st.sampled_from(["llama", "t5", "gpt2", "lstm"]),
)
def test_a_selector_gives_sites_or_an_error_of_veneer(selector, port, exclude, layers, family):
    try:
        sites = anatomy(family).select(selector, port=port, exclude=exclude, layers=layers)
    except VeneerError:
        return
    assert sites
    assert all(site.port == port for site in sites)
    keys = [(s.module, s.parameter, s.ranges, s.role) for s in sites]
    assert len(set(keys)) == len(keys)


@settings(max_examples=100, deadline=None)
@given(
    members=st.lists(
        st.sampled_from(["attention.query", "mlp.down", "q_proj", "block[0].mlp.up", "lm_head"]),
        min_size=1,
        max_size=4,
    )
)
def test_a_list_is_the_union_of_its_members(members):
    a = anatomy("llama")
    union = {site.name for member in members for site in a.select(member)}
    assert set(names(a.select(members))) == union


def test_names_of_blocks_do_not_match_by_prefix():
    """'block.1' is no prefix of 'block.10', and a suffix is a whole path component."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=11, num_attention_heads=4, intermediate_size=48
    )
    a = read(transformers.LlamaForCausalLM(config))
    assert names(a.select("mlp.up", layers=1)) == ["block.1.mlp.up"]
    assert names(a.select("all-linear", exclude="block.1.mlp", layers=[1, 10])) == [
        n for n in names(a.select("all-linear", layers=[1, 10])) if not n.startswith("block.1.mlp")
    ]
    with pytest.raises(NoSiteFound):
        a.select(["_proj"])
    assert re.fullmatch(r"block\.10\.mlp\.up", names(a.select("block[10].mlp.up"))[0])
