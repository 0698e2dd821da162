"""Three networks that transformers does not have, in plain PyTorch: for pictures, translation and voices.

They are the shapes of published weights and nothing else, so that bases of any architecture can be tried with
real weights: depthwise convolutions with batch norms, a gated recurrence under cross-attention with tied
embeddings, an LSTM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Output(NamedTuple):
    """What a network returns; `logits` as transformers' outputs have them."""

    logits: Tensor
    hidden: Tensor | None = None


class SameConv2d(nn.Conv2d):
    """A convolution padded to ceil(size / stride), the odd pixel behind, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; added to the input where shapes allow."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.expand = nn.Conv2d(width, inner, 1, bias=False) if expansion > 1 else None
        self.expand_norm = nn.BatchNorm2d(inner, eps=1e-3) if expansion > 1 else None
        self.depthwise = SameConv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(inner, eps=1e-3)
        self.project = nn.Conv2d(inner, out, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(out, eps=1e-3)
        self.is_residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = F.relu6(self.expand_norm(self.expand(y)))
        y = F.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.is_residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: no squeeze-and-excite, ReLU6 (the Lite form of Tan and Le, 2019, arXiv:1905.11946).

    (batch, 3, height, width), each value (byte - 127) / 128 -> logits (batch, classes).
    """

    # repeats, kernel, stride, expansion, width
    STAGES = (
        (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
    )  # fmt: skip

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = SameConv2d(3, 32, 3, 2, bias=False)
        self.stem_norm = nn.BatchNorm2d(32, eps=1e-3)
        blocks, width = [], 32
        for repeats, kernel, stride, expansion, out in self.STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(width, out, kernel, stride if i == 0 else 1, expansion))
                width = out
        self.blocks = nn.ModuleList(blocks)
        self.head_conv = nn.Conv2d(width, 1280, 1, bias=False)
        self.head_norm = nn.BatchNorm2d(1280, eps=1e-3)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, pixel_values: Tensor) -> Output:
        x = F.relu6(self.stem_norm(self.stem(pixel_values)))
        for block in self.blocks:
            x = block(x)
        hidden = F.relu6(self.head_norm(self.head_conv(x))).mean(dim=(2, 3))
        return Output(self.classifier(hidden), hidden)


class Attention(nn.Module):
    """Attention of 8 heads with projections of their own: x (batch, token, width), memory alike."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """mask: (batch, 1, 1, memory token), true where it may be looked at."""

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(memory)), split(self.value(memory))
        return self.output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Recurrence(nn.Module):
    """SSRU: c_t = f_t c_{t-1} + (1 - f_t) W x_t, out relu(c_t), f = sigmoid(W_f x + b) (arXiv:1906.03731)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.candidate = nn.Linear(width, width, bias=False)
        self.forget = nn.Linear(width, width)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, token, width), state (batch, width) or None for zeros -> outputs, the last state."""
        f = self.forget(x).sigmoid()
        new = (1 - f) * self.candidate(x)
        state = torch.zeros_like(x[:, 0]) if state is None else state
        states = []
        for t in range(x.shape[1]):
            state = f[:, t] * state + new[:, t]
            states.append(state)
        return torch.stack(states, 1).relu(), state


class EncoderLayer(nn.Module):
    """Norms stand behind the sums: LayerNorm(x + f(x))."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, heads), nn.LayerNorm(width, eps=1e-6)
        self.mlp, self.mlp_norm = FeedForward(width, inner), nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention_norm(x + self.attention(x, x, mask))
        return self.mlp_norm(x + self.mlp(x))


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.recurrence, self.recurrence_norm = Recurrence(width), nn.LayerNorm(width, eps=1e-6)
        self.cross_attention, self.cross_norm = Attention(width, heads), nn.LayerNorm(width, eps=1e-6)
        self.mlp, self.mlp_norm = FeedForward(width, inner), nn.LayerNorm(width, eps=1e-6)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, state = self.recurrence(x, state)
        x = self.recurrence_norm(x + y)
        x = self.cross_norm(x + self.cross_attention(x, memory, mask))
        return self.mlp_norm(x + self.mlp(x)), state


@dataclass
class TranslatorConfig:
    """Sizes, under the names that transformers' configs have. The start is an id behind the vocabulary."""

    vocab_size: int = 32000
    hidden_size: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 2
    num_attention_heads: int = 8
    intermediate_size: int = 1536
    pad_token_id: int = 0
    eos_token_id: int = 0
    is_encoder_decoder: bool = True
    model_type: str = "bergamot"

    @property
    def decoder_start_token_id(self) -> int:
        return self.vocab_size


class Translator(nn.Module):
    """Bergamot's "tiny" translator: a transformer encoder, a recurrent decoder, one embedding for all."""

    def __init__(self, config: TranslatorConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or TranslatorConfig()
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        sizes = (c.hidden_size, c.num_attention_heads, c.intermediate_size)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(c.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(c.decoder_layers))
        self.logit_bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, decoder_input_ids: Tensor | None = None
    ) -> Output:
        """ids (batch, token) -> logits (batch, target token, vocabulary); decoder ids begin with a start."""
        if decoder_input_ids is None:
            decoder_input_ids = input_ids.new_full((len(input_ids), 1), self.config.decoder_start_token_id)
        memory, mask = self.encode(input_ids, attention_mask)
        hidden, _ = self.decode(decoder_input_ids, memory, mask, None, 0)
        return Output(self.logits(hidden), hidden)

    def encode(self, ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        x = self.embedded(ids, 0)
        for layer in self.encoder:
            x = layer(x, mask)
        return x, mask

    def decode(
        self, ids: Tensor, memory: Tensor, mask: Tensor | None, states: list[Tensor] | None, position: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Target ids that begin at `position`, behind the states of what went before."""
        x, new = self.embedded(ids, position), []
        for i, layer in enumerate(self.decoder):
            x, state = layer(x, memory, mask, None if states is None else states[i])
            new.append(state)
        return x, new

    def embedded(self, ids: Tensor, position: int) -> Tensor:
        """Scaled embeddings and sinusoids; the start has the zero vector for an embedding."""
        is_start = ids == self.config.decoder_start_token_id
        x = self.embedding(ids.masked_fill(is_start, 0)).masked_fill(is_start[..., None], 0)
        half = self.config.hidden_size // 2
        at = torch.arange(position, position + ids.shape[1], device=ids.device, dtype=torch.float32)
        rates = torch.exp(torch.arange(half, device=ids.device) * (-math.log(10000) / (half - 1)))
        angles = at[:, None] * rates
        return x * self.config.hidden_size**0.5 + torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight, self.logit_bias)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        num_beams: int = 1,
        do_sample: bool = False,
        **options: Any,
    ) -> Tensor:
        """Greedy target ids (batch, token), begun by the start as transformers' are, padded behind the end.

        Beams and samples are not written here and greedy search stands for them.
        """
        memory, mask = self.encode(input_ids, attention_mask)
        ids = input_ids.new_full((len(input_ids), 1), self.config.decoder_start_token_id)
        said, states, done = [ids], None, torch.zeros_like(ids, dtype=torch.bool)
        for position in range(max_new_tokens):
            hidden, states = self.decode(said[-1], memory, mask, states, position)
            ids = self.logits(hidden[:, -1:]).argmax(-1).masked_fill(done, self.config.pad_token_id)
            said.append(ids)
            done = done | (ids == self.config.eos_token_id)
            if done.all():
                break
        return torch.cat(said[1:], 1)


class SpeakerLSTM(nn.Module):
    """A voice as a vector of length 1 (Wan et al., 2018, arXiv:1710.10467): LSTM, linear, ReLU.

    (batch, frame, 40) mel energies -> embeddings (batch, 256), or logits where classes are given.
    """

    def __init__(self, classes: int | None = None) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.classifier = None if classes is None else nn.Linear(256, classes)

    def forward(self, input_features: Tensor) -> Output:
        _, (last, _) = self.lstm(input_features)
        hidden = F.normalize(self.linear(last[-1]).relu(), dim=-1)
        return Output(hidden if self.classifier is None else self.classifier(hidden), hidden)
