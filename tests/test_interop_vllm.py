"""Folders for vLLM and SGLang: loaded with HF PEFT they answer as the adapter does, or they are refused in words."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
import zoo
from veneer.errors import BadOption, Unsupported
from veneer.interop import _vllm_factors
from veneer.interop._vllm_factors import spectrum

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


def with_biases(model: nn.Module) -> nn.Module:
    """In float64, with biases as of a base that was trained."""
    for name, p in model.double().named_parameters():
        if name.endswith("bias"):
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


def adapted(family: str, method: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A base with one adapter, every tensor moved away from its start."""
    model, kwargs = zoo.zoo()[family]()
    model = with_biases(model).eval()
    veneer.attach(model, method, "mine", **options)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for view in veneer.trainable(model).values():
            view.add_(0.2 * torch.randn(view.shape, dtype=view.dtype))
    return model, {k: v for k, v in kwargs.items() if k != "labels"}


def logits(model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**kwargs).logits


def by_peft(family: str, folder: Path, kwargs: dict[str, Any]) -> Tensor:
    base = with_biases(zoo.zoo()[family]()[0])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, str(folder)).double().eval()
    assert not [
        w for w in said if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()
    ]
    return logits(model, kwargs)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


# name: (family, method, options, the rank that is exact)
EXACT: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "lora": ("llama", "lora", {"rank": 3}, 3),
    "rank-stabilised lora": ("llama", "lora", {"rank": 3, "rank_stabilized": True, "alpha": 5.0}, 3),
    "lora of several ranks": (
        "llama",
        "lora",
        {"rank": 3, "rank_pattern": {"block[0].attention.query": 2}},
        3,
    ),
    "a start that is subtracted": ("llama", "lora", {"rank": 2, "init": "pissa"}, 4),
    "parts of a fused projection": ("gpt2", "lora", {"sites": "attention.{query,value}", "rank": 2}, 4),
    "every linear layer": (
        "qwen3",
        "lora",
        {"sites": ["attention.{query,key,value,output}", "mlp.{gate,up,down}"], "rank": 2},
        2,
    ),
    "adalora": ("llama", "adalora", {"rank": 3, "target_rank": 2, "total_steps": 100}, 3),
    "vera": ("llama", "vera", {"rank": 5}, 5),
    "loha": ("llama", "loha", {"rank": 2}, 4),
    "lokr": ("llama", "lokr", {"rank": 2}, 0),
    "dora": ("llama", "dora", {"rank": 2}, 0),
    "hira": ("llama", "hira", {"rank": 2}, 0),
    "oft": ("llama", "oft", {}, 0),
    "fourierft": ("llama", "fourierft", {"frequencies": 24}, 0),
    "shira": ("llama", "shira", {"rank": 2}, 0),
    "ia3 without biases": ("llama", "ia3", {}, 0),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_change_of_weights_that_fits_a_rank_is_loaded_by_hf_peft_as_it_is(name, tmp_path):
    family, method, options, rank = EXACT[name]
    model, kwargs = adapted(family, method, **options)
    report = veneer.export(model, "mine", tmp_path / "out", format="vllm")
    assert report.exact
    assert set(report.errors.values()) == {0.0}
    if rank:
        assert report.rank == rank
    y = logits(model, kwargs)
    with veneer.active(model, None):
        bare = logits(model, kwargs)
    change = (y - bare).abs().max()
    assert change > 1e-3
    assert (by_peft(family, tmp_path / "out", kwargs) - y).abs().max() < 2e-5 * max(1.0, float(change))
    assert report.largest_difference < 1e-4
    assert report.divergence < 1e-6


def test_the_folder_says_all_that_the_engines_ask_for(tmp_path):
    model, _ = adapted("llama", "vera", rank=5)
    report = veneer.export(
        model, "mine", tmp_path / "out", format="vllm", base_model_name_or_path="base/name"
    )
    config = config_of(tmp_path / "out")
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 5
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["bias"] == "none"
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None
    assert not config["use_dora"]
    assert config["base_model_name_or_path"] == "base/name"
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {k.split(".")[-2] for k in tensors} == {"lora_A", "lora_B"}
    assert all(k.startswith("base_model.model.model.layers.") for k in tensors)
    assert {v.size(0) for k, v in tensors.items() if "lora_A" in k} == {5}
    assert "--max-lora-rank 8 --lora-modules mine=" in report.command
    again = veneer.export(model, "mine", tmp_path / "two", format="sglang")
    assert "--lora-target-modules q_proj v_proj" in again.command
    assert again.format == "sglang"


def test_modules_of_the_same_name_that_are_not_changed_have_zeros(tmp_path):
    model, kwargs = adapted("llama", "lora", rank=2, sites="block[0].attention.query")
    report = veneer.export(model, "mine", tmp_path / "out", format="vllm")
    assert config_of(tmp_path / "out")["target_modules"] == ["q_proj"]
    assert any("zeros" in note for note in report.notes)
    assert torch.allclose(by_peft("llama", tmp_path / "out", kwargs), logits(model, kwargs), atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_a_rank_that_is_too_small_loses_what_the_best_approximation_loses(tmp_path, whole, monkeypatch):
    if not whole:
        monkeypatch.setattr(_vllm_factors, "WHOLE", 4)
    model, _ = adapted("llama", "lora", rank=6)
    with pytest.raises(Unsupported, match=r"loses \d+\.\d% of its change.*nothing was written") as error:
        veneer.export(model, "mine", tmp_path / "out", format="vllm", rank=2)
    assert "rank=6" in error.value.next_step or "rank=5" in error.value.next_step
    assert not (tmp_path / "out").exists()
    report = veneer.export(model, "mine", tmp_path / "out", format="vllm", rank=2, max_error=1.0)
    assert not report.exact
    found = dict(veneer.trainable(model))
    for module, error in report.errors.items():
        block, role = module.split(".")[2], {"q_proj": "query", "v_proj": "value"}[module.split(".")[-1]]
        A, B = (found[f"mine.block.{block}.attention.{role}/{t}"] for t in "AB")
        S = torch.linalg.svdvals(B @ A)
        assert error == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-3)
    assert report.largest_difference > 1e-3


@pytest.mark.parametrize(
    ("family", "method", "options", "says"),
    [
        ("llama", "prefix_tuning", {}, "depends on the input"),
        ("llama", "prompt_tuning", {}, "depends on the input"),
        ("llama", "serial_adapter", {}, "depends on the input"),
        ("llama", "parallel_adapter", {}, "depends on the input"),
        ("llama", "loreft", {}, "depends on the input"),
        ("llama", "ladder_side_tuning", {}, ""),
        ("llama", "norm_tuning", {}, "norm weight"),
        ("gpt2", "bitfit", {}, "bias"),
        ("gpt2", "ia3", {}, "bias"),
        ("llama", "lora", {"rank": 2, "whole": ("lm_head",)}, "head"),
        ("mixtral", "lora", {"rank": 2, "sites": "expert.{up,down}"}, "experts"),
    ],
)  # fmt: skip
def test_what_is_no_change_of_linear_weights_is_refused_with_the_reason(
    tmp_path, family, method, options, says
):
    try:
        model, _ = adapted(family, method, **options)
    except veneer.errors.NoSiteFound:
        pytest.skip("this base has no such site")
    with pytest.raises(Unsupported) as error:
        veneer.export(model, "mine", tmp_path / "out", format="vllm")
    assert says in str(error.value)
    assert error.value.next_step
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_changes_nothing_and_a_rank_out_of_bounds_are_refused(tmp_path):
    model, _ = zoo.zoo()["llama"]()
    veneer.attach(model, "lora", "mine", rank=2)
    with pytest.raises(Unsupported, match="changes no linear layer"):
        veneer.export(model, "mine", tmp_path / "out", format="vllm")
    for rank in (0, 513):
        with pytest.raises(BadOption):
            veneer.export(model, "mine", tmp_path / "out", format="vllm", rank=rank)


@pytest.mark.parametrize("rank", [1, 7, 30, 40])
def test_random_projections_find_a_low_rank_and_its_factors(rank, monkeypatch):
    monkeypatch.setattr(_vllm_factors, "WHOLE", 4)
    draw = torch.Generator().manual_seed(rank)
    B, A = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((90, rank), (rank, 70)))
    found = spectrum(B @ A, 512)
    assert found.rank() == rank
    a, b = found.pair(rank + 2)
    assert torch.allclose(b @ a, B @ A, atol=1e-10)
    assert bool((a[rank:] == 0).all() and (b[:, rank:] == 0).all())


def test_a_change_of_full_rank_is_cut_nearly_as_well_as_can_be(monkeypatch):
    monkeypatch.setattr(_vllm_factors, "WHOLE", 4)
    delta = torch.randn(120, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S = torch.linalg.svdvals(delta)
    found = spectrum(delta, 8)
    assert found.rank() is None
    a, b = found.pair(8)
    error = float((delta - b @ a).norm() / delta.norm())
    assert found.error(8) == pytest.approx(error, rel=1e-9)
    assert float(S[8:].norm() / S.norm()) <= error <= 1.02 * float(S[8:].norm() / S.norm())
