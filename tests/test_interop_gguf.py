"""GGUF LoRA files: read back by the gguf package, B A is the change of the weight, in llama.cpp's names and orders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import veneer
import zoo
from veneer.errors import BadOption, Unsupported, VeneerError
from veneer.interop.gguf import separate

gguf = pytest.importorskip("gguf")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(family: str, method: str = "lora", **options):
    model, kwargs = zoo.zoo()[family]()
    adapter = veneer.attach(model, method, "mine", **options)
    torch.manual_seed(3)
    with torch.no_grad():
        for view in veneer.trainable(model).values():
            view.copy_(torch.randn(view.shape))
    return model, adapter, kwargs


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    reader = gguf.GGUFReader(path)
    tensors = {
        t.name: torch.tensor(t.data.copy()).reshape(*reversed(t.shape.tolist())) for t in reader.tensors
    }
    return tensors, {k: f.contents() for k, f in reader.fields.items()}


def changes(model, name: str = "mine") -> dict[str, Tensor]:
    """Module -> change of its stored weight, by merging."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "veneer" not in n}
    veneer.merge(model, name)
    after = {n: p.detach().clone() for n, p in model.named_parameters() if "veneer" not in n}
    return {
        n.removesuffix(".weight"): after[n] - before[n]
        for n in before
        if not torch.equal(before[n], after[n])
    }


@pytest.mark.parametrize("options", [
    {"rank": 4, "alpha": 6.0},
    {"rank": 4, "alpha": 6.0, "rank_stabilized": True, "rank_pattern": {"attention.key": 2}},
    {"rank": 4, "init": "pissa"},
])  # fmt: skip
def test_a_file_holds_the_change_of_each_weight_of_a_llama(options, tmp_path):
    sites = "attention.{query,key,value,output}"
    model, _, _ = (
        adapted("llama", sites=[sites, "mlp.down", "token_embedding", "lm_head"], **options)
        if ("init" not in options)
        else adapted("llama", sites=[sites, "mlp.down"], **options)
    )
    report = veneer.export(model, "mine", tmp_path, format="gguf")
    assert report.files == ["adapter.gguf"]
    tensors, fields = contents(tmp_path / "adapter.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    alpha, expected = fields["adapter.lora.alpha"], changes(model)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}  # fmt: skip
    wanted = {f"model.layers.{i}.{n}": f"blk.{i}.{g}" for i in (0, 1) for n, g in names.items()}
    wanted |= {"model.embed_tokens": "token_embd", "lm_head": "output"} if "init" not in options else {}
    assert set(expected) == set(wanted)
    assert set(tensors) == {f"{g}.weight.lora_{end}" for g in wanted.values() for end in "ab"}
    for module, name in wanted.items():
        a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        scale = alpha / b.shape[-1]
        if name == "token_embd":
            found = scale * a @ b.mT
        else:
            heads = {"attn_q": 4, "attn_k": 2}.get(name.rpartition(".")[2])
            found = scale * (separate(b, heads) if heads else b) @ a
        torch.testing.assert_close(found, expected[module], rtol=1e-4, atol=1e-5)


def test_rows_of_a_llama_are_interleaved_and_those_of_a_qwen_are_not(tmp_path):
    """Head by head: row 0, row d/2, row 1, row d/2 + 1, ... of what the base has."""
    for family, order in (("llama", [0, 4, 1, 5, 2, 6, 3, 7]), ("qwen3", list(range(8)))):
        model, adapter, _ = adapted(family, sites="attention.query", rank=2, alpha=2.0)
        veneer.export(model, "mine", tmp_path / f"{family}.gguf", format="gguf")
        tensors, _ = contents(tmp_path / f"{family}.gguf")
        B = adapter.named()["block.0.attention.query/B"]
        torch.testing.assert_close(tensors["blk.0.attn_q.weight.lora_b"][:8], B[order])


def test_parts_of_a_fused_projection_and_conv1d_are_written_as_the_whole(tmp_path):
    model, _, _ = adapted("gpt2", sites=["attention.{query,value}", "mlp.down"], rank=2)
    veneer.export(model, "mine", tmp_path, format="gguf")
    tensors, fields = contents(tmp_path / "adapter.gguf")
    a, b = tensors["blk.1.attn_qkv.weight.lora_a"], tensors["blk.1.attn_qkv.weight.lora_b"]
    assert a.shape == (4, 32)
    expected = changes(model)
    torch.testing.assert_close(fields["adapter.lora.alpha"] / 4 * b @ a, expected["transformer.h.1.attn.c_attn"].mT,
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    assert "blk.0.ffn_down.weight.lora_a" in tensors


def test_half_precision_halves_the_file(tmp_path):
    model, _, _ = adapted("llama", sites="mlp.up", rank=4)
    veneer.export(model, "mine", tmp_path / "full.gguf", format="gguf")
    veneer.export(model, "mine", tmp_path / "half.gguf", format="gguf", dtype="f16")
    full, half = contents(tmp_path / "full.gguf")[0], contents(tmp_path / "half.gguf")[0]
    for name, value in full.items():
        assert half[name].dtype == torch.float16
        torch.testing.assert_close(half[name].float(), value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "method", "options", "named"), [
    ("llama", "dora", {}, "magnitude"),
    ("llama", "ia3", {}, "scale"),
    ("llama", "lora", {"whole": ["lm_head"]}, "lm_head.weight/W"),
    ("gpt2", "lora", {"bias": "lora_only"}, "base_bias"),
    ("bert", "lora", {}, "bert"),
    ("mixtral", "lora", {"sites": "expert.up"}, "mixtral"),
])  # fmt: skip
def test_what_a_file_cannot_hold_is_refused_by_name_and_nothing_is_written(
    family, method, options, named, tmp_path
):
    model, _, _ = adapted(family, method, **options)
    with pytest.raises(Unsupported, match=named):
        veneer.export(model, "mine", tmp_path, format="gguf")
    assert not list(tmp_path.iterdir())


def test_numbers_that_half_precision_cannot_hold_are_refused(tmp_path):
    model, _, _ = adapted("llama", sites="mlp.up", rank=4)
    with torch.no_grad():
        next(iter(veneer.trainable(model).values())).fill_(1e6)
    with pytest.raises(VeneerError, match="not finite in f16"):
        veneer.export(model, "mine", tmp_path, format="gguf", dtype="f16")
    with pytest.raises(BadOption, match="f32"):
        veneer.export(model, "mine", tmp_path, format="gguf", dtype="q8")
    assert not list(tmp_path.iterdir())
