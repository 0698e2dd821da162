"""The bases of the published counts: configs without weights, and the facts that the arithmetic needs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """d: width, f: the MLP's width, kv: width of keys and values, inner: of queries."""

    config: str  # the class of transformers that describes it
    settings: dict
    blocks: int
    d: int
    f: int
    heads: int
    kv: int
    inner: int = 0
    total: int | None = None  # parameters of the base, where a source gives them
    model: str = "AutoModel"  # the class that `total` counts


def _bert(config: str, blocks: int, d: int, f: int, heads: int, vocabulary: int, **more) -> Architecture:
    settings = {
        "num_hidden_layers": blocks,
        "hidden_size": d,
        "intermediate_size": f,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
    }
    total = more.pop("total", None)
    return Architecture(config, settings | more, blocks, d, f, heads, kv=d, inner=d, total=total)


def _llama(
    blocks: int, d: int, f: int, heads: int, kv_heads: int, vocabulary: int, total: int, **more
) -> Architecture:
    size = d // heads
    settings = {
        "num_hidden_layers": blocks,
        "hidden_size": d,
        "intermediate_size": f,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }
    return Architecture(
        "LlamaConfig",
        settings | more,
        blocks,
        d,
        f,
        heads,
        kv=kv_heads * size,
        inner=d,
        total=total,
        model="AutoModelForCausalLM",
    )


def _gpt2(blocks: int, d: int, heads: int, total: int | None = None) -> Architecture:
    settings = {"n_layer": blocks, "n_embd": d, "n_head": heads}
    return Architecture("GPT2Config", settings, blocks, d, 4 * d, heads, kv=d, inner=d, total=total)


def _t5(blocks: int, d: int, f: int, heads: int, size: int, total: int | None = None, **more) -> Architecture:
    settings = {
        "num_layers": blocks,
        "num_decoder_layers": blocks,
        "d_model": d,
        "d_ff": f,
        "num_heads": heads,
        "d_kv": size,
    }
    return Architecture(
        "T5Config",
        settings | more,
        blocks,
        d,
        f,
        heads,
        kv=heads * size,
        inner=heads * size,
        total=total,
        model="AutoModelForSeq2SeqLM",
    )


ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
ARCHITECTURES = {
    "bert_base": _bert("BertConfig", 12, 768, 3072, 12, 30522, total=109_482_240),
    "bert_large": _bert("BertConfig", 24, 1024, 4096, 16, 30522, total=335_141_888),
    "roberta_base": _bert(
        "RobertaConfig", 12, 768, 3072, 12, 50265, max_position_embeddings=514, type_vocab_size=1
    ),
    "roberta_large": _bert(
        "RobertaConfig", 24, 1024, 4096, 16, 50265, max_position_embeddings=514, type_vocab_size=1
    ),
    "deberta_v3_base": _bert("DebertaV2Config", 12, 768, 3072, 12, 128100),
    "deberta_xxl": _bert("DebertaV2Config", 48, 1536, 6144, 24, 128100),
    "vit_base": _bert("ViTConfig", 12, 768, 3072, 12, 1),
    "vit_large": _bert("ViTConfig", 24, 1024, 4096, 16, 1),
    "gpt2_medium": _gpt2(24, 1024, 16, total=354_823_168),
    "gpt2_large": _gpt2(36, 1280, 20),
    "gpt3": _gpt2(96, 12288, 96),
    "opt_125m": Architecture(
        "OPTConfig",
        {"num_hidden_layers": 12, "hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12},
        blocks=12,
        d=768,
        f=3072,
        heads=12,
        kv=768,
        inner=768,
    ),
    "llama_7b": _llama(32, 4096, 11008, 32, 32, 32000, total=6_738_415_616),
    "llama_13b": _llama(40, 5120, 13824, 40, 40, 32000, total=13_015_864_320),
    "llama3_8b": _llama(32, 4096, 14336, 32, 8, 128256, total=8_030_261_248),
    "llama32_3b": _llama(28, 3072, 8192, 24, 8, 128256, total=3_212_749_824, tie_word_embeddings=True),
    "t5_base": _t5(12, 768, 3072, 12, 64, total=222_903_552),
    "t5_xxl": _t5(24, 4096, 10240, 64, 64, **GATED),
    "flan_t5_small": _t5(8, 512, 1024, 6, 64, **GATED),
    # Published with a head of its own, 2,849,757,184; transformers 5 ties the head of every T5.
    "t0_3b": _t5(24, 2048, 5120, 32, 64, total=2_849_757_184 - 32128 * 2048, **GATED),
    "t0_11b": _t5(24, 4096, 10240, 64, 64, **GATED),
}
