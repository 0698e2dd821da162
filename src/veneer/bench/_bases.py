"""The bases of the benchmarks: two real shapes with random weights, made from their configs; no file is read.

`minilm` is the shape of all-MiniLM-L6-v2 (an encoder), `smollm2` that of the first ten layers of SmolLM2-135M (a
decoder, without its head). Dropout is off, so that both libraries can be compared. `toy=True` keeps the families and
shrinks everything else: for tests of the benchmarks themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LINEARS = {
    "minilm": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "smollm2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
QUERY_VALUE = {"minilm": ["query", "value"], "smollm2": ["q_proj", "v_proj"]}
VOCABULARY = {"minilm": 30522, "smollm2": 49152}
TOY_VOCABULARY = 64


def make(shape: str, seed: int = 0, toy: bool = False) -> nn.Module:
    """A base of this shape in evaluation mode; the same seed gives the same weights."""
    import transformers

    torch.manual_seed(seed)
    if shape == "minilm":
        encoder: dict[str, Any] = (
            {"vocab_size": TOY_VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64}
            if toy
            else {"vocab_size": VOCABULARY[shape], "hidden_size": 384, "num_hidden_layers": 6,
                  "num_attention_heads": 12, "intermediate_size": 1536}
        )  # fmt: skip
        return transformers.BertModel(
            transformers.BertConfig(**encoder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            add_pooling_layer=False,
        ).eval()
    decoder: dict[str, Any] = (
        {"vocab_size": TOY_VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 64}
        if toy
        else {"vocab_size": VOCABULARY[shape], "hidden_size": 576, "num_hidden_layers": 10,
              "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    )  # fmt: skip
    return transformers.LlamaModel(transformers.LlamaConfig(**decoder, rope_theta=100000.0)).eval()  # type: ignore[call-arg]


def make_like(base: nn.Module) -> nn.Module:
    """Another model of the same class over the same tensors: what is wrapped around one leaves the other alone."""
    import copy

    shared = {id(p): p for p in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def causal(seed: int = 0, toy: bool = False) -> Any:
    """All 30 layers of SmolLM2-135M's shape, with its tied head: a causal LM in evaluation mode."""
    import transformers

    torch.manual_seed(seed)
    sizes: dict[str, Any] = (
        {"vocab_size": TOY_VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 64}
        if toy
        else {"vocab_size": VOCABULARY["smollm2"], "hidden_size": 576, "num_hidden_layers": 30,
              "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    )  # fmt: skip
    config = transformers.LlamaConfig(**sizes, rope_theta=100000.0, tie_word_embeddings=True)  # type: ignore[call-arg]
    return transformers.LlamaForCausalLM(config).eval()


def batch(shape: str, rows: int, tokens: int, seed: int = 0, toy: bool = False) -> dict[str, Tensor]:
    """Token ids (rows, tokens), all of them real, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    most = TOY_VOCABULARY if toy else VOCABULARY[shape]
    ids = torch.randint(1, most, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def hidden(output: Any) -> Tensor:
    """(rows, tokens, width): the last hidden state."""
    return output["last_hidden_state"]
