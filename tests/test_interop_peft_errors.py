"""Bad HF PEFT folders: an error in words, and a model that is exactly what it was. Nothing is half attached."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import veneer
import zoo
from veneer.errors import BadFile, NoSiteFound, ShapeDiffers, UnknownOption, Unsupported, VeneerError

torch.set_num_threads(1)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_KEEP: dict[str, Any] = {}


def llama() -> nn.Module:
    """One model for all tests: those that succeed take their adapter off again."""
    if "llama" not in _KEEP:
        _KEEP["llama"] = zoo.zoo()["llama"]()[0]
        _KEEP["classes"] = [type(m) for m in _KEEP["llama"].modules()]
    return _KEEP["llama"]


def is_untouched(model: nn.Module) -> bool:
    return "veneer" not in model._modules and [type(m) for m in model.modules()] == _KEEP["classes"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that reads: LoRA at queries, values and down projections."""
    folder = tmp_path_factory.mktemp("good") / "adapter"
    model = llama()
    veneer.attach(model, "lora", "a", rank=4, alpha=6.0, sites=["attention.{query,value}", "mlp.down"])
    with torch.no_grad():
        for view in veneer.trainable(model).values():
            view.copy_(torch.randn(view.shape))
    veneer.export(model, "a", folder, format="peft")
    veneer.detach(model, "a")
    assert is_untouched(model)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config.update(changes)
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v != "<absent>"}))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = safetensors.torch.load_file(folder / TENSORS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / TENSORS)


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
OPTIONS: dict[str, tuple[dict[str, Any], type[VeneerError], str]] = {
    "no type": ({"peft_type": "<absent>"}, BadFile, "peft_type"),
    "no such type": ({"peft_type": "LORRA"}, BadFile, "LORA"),
    "a type without a converter": ({"peft_type": "HRA"}, Unsupported, r"(?s)HRA.*OFT \(oft\)"),
    "a variant": ({"use_qalora": True}, Unsupported, "use_qalora"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, Unsupported, "layer_replication"),
    "a start from data": ({"init_lora_weights": "corda"}, Unsupported, "corda"),
    "dora with a bias of B": ({"use_dora": True, "lora_bias": True}, Unsupported, "lora_bias"),
    "a rank that is a text": ({"r": "eight"}, BadFile, "r='eight'"),
    "a rank of nothing": ({"r": None}, BadFile, "r=None"),
    "a rank below one": ({"r": 0}, VeneerError, "rank=0"),
    "a rank beyond all memory": ({"r": 2**30}, ShapeDiffers, "lora_A"),
    "alpha without a value": ({"lora_alpha": float("nan")}, BadFile, "lora_alpha"),
    "a bias of no kind": ({"bias": "some"}, VeneerError, "bias"),
    "no such module": ({"target_modules": ["qkv"]}, NoSiteFound, "qkv"),
    "an expression that is none": ({"target_modules": "("}, BadFile, "expression"),
    "a module that holds no weight": ({"target_modules": ["self_attn"]}, Unsupported, "self_attn"),
    "targets of a wrong kind": ({"target_modules": {"q_proj": 1}}, BadFile, "target_modules"),
    "a pattern for no module": ({"rank_pattern": {"qroj": 2}}, NoSiteFound, r"(?s)qroj.*q_proj"),
    "a pattern that is none": ({"alpha_pattern": [1]}, BadFile, "alpha_pattern"),
    "no layer left": ({"layers_to_transform": [7]}, NoSiteFound, "target_modules"),
    "parameters that are not there": ({"target_parameters": ["experts.w1"]}, NoSiteFound, "experts.w1"),
    "a head that is not in the file": ({"modules_to_save": ["lm_head"]}, ShapeDiffers, "lm_head"),
    "rows beyond the table": ({"trainable_token_indices": [1000]}, ShapeDiffers, "1000"),
    "more modules than tensors": ({"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]}, ShapeDiffers,
                                  "2 places lack a tensor"),
    "fewer modules than tensors": ({"target_modules": ["q_proj", "v_proj"]}, ShapeDiffers, "4 tensors are unexpected"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", OPTIONS)
def test_a_config_that_cannot_be_read_says_why(case, folder):
    changes, error, words = OPTIONS[case]
    edit(folder, **changes)
    model = llama()
    with pytest.raises(error, match=words):
        veneer.load(model, folder)
    assert is_untouched(model)


def test_tensors_that_are_missing_left_over_or_of_another_shape_are_told_together(folder):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.extra.lora_A.weight"] = tensors.pop(f"{QUERY}.lora_A.weight")
        tensors[f"{QUERY.replace('q_', 'v_')}.lora_B.weight"] = torch.zeros(3, 4)

    edit_tensors(folder, change)
    with pytest.raises(ShapeDiffers) as told:
        veneer.load(llama(), folder)
    text = str(told.value)
    assert f"missing '{QUERY}.lora_A.weight'" in text
    assert "unexpected 'base_model.model.extra.lora_A.weight'" in text
    assert is_untouched(llama())

    edit_tensors(
        folder, lambda t: t.update({f"{QUERY}.lora_A.weight": t.pop("base_model.model.extra.lora_A.weight")})
    )
    with pytest.raises(ShapeDiffers, match=r"lora_B.weight' is \(3, 4\), expected \(16, 4\)"):
        veneer.load(llama(), folder)


def test_a_base_with_fewer_or_more_blocks_is_another_base(folder):
    import transformers as t

    for blocks in (1, 3):
        other = t.LlamaForCausalLM(t.LlamaConfig(**{**zoo._LLAMA, "num_hidden_layers": blocks}))
        with pytest.raises(ShapeDiffers, match=r"3 places lack a tensor|6 tensors are unexpected"):
            veneer.load(other, folder)
        assert "veneer" not in other._modules


def test_a_failed_read_leaves_other_adapters_alone(folder):
    model = llama()
    veneer.attach(model, "lora", "first")
    edit(folder, target_modules=["q_proj"])
    try:
        with pytest.raises(ShapeDiffers):
            veneer.load(model, folder, "second")
        assert list(veneer.adapters(model)) == ["first"]
        assert model.veneer.active == ("first",)
    finally:
        veneer.detach(model, "first")
    assert is_untouched(model)


def test_pickles_and_links_out_of_the_folder_are_refused(folder, tmp_path):
    os.replace(folder / TENSORS, tmp_path / "elsewhere.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(BadFile, match="pickle"):
        veneer.load(llama(), folder)
    (folder / TENSORS).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(BadFile, match="link"):
        veneer.load(llama(), folder)
    assert is_untouched(llama())


def test_missing_keys_are_read_as_hf_peft_s_defaults(folder):
    edit(folder, r=4, lora_alpha="<absent>")
    adapter = veneer.load(llama(), folder)
    assert adapter.method.alpha == 8
    assert adapter.method.dropout == 0
    veneer.detach(llama(), adapter.name)


def test_unknown_keys_are_kept_with_a_warning_and_written_again(folder, tmp_path):
    edit(
        folder,
        rank_of_tomorrow=3,
        empty_of_tomorrow=None,
        task_type="CAUSAL_LM",
        base_model_name_or_path="acme/b",
    )
    with pytest.warns(UserWarning, match="rank_of_tomorrow") as told:
        adapter = veneer.load(llama(), folder)
    assert not any("empty_of_tomorrow" in str(w.message) for w in told)
    veneer.export(llama(), adapter.name, tmp_path / "again", format="peft")
    config = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert config["rank_of_tomorrow"] == 3
    assert config["base_model_name_or_path"] == "acme/b"
    veneer.detach(llama(), adapter.name)


def test_what_was_read_saves_and_loads_in_veneer_s_own_form(folder, tmp_path):
    edit(folder, rank_pattern={"down_proj": 4}, alpha_pattern={"layers.1.self_attn.q_proj": 3})
    model, ids = llama(), {"input_ids": torch.arange(3, 9).view(1, 6)}
    adapter = veneer.load(model, folder, "theirs")
    with torch.no_grad():
        expected = model(**ids).logits
    veneer.save(model, adapter.name, tmp_path / "own")
    veneer.detach(model, "theirs")
    veneer.load(model, tmp_path / "own", "own")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, expected)
    veneer.detach(model, "own")
    assert is_untouched(model)


def test_a_target_that_no_module_is_called_is_said_where_others_are_found(folder):
    edit(folder, target_modules=["q_proj", "v_proj", "down_proj", "query_key_value"])
    with pytest.warns(UserWarning, match="query_key_value"):
        adapter = veneer.load(llama(), folder)
    veneer.detach(llama(), adapter.name)


def test_a_config_without_targets_is_read_off_the_tensors(folder):
    edit(folder, target_modules="<absent>")
    adapter = veneer.load(llama(), folder)
    assert len(adapter.plan.sites) == 6
    veneer.detach(llama(), adapter.name)


@pytest.mark.parametrize(
    "kind", ["ADALORA", "VERA", "OFT", "IA3", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"]
)
@pytest.mark.parametrize("targets", ["<absent>", [], ["q_proj"]])
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_another_type_are_refused(kind, targets, folder):
    sizes = {"num_virtual_tokens": 2, "adapter_len": 2, "adapter_layers": 1, "r": 0 if kind == "OFT" else 4}
    edit(
        folder, peft_type=kind, target_modules="self_attn" if kind == "ADAPTION_PROMPT" else targets, **sizes
    )
    with pytest.raises((ShapeDiffers, NoSiteFound)):
        veneer.load(llama(), folder)
    assert is_untouched(llama())


def test_a_base_weight_in_the_file_that_is_not_this_base_s_is_refused(folder):
    table = llama().model.embed_tokens.weight.detach()
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edit_tensors(folder, lambda t: t.update({key: table.clone()}))
    adapter = veneer.load(llama(), folder)  # the base's own: HF PEFT writes it beside edited embeddings
    veneer.detach(llama(), adapter.name)
    edit_tensors(folder, lambda t: t.update({key: table + 1}))
    with pytest.raises(Unsupported, match="embed_tokens"):
        veneer.load(llama(), folder)
    assert is_untouched(llama())


@pytest.mark.parametrize(
    ("tokens", "targets", "words"),
    [
        ({"embed_tokens": [3]}, ["embed_tokens"], "trains rows of it"),
        ({"embed_tokens": [3], "lm_head": [4]}, ["q_proj"], "other rows"),
        ({"embedding": [3]}, ["q_proj"], "no single table"),
    ],
)
def test_rows_of_tokens_that_have_no_form_are_refused_in_words(tokens, targets, words, good, tmp_path):
    import transformers as t

    folder = Path(shutil.copytree(good, tmp_path / "folder"))
    edit(folder, trainable_token_indices=tokens, target_modules=targets)
    base = t.LlamaForCausalLM(t.LlamaConfig(**zoo._LLAMA, tie_word_embeddings=True))
    with pytest.raises(VeneerError, match=words) as caught:
        veneer.load(base, folder)
    assert caught.value.next_step
    assert is_untouched(base)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "kind", "option"),
    [
        ("LoraConfig", {"use_dora": True}, {"lora_bias": True}),
        ("AdaLoraConfig", {"total_step": 9}, {"use_dora": True}),
        ("AdaLoraConfig", {"total_step": 9}, {"target_parameters": ["q_proj.weight"]}),
    ],
)
def test_what_hf_peft_itself_refuses_is_refused_here_by_name(make, kind, option, folder):
    peft = pytest.importorskip("peft")
    (name,) = option
    base = copy.deepcopy(llama())
    with pytest.raises((ValueError, TypeError)):
        peft.get_peft_model(base, getattr(peft, make)(target_modules=["q_proj"], **kind, **option))
    edit(folder, peft_type="LORA" if make == "LoraConfig" else "ADALORA", init_r=4, **kind, **option)
    with pytest.raises(VeneerError, match=name):
        veneer.load(llama(), folder)
    assert is_untouched(llama())


def test_a_bias_that_hf_peft_ignores_is_refused_by_name(folder):
    """lora_bias of AdaLoRA: the option is there, and no tensor comes of it."""
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9, lora_bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(copy.deepcopy(llama()), config)
    assert not any(n.endswith("bias") for n, p in made.named_parameters() if p.requires_grad)
    edit(folder, peft_type="ADALORA", init_r=4, total_step=9, lora_bias=True)
    with pytest.raises(Unsupported, match=r"lora_bias=True has no form here: HF PEFT makes no such bias"):
        veneer.load(llama(), folder)


def test_a_head_that_shares_the_embedding_s_weight_is_refused_by_name(tmp_path):
    import transformers as t

    peft = pytest.importorskip("peft")

    def tied() -> nn.Module:
        return t.LlamaForCausalLM(t.LlamaConfig(**zoo._LLAMA, tie_word_embeddings=True))

    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(tied(), config).save_pretrained(tmp_path / "out")
    base = tied()
    with pytest.raises(Unsupported, match=r"(?s)'lm_head' whole.*shares.*tie_word_embeddings=False"):
        veneer.load(base, tmp_path / "out")
    assert "veneer" not in base._modules


def test_options_of_the_method_are_the_folder_s_own(folder):
    with pytest.raises(UnknownOption, match="rank"):
        veneer.load(llama(), folder, rank=2)
    assert is_untouched(llama())


# -- anything at all ------------------------------------------------------------------------------------------------

_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
    | st.sampled_from(["LORA", "ADALORA", "VERA", "OFT", "IA3", "PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
                       "q_proj", "all-linear", "pissa", "all", ".*proj", "lm_head"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["q_proj", "", "(", "v"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
_keys = st.sampled_from([
    "peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "bias", "use_dora", "lora_bias",
    "init_lora_weights", "modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules", "loftq_config",
    "target_parameters", "trainable_token_indices", "lora_dropout", "use_rslora", "num_virtual_tokens", "adapter_len",
    "adapter_layers", "total_step", "init_r", "target_r", "oft_block_size", "projection_prng_key", "save_projection",
    "feedforward_modules", "peft_version", "task_type", "num_transformer_submodules", "tinit", "eps",
])  # fmt: skip
_anything = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120
)


def load_or_refuse(folder: Path) -> None:
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapter = veneer.load(model, folder)
        except VeneerError:
            pass
        else:
            veneer.detach(model, adapter.name)
    assert is_untouched(model)


@_anything
@given(changes=st.dictionaries(_keys, _values, min_size=1, max_size=4))
def test_any_config_reads_or_is_refused_in_words(changes, good, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    for file in (CONFIG, TENSORS):
        shutil.copy(good / file, folder / file)
    edit(folder, **changes)
    load_or_refuse(folder)


@_anything
@given(data=st.data())
def test_any_damage_to_the_files_is_refused_in_words(data, good, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    for file in (CONFIG, TENSORS):
        shutil.copy(good / file, folder / file)
    victim = folder / data.draw(st.sampled_from([CONFIG, TENSORS]))
    content = bytearray(victim.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, min(len(content), 2000) - 1))] = data.draw(st.integers(0, 255))
    victim.write_bytes(bytes(content))
    load_or_refuse(folder)


def rows_alone(folder: Path, table: torch.Tensor, **config: Any) -> Path:
    """A TRAINABLE_TOKENS folder of two rows of a llama's table."""
    rows = table.detach()[[3, 7]] + 1
    key = "base_model.model.model.embed_tokens.trainable_tokens_delta"
    safetensors.torch.save_file({key: rows, **config.pop("more", {})}, folder / TENSORS)
    text = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 7], **config}
    (folder / CONFIG).write_text(json.dumps(text))
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"token_indices": []}, "token_indices=\\[\\]"),
        ({"token_indices": [3, 3]}, "each id stands once"),
        ({"token_indices": [3, 1000]}, "1000"),
        ({"token_indices": [3, 7, 9]}, r"\(2, 32\), expected \(3, 32\)"),
        ({"target_modules": ["q_proj"]}, "missing"),
        ({"target_modules": ["embed"]}, "embed"),
        ({"token_indices": {"embed_tokens": [3, 7]}}, "a list of token ids"),
    ],
)
def test_rows_alone_that_do_not_fit_are_refused_in_words(config, words, folder):
    model = llama()
    with pytest.raises(VeneerError, match=words):
        veneer.load(model, rows_alone(folder, model.model.embed_tokens.weight, **config))
    assert is_untouched(model)


def test_rows_alone_with_other_rows_for_a_head_that_shares_the_table_are_refused(folder):
    import transformers as t

    base = t.LlamaForCausalLM(t.LlamaConfig(**zoo._LLAMA, tie_word_embeddings=True))
    table = base.model.embed_tokens.weight
    key = "base_model.model.lm_head.trainable_tokens_delta"
    with pytest.raises(ShapeDiffers, match=r"other rows for 'lm_head'"):
        veneer.load(base, rows_alone(folder, table, more={key: torch.zeros(2, 32)}))
    assert "veneer" not in base._modules


def test_rows_alone_save_in_veneer_s_own_form_and_several_lists_are_not_written_for_hf_peft(folder, tmp_path):
    model, ids = llama(), {"input_ids": torch.tensor([[3, 5, 7, 9]])}
    veneer.load(model, rows_alone(folder, model.model.embed_tokens.weight), "theirs")
    with torch.no_grad():
        expected = model(**ids).logits
    veneer.save(model, "theirs", tmp_path / "own")
    veneer.detach(model, "theirs")
    veneer.load(model, tmp_path / "own", "own")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, expected)
    veneer.detach(model, "own")
    veneer.attach(model, "lora", "two", sites=[], trainable_tokens={"embed_tokens": [3], "lm_head": [4]})
    with pytest.raises(Unsupported, match=r"one list of tokens for all tables"):
        veneer.export(model, "two", tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()
    veneer.detach(model, "two")
