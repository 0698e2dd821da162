"""Tiny models of many families, built from configs: two blocks, width 32, random weights.

`zoo()` maps a name to a function that gives (model in eval mode, keyword arguments of a forward). Nothing is
downloaded. Weights are drawn from a fixed seed, so that a family is the same model in every test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, dict[str, Any]]
WIDTH, HEADS, BLOCKS, WORDS = 32, 4, 2, 64


def zoo() -> dict[str, Callable[[], Made]]:
    """Name -> factory; each factory returns (model, kwargs for a forward)."""
    return dict(_FACTORIES)


_FACTORIES: dict[str, Callable[[], Made]] = {}
_CLASSIC = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
            "intermediate_size": 48}  # fmt: skip
_LLAMA = {
    **_CLASSIC,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE = {"image_size": 32, "num_channels": 3}


def _model(family: str) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Registers a builder; the forward's arguments follow from the family's name in `_arguments`."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def make() -> Made:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = build().eval()
                return model, _arguments(family, model)

        _FACTORIES[family] = make
        return build

    return register


def _arguments(family: str, model: nn.Module) -> dict[str, Any]:
    ids = torch.arange(3, 13).view(2, 5)
    if family in ("vit", "swin", "convnext", "resnet"):
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    if family in ("t5", "bart", "marian"):
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": ids[:, :4]}
    if family == "clip":
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}
    if family == "torch_transformer":
        return {"src": torch.randn(2, 5, WIDTH), "tgt": torch.randn(2, 4, WIDTH)}
    if family == "mlp":
        return {"x": torch.randn(2, 8)}
    if family == "lstm":
        return {"ids": ids}
    return {"input_ids": ids}


@_model("bert")
def bert() -> nn.Module:
    import transformers as t

    return t.BertForSequenceClassification(t.BertConfig(**_CLASSIC, max_position_embeddings=64))


@_model("roberta")
def roberta() -> nn.Module:
    import transformers as t

    return t.RobertaForSequenceClassification(t.RobertaConfig(**_CLASSIC, max_position_embeddings=66))


@_model("distilbert")
def distilbert() -> nn.Module:
    import transformers as t

    config = t.DistilBertConfig(
        vocab_size=WORDS, dim=WIDTH, n_layers=BLOCKS, n_heads=HEADS, hidden_dim=48, max_position_embeddings=64
    )
    return t.DistilBertForSequenceClassification(config)


@_model("gpt2")
def gpt2() -> nn.Module:
    import transformers as t

    return t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=64)
    )


@_model("gpt_neox")
def gpt_neox() -> nn.Module:
    import transformers as t

    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_CLASSIC, max_position_embeddings=64))


@_model("falcon")
def falcon() -> nn.Module:
    import transformers as t

    return t.FalconForCausalLM(
        t.FalconConfig(vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS,
                       num_kv_heads=2, new_decoder_architecture=True, bias=True)
    )  # fmt: skip


@_model("llama")
def llama() -> nn.Module:
    import transformers as t

    return t.LlamaForCausalLM(t.LlamaConfig(**_LLAMA))


@_model("qwen3")
def qwen3() -> nn.Module:
    import transformers as t

    return t.Qwen3ForCausalLM(t.Qwen3Config(**_LLAMA, head_dim=8))


@_model("phi3")
def phi3() -> nn.Module:
    import transformers as t

    return t.Phi3ForCausalLM(t.Phi3Config(**_LLAMA))


@_model("mixtral")
def mixtral() -> nn.Module:
    import transformers as t

    return t.MixtralForCausalLM(t.MixtralConfig(**_LLAMA, num_local_experts=4))


@_model("t5")
def t5() -> nn.Module:
    import transformers as t

    return t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=WORDS,
            d_model=WIDTH,
            d_kv=8,
            d_ff=48,
            num_layers=BLOCKS,
            num_heads=HEADS,
            decoder_start_token_id=0,
        )
    )


_BART = {"vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": BLOCKS, "decoder_layers": BLOCKS,
    "encoder_attention_heads": HEADS,
         "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip


@_model("bart")
def bart() -> nn.Module:
    import transformers as t

    return t.BartForConditionalGeneration(t.BartConfig(**_BART, max_position_embeddings=64))


@_model("marian")
def marian() -> nn.Module:
    import transformers as t

    return t.MarianMTModel(
        t.MarianConfig(
            **_BART,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            forced_eos_token_id=1,
        )
    )


@_model("whisper")
def whisper() -> nn.Module:
    import transformers as t

    return t.WhisperForConditionalGeneration(
        t.WhisperConfig(**_BART, num_mel_bins=8, max_source_positions=10, max_target_positions=16,
            pad_token_id=0, bos_token_id=1,
                        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
                            begin_suppress_tokens=None)
    )  # fmt: skip


@_model("vit")
def vit() -> nn.Module:
    import transformers as t

    config = {k: v for k, v in _CLASSIC.items() if k != "vocab_size"}
    return t.ViTForImageClassification(t.ViTConfig(**config, **_IMAGE, patch_size=16))


@_model("swin")
def swin() -> nn.Module:
    import transformers as t

    return t.SwinForImageClassification(
        t.SwinConfig(**_IMAGE, patch_size=4, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4)
    )


@_model("convnext")
def convnext() -> nn.Module:
    import transformers as t

    return t.ConvNextForImageClassification(
        t.ConvNextConfig(**_IMAGE, hidden_sizes=[16, 32], depths=[1, 2], num_stages=2)
    )


@_model("resnet")
def resnet() -> nn.Module:
    import transformers as t

    return t.ResNetForImageClassification(
        t.ResNetConfig(
            num_channels=3, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic"
        )
    )


@_model("clip")
def clip() -> nn.Module:
    import transformers as t

    image = {k: v for k, v in _CLASSIC.items() if k != "vocab_size"}
    return t.CLIPModel(
        t.CLIPConfig(text_config={**_CLASSIC, "max_position_embeddings": 16, "eos_token_id": 2,
            "bos_token_id": 1, "pad_token_id": 0},
                     vision_config={**image, **_IMAGE, "patch_size": 16}, projection_dim=24)
    )  # fmt: skip


@_model("mamba")
def mamba() -> nn.Module:
    import transformers as t

    return t.MambaForCausalLM(
        t.MambaConfig(vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=BLOCKS, state_size=4)
    )


class LSTMTagger(nn.Module):
    """Embedding, two bidirectional LSTM layers, a linear classifier for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.classify = nn.Linear(48, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.classify(self.lstm(self.embed(ids))[0])


@_model("lstm")
def lstm() -> nn.Module:
    return LSTMTagger()


@_model("torch_transformer")
def torch_transformer() -> nn.Module:
    return nn.Transformer(WIDTH, HEADS, BLOCKS, BLOCKS, dim_feedforward=48, batch_first=True)


class MLP(nn.Module):
    """Three linear layers, as a person writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 16)
        self.third = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


@_model("mlp")
def mlp() -> nn.Module:
    return MLP()
