"""Tiny bases for the laws: two blocks, width 32, made from configs, with weights that all show.

A base deals in *contents*: what one row says, without padding. The same contents can be laid out on either
side, with more padding than they need, or one at a time, so that a law compares the same rows in different
company. Nothing is downloaded; transformers is imported when a base that needs it is built, and two bases
need torch alone.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import UnknownName, missing_package, nearest

WORDS, WIDTH, HEADS, BLOCKS, CLASSES = 48, 32, 4, 2, 3
PAD, FIRST_WORD = 0, 5
LENGTHS = (
    7,
    5,
    9,
    6,
    8,
    4,
    3,
)  # of rows, in turn; none so short that an edit of the prompt's ends has no place

Content = dict[str, Tensor]


@dataclass(frozen=True)
class TinyBase:
    """A base that laws run on."""

    name: str
    kind: str  # encoder, decoder, encoder-decoder, vision, plain
    build: Callable[[], nn.Module]
    sides: tuple[
        str, ...
    ] = ()  # where padding can stand without changing the bare base; () is a base without tokens
    positions: bool = False  # its forward takes position_ids
    labelled: bool = True  # its forward takes labels and gives a loss
    sites: Mapping[str, Any] = field(
        default_factory=dict
    )  # port -> sites, where a method's own sites are not there
    needs: str = "transformers"

    @property
    def generates(self) -> bool:
        return self.kind in ("decoder", "encoder-decoder")

    @property
    def checkpoints(self) -> bool:
        """Whether it has gradient checkpointing of its own."""
        return bool(self.needs)

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A new model in eval mode; every call gives the same weights."""
        return copy.deepcopy(_built(self.name)).to(dtype)

    def contents(self, rows: int, seed: int = 0) -> list[Content]:
        """What the rows say: token ids of different lengths, or an image, or numbers."""
        draw = torch.Generator().manual_seed(seed)
        return [self._content(LENGTHS[i % len(LENGTHS)], draw) for i in range(rows)]

    def _content(self, length: int, draw: torch.Generator) -> Content:
        made: Content = {"label": torch.randint(0, CLASSES, (), generator=draw)}
        if self.sides:
            made["ids"] = torch.randint(FIRST_WORD, WORDS, (length,), generator=draw)
        if self.kind == "encoder-decoder":
            made["decoder_ids"] = torch.randint(FIRST_WORD, WORDS, (4,), generator=draw)
        if self.kind == "vision" or self.name == "conv":
            side = 32 if self.kind == "vision" else 8
            made["image"] = torch.randn(3, side, side, generator=draw, dtype=torch.float64)
        if self.name == "mlp":
            made["x"] = torch.randn(8, generator=draw, dtype=torch.float64)
        return made

    def inputs(
        self,
        contents: Sequence[Content],
        dtype: torch.dtype = torch.float64,
        side: str = "right",
        extra: int = 0,
    ) -> dict[str, Tensor]:
        """A forward's keyword arguments: rows padded to the longest and `extra` more, mask and positions."""
        if self.kind == "vision":
            return {"pixel_values": torch.stack([c["image"] for c in contents]).to(dtype)}
        if not self.sides:
            name = "image" if self.name == "conv" else "x"
            return {name: torch.stack([c[name] for c in contents]).to(dtype)}
        tokens = max(len(c["ids"]) for c in contents) + extra
        ids = torch.full((len(contents), tokens), PAD)
        mask = torch.zeros(len(contents), tokens, dtype=torch.long)
        for i, c in enumerate(contents):
            n = len(c["ids"])
            place = slice(tokens - n, tokens) if side == "left" else slice(0, n)
            ids[i, place], mask[i, place] = c["ids"], 1
        made = {"input_ids": ids, "attention_mask": mask}
        if self.positions:
            made["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if self.kind == "encoder-decoder":
            made["decoder_input_ids"] = torch.stack([c["decoder_ids"] for c in contents])
        return made

    @property
    def flags(self) -> dict[str, bool]:
        """What to ask a forward for, so that `read` sees every token of an encoder."""
        return {"output_hidden_states": True} if self.kind == "encoder" else {}

    def labels(self, contents: Sequence[Content], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Labels for the same rows."""
        if self.kind == "decoder":
            return {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
        if self.kind == "encoder-decoder":
            return {"labels": inputs["decoder_input_ids"]}
        return {"labels": torch.stack([c["label"] for c in contents])}

    def read(self, y: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """What each row gives, padding left out: one flat tensor a row.

        An encoder's last states come before its logits, and the logits are left out where padding stands
        first: its head reads the first position, whatever is there.
        """
        logits = y if isinstance(y, Tensor) else y["logits"]
        real = inputs["attention_mask"].bool() if self.sides else None
        rows = []
        for i, row in enumerate(logits):
            if self.kind == "decoder":
                row = row[real[i]]  # type: ignore[index]
            if self.kind == "encoder" and y.get("hidden_states") is not None:
                states = y["hidden_states"][-1][i][real[i]].flatten()  # type: ignore[index]
                row = torch.cat([states, row]) if real[i, 0] else states  # type: ignore[index]
            rows.append(row.flatten())
        return rows

    def __str__(self) -> str:
        return self.name


@functools.cache
def _built(name: str) -> nn.Module:
    base = _BASES[name]
    if base.needs and importlib.util.find_spec(base.needs) is None:
        raise missing_package(base.needs, "train", f"the tiny base '{name}'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = base.build().to(torch.float64).eval()
    _draw(model)
    return model


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Weights large enough that each part of the model shows in the output."""
    draw = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        if p.dim() < 2:
            is_gain = name.endswith("weight")
            p.copy_(0.2 * noise + (1.0 if is_gain else 0.0))
        else:
            embeds = "emb" in name or "wte" in name or "wpe" in name or "shared" in name or "token" in name
            p.copy_(noise * (0.5 if embeds else p.shape[1:].numel() ** -0.5))


_TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "pad_token_id": PAD,
}
_ENDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}


def _made(config: Any, **options: Any) -> Any:
    """A config; transformers adds options of its own to those that its types know."""
    return config(**options)


def _bert() -> nn.Module:
    import transformers as t

    config = _made(
        t.BertConfig,
        **_TEXT,
        max_position_embeddings=64,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return t.BertForSequenceClassification(config)


def _llama() -> nn.Module:
    import transformers as t

    return t.LlamaForCausalLM(
        _made(t.LlamaConfig, **{**_TEXT, **_ENDS}, num_key_value_heads=2, max_position_embeddings=96)
    )


def _gpt2() -> nn.Module:
    import transformers as t

    return t.GPT2LMHeadModel(
        _made(t.GPT2Config, vocab_size=WORDS, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=96,
                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_ENDS)
    )  # fmt: skip


def _t5() -> nn.Module:
    import transformers as t

    return t.T5ForConditionalGeneration(
        _made(t.T5Config, vocab_size=WORDS, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=BLOCKS, num_heads=HEADS,
                   dropout_rate=0.0, decoder_start_token_id=1, pad_token_id=PAD, eos_token_id=2)
    )  # fmt: skip


def _bart() -> nn.Module:
    import transformers as t

    sides = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", BLOCKS), ("attention_heads", HEADS), ("ffn_dim", 48))}  # fmt: skip
    config = _made(
        t.BartConfig,
        vocab_size=WORDS,
        d_model=WIDTH,
        dropout=0.0,
        max_position_embeddings=64,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        **sides,
        **_ENDS,
    )
    return t.BartForConditionalGeneration(config)


def _vit() -> nn.Module:
    import transformers as t

    text = {k: v for k, v in _TEXT.items() if k not in ("vocab_size", "pad_token_id")}
    config = _made(
        t.ViTConfig,
        **text,
        image_size=32,
        patch_size=16,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return t.ViTForImageClassification(config)


class MLP(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 16)
        self.third = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 8) -> (rows, classes)"""
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class ConvNet(nn.Module):
    """Two convolutions with a batch norm between them, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.classify = nn.Linear(8, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """(rows, 3, height, width) -> (rows, classes)"""
        h = torch.tanh(self.second(torch.tanh(self.norm(self.first(image)))))
        return self.classify(h.mean((-2, -1)))


_BOTH = ("right", "left")
_BASES: dict[str, TinyBase] = {
    b.name: b
    for b in (
        TinyBase("mlp", "plain", MLP, labelled=False, needs="", sites={
            "weight": ["first", "second"], "output": ["second"], "input": ["second"]}),
        TinyBase("conv", "plain", ConvNet, labelled=False, needs="", sites={
            "weight": ["first", "second"], "output": ["first"], "input": ["second"]}),
        TinyBase("bert", "encoder", _bert, _BOTH, positions=True),
        TinyBase("llama", "decoder", _llama, _BOTH, positions=True),
        TinyBase("gpt2", "decoder", _gpt2, _BOTH, positions=True),
        TinyBase("t5", "encoder-decoder", _t5, _BOTH),
        # Its positions are counted from the left whatever the mask, so left padding changes the bare base.
        TinyBase("bart", "encoder-decoder", _bart, ("right",)),
        TinyBase("vit", "vision", _vit),
    )
}  # fmt: skip


def names() -> list[str]:
    """All tiny bases that can be built here, torch-only ones first."""
    return [n for n, b in _BASES.items() if not b.needs or importlib.util.find_spec(b.needs) is not None]


def get(name: str | TinyBase) -> TinyBase:
    """A base by name; raises UnknownName with the nearest."""
    if isinstance(name, TinyBase):
        return name
    if name not in _BASES:
        raise UnknownName(
            f"no tiny base is called '{name}'.",
            nearest=nearest(name, _BASES) or tuple(_BASES),
            next_step="veneer.testing.bases.names()    lists them",
        )
    return _BASES[name]
