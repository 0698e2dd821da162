"""Conversions of checkpoints into folders that transformers opens: GGUF, BERT-like pickles, CTranslate2.

Each reads numbers only: pickles with `weights_only=True`, binary files by their layout. A key that is left
over or missing is an error, so that a conversion cannot quietly give a half-random model.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import BadFile

# SMILES in tokens: atoms in brackets, two-letter elements, bonds, branches, rings (Schwaller et al., 2018).
SMILES = r"\[[^\]]+\]|Br|Cl|>>|%[0-9]{2}|[BCNOSPFIbcnosp]|[0-9]|[()=#\-+\\/:~@?>*$.]"


def gguf_folder(file: Path, folder: Path) -> None:
    """A GGUF language model and its tokenizer, dequantised to float32, in transformers' form."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, where = str(file.parent), gguf_options(file)
    AutoTokenizer.from_pretrained(place, gguf_file=file.name).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **where).save_pretrained(folder)


def gguf_options(file: Path) -> dict[str, Any]:
    """For `from_pretrained`: plain dense weights, also where transformers could keep the packed blocks."""
    import transformers

    packed = getattr(transformers, "GgufConfig", None)  # releases before it always dequantise
    return {"gguf_file": file.name} | ({"quantization_config": packed(dequantize=True)} if packed else {})


def masked_folder(
    source: Path, vocabulary: Path, folder: Path, *, pattern: str, leftover: Iterable[str]
) -> None:
    """A masked language model of BERT's kind from a pickled state dict and a list of words.

    pattern: a regular expression whose matches are the tokens. leftover: beginnings of keys without a
    place in today's classes; they are dropped.
    """
    from transformers import AlbertConfig, AlbertForMaskedLM, BertConfig, BertForMaskedLM

    written = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kind, made = {"bert": (BertConfig, BertForMaskedLM), "albert": (AlbertConfig, AlbertForMaskedLM)}[
        written["model_type"]
    ]
    known = kind().to_dict()
    model = made(
        kind(**{k: v for k, v in written.items() if k in known and k not in ("architectures", "dtype")})
    )
    state = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    state = {
        k: v for k, v in state.items() if not k.startswith(tuple(leftover)) and not k.endswith("position_ids")
    }
    fill(model, state)
    model.save_pretrained(folder)
    word_tokenizer(vocabulary, pattern).save_pretrained(folder)


def word_tokenizer(vocabulary: Path, pattern: str) -> Any:
    """A tokenizer of [CLS] tokens [SEP], whose tokens are the matches of `pattern`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(vocabulary.read_text(encoding="utf-8").split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(pattern), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads `state`; a missing key is allowed only where another key fills the same (tied) tensor."""
    report = model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=False
    )
    own = model.state_dict(keep_vars=True)
    filled = {own[key].data_ptr() for key in own if key not in report.missing_keys}
    missing = [k for k in report.missing_keys if own[k].data_ptr() not in filled]
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing or report.unexpected_keys:
        raise BadFile(
            f"the checkpoint does not fit {type(model).__name__}: missing {missing[:3]}, "
            f"left over {list(report.unexpected_keys)[:3]}.",
            next_step="the checkpoint whole, with the config that it was saved with",
        )


def read_ctranslate2(data: bytes) -> dict[str, Tensor]:
    """The variables of a CTranslate2 `model.bin` (version 6), in float32; aliases share their tensor.

    u32 version, string, u32 revision, u32 count; then string, u8 rank, u32 dims, u8 dtype, u32 size, bytes.
    """
    types = {
        0: torch.float32,
        1: torch.int8,
        2: torch.int16,
        3: torch.int32,
        4: torch.float16,
        5: torch.bfloat16,
    }
    at = 0

    def take(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def string() -> str:
        nonlocal at
        length = take("H")
        at += length
        return data[at - length : at - 1].decode()

    version, _, _, count = take("I"), string(), take("I"), take("I")
    if version != 6:
        raise BadFile(
            f"the file is of CTranslate2's form {version}; veneer reads form 6.",
            next_step="the model in transformers' own form: veneer train --model FOLDER",
        )
    found: dict[str, Tensor] = {}
    for _ in range(count):
        name, rank = string(), take("B")
        shape = [take("I") for _ in range(rank)]
        dtype, size = types[take("B")], take("I")
        flat = torch.frombuffer(bytearray(data[at : at + size]), dtype=dtype) if size else torch.empty(0)
        found[name] = (flat.float() if dtype.is_floating_point else flat).reshape(shape)
        at += size
    for _ in range(take("I")):
        alias, name = string(), string()
        found[alias] = found[name]
    return found


def whisper_folder(source: Path, folder: Path) -> None:
    """whisper-tiny.en out of CTranslate2's form, with its tokenizer and the standard spectrogram."""
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    config = WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536, decoder_start_token_id=50257,
        bos_token_id=50256, eos_token_id=50256, pad_token_id=50256,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    fill(model, _whisper_names(read_ctranslate2((source / "model.bin").read_bytes())))
    model.generation_config.update(
        decoder_start_token_id=50257, bos_token_id=50256, eos_token_id=50256, pad_token_id=50256,
        max_length=448, forced_decoder_ids=[[1, 50362]], is_multilingual=False, no_timestamps_token_id=50362,
    )  # fmt: skip
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        bos_token="<|endoftext|>", unk_token="<|endoftext|>", model_max_length=448,
    ).save_pretrained(folder)  # fmt: skip


_WHISPER = (
    (r"^(encoder|decoder)/layer_(\d+)/", r"model.\1.layers.\2."),
    (r"^(encoder|decoder)/conv(\d)/", r"model.\1.conv\2."),
    (r"self_attention/layer_norm/", "self_attn_layer_norm."),
    (r"self_attention/linear_1/", "self_attn.out_proj."),
    (r"(?<!self_)attention/layer_norm/", "encoder_attn_layer_norm."),
    (r"(?<!self_)attention/linear_0/", "encoder_attn.q_proj."),
    (r"(?<!self_)attention/linear_2/", "encoder_attn.out_proj."),
    (r"ffn/layer_norm/", "final_layer_norm."),
    (r"ffn/linear_0/", "fc1."),
    (r"ffn/linear_1/", "fc2."),
    (r"^(encoder|decoder)/layer_norm/", r"model.\1.layer_norm."),
    (r"^(encoder|decoder)/position_encodings/encodings$", r"model.\1.embed_positions.weight"),
    (r"^decoder/embeddings/weight$", "model.decoder.embed_tokens.weight"),
    (r"gamma$", "weight"),
    (r"beta$", "bias"),
)


def _whisper_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2's names to transformers'; fused projections are cut, the key's bias (zero) is not kept."""
    state: dict[str, Tensor] = {}
    for name, value in found.items():
        if value.ndim == 0 or name.startswith("decoder/projection"):
            continue  # numbers of the layout; the output layer is the embedding
        fused = re.search(r"^(.*)(self_attention/linear_0|(?<!self_)attention/linear_1)/(weight|bias)$", name)
        if fused is None:
            for pattern, written in _WHISPER:
                name = re.sub(pattern, written, name)
            state[name] = value
            continue
        before = re.sub(_WHISPER[0][0], _WHISPER[0][1], fused[1])
        own = fused[2].startswith("self")
        kinds = ("q", "k", "v") if own else ("k", "v")
        for kind, piece in zip(kinds, value.chunk(len(kinds))):
            if (kind, fused[3]) != ("k", "bias"):
                state[f"{before}{'self_attn' if own else 'encoder_attn'}.{kind}_proj.{fused[3]}"] = piece
    return state


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the loader's bars and reports on standard error: `Base.fresh` says it better."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
