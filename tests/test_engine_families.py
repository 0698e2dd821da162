"""Adapters on families that nothing here was written for: roles are found, a step trains, and a row of a mixed batch
is that adapter alone. Beside them bases that keep tokens in front of rows, where a row is easily taken for a token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from test_anatomy_families import BART, BERT, EXPERTS, IMAGE, LLAMA, T5, WAVE
from veneer.anatomy._probe import run_probe
from veneer.errors import Unsupported

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
BOTH = {"text_config": {**LLAMA, "model_type": "llama"}, "vision_config": IMAGE}
MIXED = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 48, "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8,
    "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8, "pad_token_id": 0, "adapter_rank": 4}  # fmt: skip

# family -> (class, settings, (blocks, queries, up projections of MLPs))
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {
    "stablelm": ("StableLmForCausalLM", LLAMA, (2, 2, 2)),
    "starcoder2": ("Starcoder2ForCausalLM", LLAMA, (2, 2, 2)),
    "xglm": ("XGLMForCausalLM", {"vocab_size": 64, "d_model": 32, "ffn_dim": 48, "num_layers": 2,
             "attention_heads": 4, "max_position_embeddings": 64}, (2, 2, 2)),
    "mbart": ("MBartForConditionalGeneration", BART, (4, 4, 4)),
    "led": ("LEDForConditionalGeneration", {**BART, "attention_window": 4, "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64}, (4, 4, 4)),
    "longformer": ("LongformerForSequenceClassification", {**BERT, "attention_window": 4}, (2, 4, 2)),
    "bigbird": ("BigBirdForSequenceClassification", {**BERT, "attention_type": "original_full"}, (2, 2, 2)),
    "mobilebert": ("MobileBertForSequenceClassification", {**BERT, "embedding_size": 16,
                   "intra_bottleneck_size": 16}, (2, 2, 8)),
    "deit": ("DeiTForImageClassification", IMAGE, (2, 2, 2)),
    "convnextv2": ("ConvNextV2ForImageClassification", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2,
                   "image_size": 32}, (2, 0, 2)),
    "hubert": ("HubertForCTC", WAVE, (2, 2, 2)),
    "sew": ("SEWForCTC", {**WAVE, "squeeze_factor": 2}, (2, 2, 2)),
    "esm": ("EsmForSequenceClassification", {**BERT, "pad_token_id": 1, "mask_token_id": 3,
            "position_embedding_type": "rotary"}, (2, 2, 2)),
    "siglip": ("SiglipVisionModel", IMAGE, (2, 2, 2)),
    "blip": ("BlipForConditionalGeneration", {"text_config": {**BERT, "encoder_hidden_size": 32},
             "vision_config": IMAGE}, (4, 4, 4)),
    "idefics3": ("Idefics3ForConditionalGeneration", {**BOTH, "image_token_id": 60, "scale_factor": 2}, (4, 4, 4)),
    "rwkv": ("RwkvForCausalLM", {"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 32,
             "num_hidden_layers": 2, "intermediate_size": 48}, (2, 0, 2)),
    "zamba2": ("Zamba2ForCausalLM", MIXED, (2, 1, 0)),
    "recurrentgemma": ("RecurrentGemmaForCausalLM", {**LLAMA, "num_hidden_layers": 3, "head_dim": 8, "lru_width": 32,
                       "attention_window_size": 8}, (3, 1, 3)),
    "granitemoe": ("GraniteMoeForCausalLM", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, (2, 2, 0)),
    "olmoe": ("OlmoeForCausalLM", {**EXPERTS, "num_experts": 4}, (2, 2, 0)),
    "nemotron": ("NemotronForCausalLM", LLAMA, (2, 2, 2)),
    "glm4": ("Glm4ForCausalLM", {**LLAMA, "head_dim": 8}, (2, 2, 2)),
    "persimmon": ("PersimmonForCausalLM", LLAMA, (2, 2, 2)),
    "gpt_neo": ("GPTNeoForCausalLM", {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
                "window_size": 4}, (2, 2, 2)),
    "ctrl": ("CTRLLMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48,
             "n_positions": 64}, (2, 2, 2)),
    "xlnet": ("XLNetForSequenceClassification", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4,
              "d_inner": 48}, (2, 0, 2)),
    "nystromformer": ("NystromformerForSequenceClassification", BERT, (2, 2, 2)),
    "convbert": ("ConvBertForSequenceClassification", {**BERT, "embedding_size": 32, "head_ratio": 2,
                 "conv_kernel_size": 3}, (2, 2, 2)),
    "ibert": ("IBertForSequenceClassification", {**BERT, "pad_token_id": 1}, (2, 2, 2)),
    "m2m100": ("M2M100ForConditionalGeneration", BART, (4, 4, 4)),
    "prophetnet": ("ProphetNetForConditionalGeneration", {"vocab_size": 64, "hidden_size": 32, "encoder_ffn_dim": 48,
                   "decoder_ffn_dim": 48, "num_encoder_layers": 2, "num_decoder_layers": 2,
                   "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
                   "max_position_embeddings": 64}, (4, 4, 4)),
    "longt5": ("LongT5ForConditionalGeneration", {**T5, "num_decoder_layers": 2, "local_radius": 3}, (4, 4, 4)),
    "pvt": ("PvtForImageClassification", {"image_size": 32, "depths": [1, 1], "hidden_sizes": [16, 32],
            "num_encoder_blocks": 2, "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2], "strides": [4, 2],
            "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}, (2, 2, 2)),
    "dinov3": ("DINOv3ViTModel", IMAGE, (2, 2, 2)),
    "git": ("GitForCausalLM", {**BERT, "vision_config": IMAGE}, (4, 4, 4)),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {
        "text_config": {**LLAMA, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32}}, (4, 4, 4)),
    "perceiver": ("PerceiverForSequenceClassification", {"num_latents": 8, "d_latents": 32, "d_model": 32,
                  "num_blocks": 1, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
                  "num_cross_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64}, (2, 2, 2)),
}  # fmt: skip
# In the fast suite one of each kind: fused, learned positions, tokens in front, images, sound, experts, recurrent.
FAST = (
    "starcoder2",
    "xglm",
    "longformer",
    "xlnet",
    "mobilebert",
    "convnextv2",
    "sew",
    "rwkv",
    "granitemoe",
    "esm",
)


def build(family: str) -> nn.Module:
    model, settings, _ = FAMILIES[family]
    made: Any = getattr(transformers, model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = made(made.config_class(**copy.deepcopy(settings))).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in net.parameters():  # biases and norms that do something, and no unit that saturates
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net


def first(y: Any) -> Tensor:
    if isinstance(y, Tensor):
        return y
    return next(v for v in y.values() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1)


def rows_equal_each_alone(model: nn.Module, inputs: dict[str, Any], names: list[str | None]) -> None:
    """Every row of the mixed batch is that row of a batch of its adapter; and no adapter is without effect."""
    alone = {}
    with torch.no_grad():
        for name in dict.fromkeys(names):
            veneer.activate(model, name)
            alone[name] = first(model(**inputs))
        with veneer.rows(model, names):
            mixed = first(model(**inputs))
    for i, name in enumerate(names):
        gap = (mixed[i] - alone[name][i]).abs().max() / alone[name][i].abs().max()
        assert gap < 2e-5, (i, name)
        if name is not None and None in alone:
            assert (alone[name][i] - alone[None][i]).abs().max() > 1e-5 * alone[None][i].abs().max(), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in FAST else [pytest.mark.slow]) for f in FAMILIES]
)
def test_adapters_serve_a_family_that_nothing_was_written_for(family):
    model, (blocks, queries, ups) = build(family), FAMILIES[family][2]
    anatomy = veneer.anatomy(model)
    roles = [s.role for s in anatomy.sites]
    assert not anatomy.notes
    assert (len(anatomy.blocks), roles.count("attention.query"), roles.count("mlp.up")) == (
        blocks,
        queries,
        ups,
    )

    _, inputs, _ = run_probe(model, None)
    sites = ["attention.{query,value}"] * (queries > 0) + ["mlp.{up,down}"] * (ups > 0)
    for name, method in (("a", "lora"), ("b", "dora")):
        adapter = veneer.attach(model, method, name, sites=sites, rank=2)
        before = {k: v.clone() for k, v in veneer.trainable(model).items()}
        y = first(model(**inputs))
        (y / y.detach().abs().max()).square().mean().backward()
        assert all(g is not None and torch.isfinite(g).all() for g in adapter.gradients().values())
        torch.optim.Adam(veneer.parameters(model), lr=0.05).step()
        moved = [k for k, v in veneer.trainable(model).items() if not torch.equal(v, before[k])]
        # B starts at zero, so A and its like move at the second step; what no input reaches never does.
        assert sum(k.endswith(("B", "magnitude")) for k in moved) >= len(adapter.plan.sites) // 2
    count = 5  # as many as tokens: where the two could be taken for one another
    many = {k: torch.cat([v] * count) if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}
    rows_equal_each_alone(model, many, ["a", None, "b", "b", "a"])


class Layers(nn.Module):
    """What PyTorch makes when nobody says batch_first: tokens, then rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False
        )
        self.past = nn.LSTM(8, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.table(ids).transpose(0, 1))
        return self.out(self.past(x)[0]).transpose(0, 1)


def test_a_base_that_keeps_tokens_in_front_of_rows_tells_the_rows_apart():
    """Four rows of four tokens: nothing but the anatomy says which is which."""
    torch.manual_seed(0)
    model, ids = Layers().eval(), torch.arange(16).view(4, 4)
    assert {"past", "out", "blocks.layers.0.linear1"} <= veneer.anatomy(model).tokens_first
    veneer.attach(model, "lora", "low", sites=["mlp.{up,down}", "out"], rank=2)
    veneer.attach(model, "serial_adapter", "bottle", sites="mlp", reduction=2)
    veneer.attach(model, "loreft", "prompt", sites="block", rank=2, positions="prompt[:1]")
    for name in ("low", "bottle", "prompt"):
        veneer.activate(model, name)
        with torch.no_grad():
            for view in veneer.trainable(model).values():
                view.add_(torch.randn_like(view) * 0.3)
    rows_equal_each_alone(model, {"ids": ids}, ["low", None, "bottle", "prompt"])
    with torch.no_grad():
        veneer.activate(model, "prompt")
        bent = model(ids)
        veneer.activate(model, None)
        changed = (bent - model(ids)).abs().amax(-1) > 1e-7
    assert changed[:, 0].all(), "the first token of every row, and not every token of the first row"


def test_where_rows_cannot_be_told_apart_the_layer_serves_whole_batches_and_says_so():
    torch.manual_seed(0)
    model, ids = Layers().eval(), torch.arange(12).view(3, 4)
    bare = model(ids)
    veneer.attach(model, "lora", "a", sites="past", rank=2)
    with torch.no_grad():
        for view in veneer.trainable(model).values():
            view.normal_()
    assert not torch.allclose(model(ids), bare)
    with (
        pytest.raises(Unsupported, match=r"(?s)'past' is given tokens before rows.*batch_first"),
        veneer.rows(model, ["a", None, "a"]),
    ):
        model(ids)
