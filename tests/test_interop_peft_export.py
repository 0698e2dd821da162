"""What was made here, written for HF PEFT: forms that its own adapters never have, and what is refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
import zoo
from veneer.errors import BadFile, Unsupported, VeneerError

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


def base_of(family: str) -> tuple[nn.Module, dict[str, Any]]:
    model, kwargs = zoo.zoo()[family]()
    if family == "mixtral":
        return model, kwargs
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}


def adapted(family: str, method: str, **options: Any) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A base with one adapter, every tensor moved away from its start."""
    model, kwargs = base_of(family)
    adapter = veneer.attach(model, method, "mine", **options)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for view in veneer.trainable(model).values():
            view.add_(0.2 * torch.randn(view.shape, dtype=view.dtype))
    return model, adapter, kwargs


def output(model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        y = model(**kwargs)
    return y if isinstance(y, Tensor) else y["logits"] if "logits" in y else y[0]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


EXPORTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora at roles": ("llama", "lora", {"sites": "attention.{query,value}", "rank": 3}),
    "lora at parts of a fused projection": ("gpt2", "lora", {"sites": "attention.{query,value}", "rank": 3}),
    "rank-stabilised lora at parts of several ranks": (
        "gpt2", "lora", {"sites": "attention.{query,value}", "rank_stabilized": True, "rank": 3,
                         "rank_pattern": {"attention.value": 2}}),
    "lora with biases at parts": (
        "gpt2", "lora", {"sites": "attention.{query,value}", "bias": "lora_only", "lora_bias": True}),
    "lora with all biases": ("bert", "lora", {"bias": "all"}),
    "lora of rank by block": ("llama", "lora", {"rank_pattern": {"block[0].attention.query": 2}, "alpha": 5.0}),
    "lora that subtracts its start": ("t5", "lora", {"init": "pissa", "rank": 3}),
    "lora that subtracts its start, rank-stabilised": (
        "llama", "lora", {"init": "olora", "rank": 3, "rank_stabilized": True}),
    "lora of an embedding": ("llama", "lora", {"sites": ["token_embedding", "lm_head"]}),
    "lora of experts by role": ("mixtral", "lora", {"sites": ["expert.up", "expert.down", "attention.query"]}),
    "lora with a head": ("bert", "lora", {"whole": ["classifier"]}),
    "lora with a head of several layers": ("roberta", "lora", {"whole": ["classifier"]}),
    "lora with rows of tokens": ("llama", "lora", {"trainable_tokens": [2, 5]}),
    "lora with rows of tokens that the head shares": ("gpt2", "lora", {"trainable_tokens": [5, 2]}),
    "dora with rows of tokens of an encoder-decoder": (
        "t5", "dora", {"trainable_tokens": [5, 2], "sites": "attention.query"}),
    "lora with rows of a token table of an encoder": ("bert", "lora", {"trainable_tokens": [5, 2]}),
    "dora that subtracts its start": ("llama", "dora", {"init": "pissa", "rank": 3}),
    "dora of an embedding": ("llama", "dora", {"sites": ["token_embedding", "attention.query"]}),
    "dora of convolutions": ("resnet", "dora", {"sites": "convolution"}),
    "dora with biases": ("bert", "dora", {"bias": "all"}),
    "oft with dropped blocks": ("llama", "oft", {"module_dropout": 0.5, "block_size": 4}),
    "dora at a part": ("gpt2", "dora", {"sites": "attention.{query,value}"}),
    "dora": ("bert", "dora", {"sites": ["attention.query", "mlp.down"]}),
    "vera": ("llama", "vera", {"rank": 5}),
    "adalora": ("llama", "adalora", {"rank": 4, "target_rank": 2, "total_steps": 10}),
    "adalora at a part": ("gpt2", "adalora", {"sites": "attention.query"}),
    "oft": ("llama", "oft", {"sites": ["attention.query", "mlp.down"]}),
    "oft by its own block size": ("llama", "oft", {"block_size": 4, "cayley": "neumann", "block_share": True}),
    "loha": ("llama", "loha", {"rank": 4, "rank_pattern": {"block[0].attention.query": 2}}),
    "lokr": ("bert", "lokr", {"rank": 4, "alpha": 2.0, "factor": 4}),
    "hira at roles": ("llama", "hira", {"rank": 3, "sites": ["attention.query", "mlp.down"]}),
    "hira at a part": ("gpt2", "hira", {"rank": 3, "sites": "attention.value"}),
    "fourierft": ("llama", "fourierft", {"frequencies": 20}),
    "shira": ("llama", "shira", {"rank": 2, "mask": "magnitude"}),
    "boft of square kernels": (
        "resnet", "boft", {
            "sites": "convolution", "exclude": "resnet.embedder.embedder.convolution", "block_size": 2}),
    "boft": ("llama", "boft", {"sites": ["attention.query", "mlp.down"]}),
    "norms": ("llama", "norm_tuning", {}),
    "norms with shifts": ("bert", "norm_tuning", {"sites": "output.LayerNorm"}),
    "ia3": ("llama", "ia3", {}),
    "ia3 at parts": ("gpt2", "ia3", {}),
    "ia3 of an encoder-decoder": ("t5", "ia3", {}),
    "prompts": ("gpt2", "prompt_tuning", {"length": 4}),
    "prompts by a network": ("gpt2", "p_tuning", {"length": 4, "hidden": 6}),
    "prompts by an LSTM": ("llama", "p_tuning", {"length": 4, "hidden": 6, "encoder": "lstm"}),
    "prompts for an encoder": ("t5", "p_tuning", {"length": 3, "encoder": "none"}),
    "prefixes": ("llama", "prefix_tuning", {"length": 3, "position_offset": 3}),
    "prefixes by a network": (
        "llama", "prefix_tuning", {"length": 3, "position_offset": 3, "projection": True, "hidden": 6}),
    "llama adapter": ("llama", "llama_adapter", {"gate": "layer", "length": 3}),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPORTS)
def test_hf_peft_loads_what_is_written_and_answers_the_same(case, tmp_path):
    family, method, options = EXPORTS[case]
    model, _, kwargs = adapted(family, method, **options)
    expected = output(model, kwargs)
    bare, _ = base_of(family)
    assert (expected - output(bare, kwargs)).abs().max() > 1e-5
    report = veneer.export(model, "mine", tmp_path / "out", format="peft", probe=kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "out").eval()
    found = output(theirs, kwargs)
    found = found[:, -expected.shape[1] :] if found.dim() == 3 else found
    # HF PEFT keeps prompts and gates in float32, whatever the base.
    close = (
        1e-5
        if method in ("prompt_tuning", "p_tuning", "prefix_tuning", "llama_adapter", "fourierft")
        or family == "mixtral"
        else 1e-10
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=close)
    assert report.largest_difference < close
    assert report.to_dict()["sites"] > 0
    assert str(report).startswith(method)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(report.files)


def test_a_config_holds_only_what_says_something(tmp_path):
    model, _, _ = adapted("llama", "lora", rank=4, alpha=8.0)
    veneer.export(model, "mine", tmp_path / "out", format="peft", base_model_name_or_path="acme/base")
    assert config_of(tmp_path / "out") == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "acme/base", "inference_mode": True,
        "peft_version": "0.21.2", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: acme/base" in card


def test_a_task_with_a_head_takes_the_base_s_own_head_along_where_it_is_asked_for(tmp_path):
    model, _, kwargs = adapted("bert", "lora")
    report = veneer.export(model, "mine", tmp_path / "plain", format="peft")
    assert config_of(tmp_path / "plain")["task_type"] is None
    assert "classifier" in report.notes[0]
    veneer.export(model, "mine", tmp_path / "head", format="peft", task_type="SEQ_CLS")
    assert config_of(tmp_path / "head")["modules_to_save"] == ["classifier"]
    bare, _ = base_of("bert")
    nn.init.zeros_(bare.classifier.weight)  # another head than the one that was trained on
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "head").eval()
    torch.testing.assert_close(output(theirs, kwargs), output(model, kwargs), rtol=0, atol=1e-10)


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "a method without a form": ("llama", "loreft", {}, "loreft"),
    "head gates": ("llama", "llama_adapter", {}, "head_tanh"),
    "blocks that are not the last": (
        "llama", "llama_adapter", {"gate": "layer", "sites": "block[0].attention"}, "last blocks"),
    "positions from zero": ("llama", "prefix_tuning", {}, "position_offset"),
    "prefixes of an encoder": ("bert", "prefix_tuning", {}, "cache"),
    "prefixes with distances": ("t5", "prefix_tuning", {}, "distance"),
    "prefixes where positions are counted inside": ("bart", "prefix_tuning", {}, "position_table='model.decoder"),
    "prefixes in some blocks": (
        "llama", "prefix_tuning", {"sites": "block[0].attention", "length": 2, "position_offset": 2}, "every block"),
    "prompts before a class token": ("bert", "prompt_tuning", {}, "first position"),
    "rows before a class token": ("bert", "p_tuning", {}, "first position"),
    "dropout of rows": ("gpt2", "p_tuning", {"dropout": 0.1}, "dropout"),
    "dropout of prompts": ("gpt2", "prompt_tuning", {"dropout": 0.1}, "dropout"),
    "vera at a part": ("gpt2", "vera", {"sites": "attention.value"}, "frozen B"),
    "vera without its pair": ("llama", "vera", {"save_projection": False}, "projection_prng_key"),
    "oft at a part": ("gpt2", "oft", {}, "part of a fused projection"),
    "oft of a kernel": ("resnet", "oft", {"sites": "convolution"}, "kernel"),
    "oft of several sizes": ("llama", "oft", {"patterns": {"attention.query": {"block_size": 4}}}, "block size"),
    "adalora at two parts": ("gpt2", "adalora", {}, "two parts"),
    "rows of an edited table": (
        "llama", "lora", {"sites": "token_embedding", "trainable_tokens": [3]}, "rows of it are trained"),
    "loha of a table": ("llama", "loha", {"sites": "token_embedding"}, "kind 'embedding'"),
    "lokr at a part": ("gpt2", "lokr", {}, "kind 'conv1d'"),
    "hira at two parts": ("gpt2", "hira", {}, "two parts"),
    "shira of several ranks": (
        "llama", "shira", {"rank": 2, "rank_pattern": {"attention.query": 1}}, "one r for all"),
    "hira of several ranks": (
        "llama", "hira", {"rank": 2, "rank_pattern": {"attention.query": 1}}, "one r for all"),
    "recurrent weights": ("lstm", "lora", {"sites": "recurrent"}, "recurrent"),
    "dropout at experts": ("mixtral", "lora", {"sites": "expert.up", "dropout": 0.1}, "dropout"),
    "a convolution in groups": ("convnext", "lora", {"sites": r".*dwconv|.*depthwise.*"}, "groups"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_hf_peft_cannot_hold_is_refused_by_name_and_nothing_is_written(case, tmp_path):
    family, method, options, words = REFUSED[case]
    model, _ = zoo.zoo()[family]()
    veneer.attach(model, method, "mine", **options)
    write = {"save_projection": False} if "save_projection" in options else {}
    with pytest.raises(Unsupported, match=words):
        veneer.export(model, "mine", tmp_path / "out", format="peft", **write)
    assert not list(tmp_path.iterdir())


def test_a_failing_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    model, _, _ = adapted("llama", "lora")
    veneer.export(model, "mine", tmp_path / "out", format="peft")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="space"):
        veneer.export(model, "mine", tmp_path / "out", format="peft")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_numbers_that_are_not_finite_and_unknown_options_are_refused(tmp_path):
    model, _, _ = adapted("llama", "lora")
    with pytest.raises(VeneerError, match="colour"):
        veneer.export(model, "mine", tmp_path / "out", format="peft", colour="red")
    with torch.no_grad():
        next(iter(veneer.trainable(model).values()))[0, 0] = float("nan")
    with pytest.raises(BadFile, match="not finite"):
        veneer.export(model, "mine", tmp_path / "out", format="peft")
    assert not list(tmp_path.iterdir())
