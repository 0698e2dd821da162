"""What an anatomy says of a base: sites, and facts about the whole.

Pure data. The engine, the plans and the methods read it; only `anatomy` makes it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Site:
    """One place in a base where something can be edited.

    A weight site is a named parameter of a module, or some output rows of it (`ranges`: a fused projection).
    `shape` is the shape in which a method sees W: (out, in) for every matrix, whatever the module stores.
    """

    name: str  # unique and stable, the prefix in saved files: "block.3.attention.query"
    role: str  # "attention.query"; "" where structure names none
    module: str  # dotted name of the module at which an edit enters (its output, unless the port is `input`)
    # linear, conv1d (transposed), conv, embedding, norm, attention, mlp, block, experts, recurrent, parameter, other
    kind: str
    parameter: str = "weight"  # parameter of `module` that holds W ("experts.gate_up_proj" is module + this)
    bias: str = ""  # parameter of `module` that holds the bias; "" where there is none
    shape: tuple[int, ...] = ()  # W as a method sees it: (out, in), (out, in, kh, kw), (rows, width), (size,)
    ranges: tuple[
        tuple[int, int], ...
    ] = ()  # output features [start, stop) of a fused parameter; () is all of it
    transposed: bool = False  # the module stores (in, out): transformers' Conv1D
    experts: int = 0  # leading axis of a 3-D expert parameter; 0 where there is none
    groups: int = 1  # of a convolution
    n_in: int = 0
    n_out: int = 0
    width: int = 0  # size of the last axis of what the port sees: n_in for `input`, else n_out
    block: int | None = None  # index of the block within its stack
    blocks: int = 0  # number of blocks of that stack
    stack: str = ""  # "", "encoder", "decoder", "text", "image": where a base has several
    heads: int = 0  # attention: query heads
    kv_heads: int = 0  # attention: key and value heads
    head_dim: int = 0
    causal: bool = False  # attention, and all sites inside of a causal stack
    cross: bool = False  # cross-attention
    source: str = ""  # sub-layers: the module whose *input* is the sub-layer's input x; "" is `module`
    norm: str = ""  # sub-layers: the block's norm that reads (post-norm) or feeds (pre-norm) this sub-layer
    port: str = ""  # set by a plan: weight, input, output, attention, tokens, exit, around
    options: tuple[tuple[str, Any], ...] = ()  # what else a method may need, as pairs

    def at(self, port: str, **changes: Any) -> Site:
        """The same site for one port; `width` follows the port."""
        width = self.n_in if port == "input" and self.n_in else self.width
        return dataclasses.replace(self, port=port, width=width, **changes)


@dataclass(frozen=True)
class BaseFacts:
    """What is true of the whole base. Module names are dotted; "" is the root or "there is none" as said."""

    blocks: tuple[
        tuple[str, tuple[str, ...]], ...
    ] = ()  # (stack, names of its blocks in the order of the forward)
    backbones: tuple[
        str, ...
    ] = ()  # modules that can be called by themselves and own a stack (LlamaModel, T5Stack)
    embeddings: tuple[
        tuple[str, str], ...
    ] = ()  # (stack, module whose output enters the first block's stream)
    token_embeddings: tuple[tuple[str, str], ...] = ()  # (stack, the nn.Embedding of token ids)
    finals: tuple[tuple[str, str], ...] = ()  # (stack, module that gives the final hidden state)
    head: str = ""  # the module that makes logits; "" where there is none
    pooler: str = ""  # a module that picks one position before the head; "" where there is none
    tied: tuple[tuple[str, str], ...] = ()  # (parameter, parameter) that are one tensor
    encoder_decoder: bool = False
    causal: bool = False  # the stack that makes the output is causal
    positions: str = "none"  # absolute (learned or sinusoidal), rotary, relative, none
    class_token: bool = False  # the first position is a class token that a head or pooler reads
    norm_place: str = ""  # pre, post, parallel
    width: int = 0
    vocabulary: int = 0
