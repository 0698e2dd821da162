"""Families beyond the zoo: nobody wrote a rule for them, so they show whether the rules are about structure.

Each is built tiny from its config. What must hold of any of them: the probe runs, every block has its
sub-layers, every attention its four projections, the roles survive random names, and value rows do what
value rows do.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from anatomy_tools import projections, randomise, rename, rows, seen_by
from veneer.anatomy import Anatomy, read

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
BERT = {**SIZES, "max_position_embeddings": 64}
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 16}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 64}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
WAVE = {**SIZES, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
EXPERTS = {**LLAMA, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16,
          "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# family -> (model class, config class, settings, (blocks, cores of attention, MLPs, mixers))
FAMILIES: dict[str, tuple[str, str, dict, tuple[int, int, int, int]]] = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "head_dim": 8}, (2, 2, 2, 0)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "head_dim": 8}, (2, 2, 2, 0)),
    "opt": ("OPTForCausalLM", "OPTConfig", {**BERT, "ffn_dim": 48, "word_embed_proj_dim": 32}, (2, 2, 2, 0)),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2,
    "n_head": 4}, (2, 2, 2, 0)),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 4}, (2, 2, 2, 0)),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", {**GPT2, "rotary_dim": 4}, (2, 2, 2, 0)),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2, (2, 2, 2, 0)),
    "mpt": ("MptForCausalLM", "MptConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4},
    (2, 2, 2, 0)),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**BERT, "embedding_size": 16}, (1, 1, 1,
    0)),
    "deberta": (
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}, (2, 2,
         2, 0),
    ),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**BERT, "embedding_size": 16}, (2, 2,
    2, 0)),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", BERT, (2, 2, 2, 0)),
    "modernbert": (
        "ModernBertForSequenceClassification", "ModernBertConfig",
        {**BERT, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1,
         "eos_token_id": 2}, (2, 2, 2, 0),
    ),
    "roformer": ("RoFormerForSequenceClassification", "RoFormerConfig", BERT, (2, 2, 2, 0)),
    "fnet": ("FNetModel", "FNetConfig", {k: v for k, v in BERT.items() if "heads" not in k}, (2, 0, 2, 0)),
    "funnel": (
        "FunnelForSequenceClassification", "FunnelConfig",
        {"vocab_size": 64, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
         (2, 2, 2, 0),
    ),
    "granite": ("GraniteForCausalLM", "GraniteConfig", LLAMA, (2, 2, 2, 0)),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", LLAMA, (2, 2, 2, 0)),
    "cohere": ("CohereForCausalLM", "CohereConfig", LLAMA, (2, 2, 2, 0)),
    "phi": ("PhiForCausalLM", "PhiConfig", LLAMA, (2, 2, 2, 0)),
    "apertus": ("ApertusForCausalLM", "ApertusConfig", LLAMA, (2, 2, 2, 0)),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**EXPERTS, "head_dim": 8, "num_local_experts": 4},
    (2, 2, 2, 0)),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 16,
        "num_experts": 4}, (2, 2, 2, 0),
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**EXPERTS, **LATENT,
    "num_key_value_heads": 4}, (2, 2, 2, 0)),
    "qwen3_next": (
        "Qwen3NextForCausalLM", "Qwen3NextConfig",
        {**EXPERTS, **LINEAR, "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 16,
         "layer_types": ["linear_attention", "full_attention"]}, (2, 1, 2, 1),
    ),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**LLAMA, "layer_types": ["conv", "full_attention"]}, (2, 1,
    2, 1)),
    "jamba": (
        "JambaForCausalLM", "JambaConfig",
        {**LLAMA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "expert_layer_offset": 1,
         "num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4}, (2, 1, 2, 1),
    ),
    "mamba2": (
        "Mamba2ForCausalLM", "Mamba2Config",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8,
         "head_dim": 8,
         "n_groups": 1, "chunk_size": 8}, (2, 0, 0, 2),
    ),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", BART, (4, 6, 4, 0)),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", {**T5, "feed_forward_proj": "gated-gelu"}, (4, 6,
    4, 0)),
    "switch": (
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
        {**T5, "num_decoder_layers": 2, "num_experts": 4, "num_sparse_encoder_layers": 1,
         "num_sparse_decoder_layers": 1},
        (4, 6, 4, 0),
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", WAVE, (2, 2, 2, 0)),
    "wavlm": ("WavLMModel", "WavLMConfig", WAVE, (2, 2, 2, 0)),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {k: v for k,
    v in IMAGE.items() if k != "intermediate_size"}, (2, 2, 2, 0)),
    "beit": ("BeitForImageClassification", "BeitConfig", {**IMAGE, "vocab_size": 64,
    "use_relative_position_bias": True}, (2, 2, 2, 0)),
    "segformer": (
        "SegformerForImageClassification", "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
         "patch_sizes": [7, 3],
         "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}, (3, 3, 3, 0),
    ),
    "timesformer": ("TimesformerForVideoClassification", "TimesformerConfig", {**IMAGE, "num_frames": 2},
    (2, 4, 2, 0)),
}  # fmt: skip
_CACHE: dict[str, tuple[nn.Module, Anatomy]] = {}


def build(family: str) -> nn.Module:
    model_class, config_class, settings, _ = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()


def made(family: str) -> tuple[nn.Module, Anatomy]:
    if family not in _CACHE:
        model = build(family)
        randomise(model)
        _CACHE[family] = model, read(model)
    return _CACHE[family]


def cores(anatomy: Anatomy) -> set[str]:
    return {dict(s.options)["core"] for s in anatomy.sites if s.kind == "attention"}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_their_parts_are_found_in_a_family_without_a_rule(family):
    blocks, attentions, mlps, mixers = FAMILIES[family][3]
    _, anatomy = made(family)
    subs = [s.role for s in anatomy.sites if not s.parameter]
    assert not anatomy.notes
    assert len(anatomy.blocks) == blocks
    assert len(cores(anatomy)) == attentions
    assert (subs.count("mlp"), subs.count("mixer")) == (mlps, mixers)
    assert anatomy.facts.norm_place in ("pre", "post", "parallel")
    if family not in ("funnel",):  # Funnel keeps one projection as an axis of heads beside plain layers
        for core in cores(anatomy):
            assert set(projections(anatomy, core)) == {"query", "key", "value", "output"}


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_such_a_family_survive_random_names(family):
    model = build(family)
    before = read(model)
    old = rename(model)
    after = read(model)
    assert not after.notes

    def described(anatomy: Anatomy, names: dict[str, str]) -> list[tuple]:
        return sorted(
            (s.role, names.get(s.module, s.module), s.ranges, s.shape, s.heads, s.kv_heads)
            for s in anatomy.sites
        )

    assert described(before, {}) == described(after, old)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f not in ("fnet", "mamba2", "wavlm", "longformer")]
)
def test_value_rows_are_all_that_reaches_the_output_projection(family):
    from veneer.anatomy._probe import run_probe

    model, anatomy = made(family)
    _, arguments, _ = run_probe(model, None)
    for core in sorted(cores(anatomy))[:2]:
        parts = projections(anatomy, core)
        changed = copy.deepcopy(model)
        assert seen_by(changed, parts["output"].module, arguments).abs().max() > 0
        rows(changed, parts["value"], torch.zeros_like)
        assert seen_by(changed, parts["output"].module, arguments).abs().max() == 0


class Attention(nn.Module):
    """As people write it by hand: one projection, `split`, a mask, `softmax`."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.all, self.back, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.all(x).split(width, dim=2)
        )
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(length, length).tril() == 0, float("-inf"))
        return self.back((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Experts in a loop, chosen by a top-k."""

    def __init__(self, width: int = 32, experts: int = 3) -> None:
        super().__init__()
        self.one, self.two, self.attend, self.pick = (
            nn.LayerNorm(width),
            nn.LayerNorm(width),
            Attention(width),
            nn.Linear(width, experts),
        )
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 48), nn.SiLU(), nn.Linear(48, width)) for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.one(x))
        h = self.two(x)
        weight, index = self.pick(h).softmax(-1).topk(1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            mine = (index == i).any(-1)
            if mine.any():
                out[mine] = expert(h[mine]) * weight[mine]
        return x + out


class Handmade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.body, self.last, self.out = nn.Sequential(Block(), Block()), nn.LayerNorm(32), nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.last(self.body(self.words(ids) + self.places(torch.arange(ids.shape[1])))))


def test_a_transformer_written_by_hand_is_read_like_the_others():
    anatomy = read(Handmade())
    sites = {s.name: s for s in anatomy.sites}
    assert not anatomy.notes
    assert sites["block.1.attention.value"].ranges == ((64, 96),)
    assert sites["block.0.attention"].causal
    assert sites["block.0.router"].module == "body.0.pick"
    assert [s.module for s in anatomy.select("block[0].expert.up")] == [
        f"body.0.experts.{i}.0" for i in range(3)
    ]
    f = anatomy.facts
    assert (f.head, f.positions, f.causal, f.norm_place) == ("out", "absolute", True, "pre")
    assert (f.token_embeddings, f.finals) == ((("", "words"),), (("", "last"),))


class ListOfLists(nn.Module):
    """Blocks that are lists of sub-layers, added up by their owner."""

    def __init__(self) -> None:
        super().__init__()
        mlp = lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))  # noqa: E731
        self.begin, self.layers = (
            nn.Linear(8, 32),
            nn.ModuleList(nn.ModuleList([Attention(), mlp()]) for _ in range(2)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        for attend, mlp in self.layers:
            x = attend(x) + x
            x = mlp(x) + x
        return x


def test_blocks_that_cannot_be_called_are_numbered_but_are_no_sites():
    anatomy = read(ListOfLists())
    assert [s.block for s in anatomy.select("mlp", port="output")] == [0, 1]
    assert "block" not in anatomy.roles
    assert anatomy.facts.blocks == ()


ODD = [
    nn.Linear(4, 3),
    nn.ReLU(),
    nn.LSTMCell(4, 8),
    nn.Bilinear(3, 4, 5),
    nn.ParameterList([torch.ones(3)]),
    nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 2, 3)),
]


@pytest.mark.parametrize("model", ODD, ids=lambda m: type(m).__name__)
def test_anything_can_be_read(model):
    anatomy = read(model)
    assert str(anatomy)
    assert [s.name for s in anatomy.parameter_sites()] == [n for n, _ in model.named_parameters()]
    assert all(s.name for s in anatomy.sites)


def test_a_tower_that_text_does_not_reach_is_read_by_itself():
    text = transformers.LlamaConfig(**LLAMA)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=transformers.CLIPVisionConfig(**IMAGE), image_token_index=60
    )
    anatomy = read(transformers.LlavaForConditionalGeneration(config).eval())
    assert {stack: len(blocks) for stack, blocks in anatomy.stacks.items()} == {"text": 2, "image": 2}
    assert anatomy.facts.causal
    assert anatomy.select("image.block[0].attention.query")[0].module.startswith("model.vision_tower")
