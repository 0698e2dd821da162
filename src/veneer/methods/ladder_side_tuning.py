"""Ladder side tuning: a thin network beside the base reads its states. Sung et al., 2022, arXiv:2206.06522.

    s = D_0 e                                  e: what enters the first block, s: (tokens, w)
    s <- B_i(mu_i s + (1 - mu_i) D_i h_i)      h_i: the output of block i, mu_i = sigma(gate_i / 0.1)
    h' = U LN(s)                               w = width / reduction

B_i is a pre-norm block at width w: self-attention as causal as the base's, in a decoder then an attention to
what the encoder gives, and an MLP of width 4 w.
Nothing flows back into the base: a training step keeps no activations of it, which is what the ladder is
for; the price is its own forward and, in generation, a cache of its own. h' takes the place of the last
hidden state, so the model does not begin as its base; with `merge_base` (an option of the published code)
it is mu U LN(s) + (1 - mu) h.

About 12 w^2 + width w numbers a rung, and 2 w^2 + 2 width w more where it reads an encoder. The paper prunes
the base's own blocks into the B_i to begin with; here they start as new ones, since a start sees the weight
of its own site alone. In an encoder-decoder the ladder stands beside the decoder; the paper gives the encoder
one too. The blocks have no position embedding: positions are in the h_i.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.edits import (
    ACTIVATIONS,
    At,
    ExitMethod,
    Site,
    Sites,
    Spec,
    Specs,
    Tensors,
    bottleneck,
    hyper,
    kaiming,
    layer_norm,
    method,
    ones,
    split_heads,
    uniform,
    zeros,
)


@method(
    "ladder_side_tuning",
    paper="arXiv:2206.06522",
    family="side/ladder",
    starts_as_identity=False,
    reason="the ladder's output takes the place of the base's",
    rates=(3e-4, 1e-2),
)
class LadderSideTuning(ExitMethod):
    reduction: float = hyper(8.0, "width of the base over width of the ladder", at_least=1, size=True)
    heads: int = hyper(0, "heads of the ladder's attention; 0 for as many as the base has", at_least=0)
    rungs: tuple[int, ...] = hyper((), "blocks that the ladder reads; all of them when empty")
    activation: str = hyper("gelu", "inside the MLPs", choices=tuple(ACTIVATIONS))
    temperature: float = hyper(0.1, "of the gates mu", more_than=0)
    merge_base: bool = hyper(False, "mix the base's last hidden state into the output")
    sites: Sites = "final"

    @property
    def wanted_taps(self) -> str | tuple[int, ...]:
        return (-1, *self.rungs) if self.rungs else "all"

    def width(self, site: Site) -> int:
        """w: a multiple of the heads."""
        heads = self.heads_at(site)
        return max(heads, int(site.width // self.reduction) // heads * heads)

    def heads_at(self, site: Site) -> int:
        return self.heads or site.heads or 1

    def tensors(self, site: Site) -> Specs:
        if site.stack == "encoder":
            return {}
        d, w, n = site.width, self.width(site), len(self.rungs) or site.blocks

        def rung(make: Callable[..., Spec], out: int, into: int, **facts: Any) -> Spec:
            return make(n, out, into, **facts)

        def linear(name: str, out: int, into: int, null: str = "") -> Specs:
            start = functools.partial(uniform, into**-0.5)
            bias = rung(zeros, 1, out, decay=False, null_gradient=null)
            return {name: rung(start, out, into), name + "_bias": bias}

        specs: Specs = {"D_0": kaiming(w, d), "D_0_bias": zeros(w, decay=False)}
        specs |= {**linear("D", w, d), "gate": rung(zeros, 1, 1, decay=False)}
        for name in ("norm1", "norm2"):
            specs |= {name: rung(ones, 1, w, decay=False), name + "_bias": rung(zeros, 1, w, decay=False)}
        for name in ("query", "key", "value", "out"):
            specs |= linear(name, w, w, "a shift of every score leaves the softmax alone" * (name == "key"))
        if site.cross:
            shift = "a shift of every score leaves the softmax alone"
            specs |= {
                "norm_cross": rung(ones, 1, w, decay=False),
                "norm_cross_bias": rung(zeros, 1, w, decay=False),
            }
            specs |= {**linear("cross_query", w, w), **linear("cross_key", w, d, shift)}
            specs |= {**linear("cross_value", w, d), **linear("cross_out", w, w)}
        specs |= {**linear("mlp_up", 4 * w, w), **linear("mlp_down", w, 4 * w)}
        specs |= {"norm": ones(w, decay=False), "norm_bias": zeros(w, decay=False)}
        specs |= {"U": kaiming(d, w), "U_bias": zeros(d, decay=False)}
        return {**specs, "gate_last": zeros(1, decay=False)} if self.merge_base else specs

    def exit(self, t: Tensors, taps: dict[int, Tensor], h: Tensor, at: At) -> Tensor:
        """taps: {block: (rows, tokens, width)}, -1 the embeddings; h: (rows, tokens, width) -> like h"""
        if "U" not in t:
            return h
        s = taps[-1] @ t.D_0.mT + t.D_0_bias
        for i, block in enumerate(self.rungs or range(t.D.shape[0])):
            own = Tensors({name: value[i] for name, value in t.items() if value.dim() == 3})
            mu = torch.sigmoid(own.gate / self.temperature)
            seen = taps.get(block, h.detach())  # where the last block is the end, its output is h
            s = self.block(own, mu * s + (1 - mu) * (seen @ own.D.mT + own.D_bias), i, at)
        new = layer_norm(s, t.norm, t.norm_bias) @ t.U.mT + t.U_bias
        if not self.merge_base:
            return new
        mu = torch.sigmoid(t.gate_last / self.temperature)
        return mu * new + (1 - mu) * h

    def block(self, t: Tensors, s: Tensor, i: int, at: At) -> Tensor:
        """B_i: (rows, tokens, w) -> (rows, tokens, w)"""
        z = layer_norm(s, t.norm1, t.norm1_bias)
        everything = at.history(f"rung {i}", z)
        heads = self.heads_at(at.site)  # type: ignore[arg-type]
        q = split_heads(z @ t.query.mT + t.query_bias, heads)
        k = split_heads(everything @ t.key.mT + t.key_bias, heads)
        v = split_heads(everything @ t.value.mT + t.value_bias, heads)
        o = F.scaled_dot_product_attention(q, k, v, self.seen(q, k, at))
        s = s + o.transpose(-3, -2).flatten(-2) @ t.out.mT + t.out_bias
        if "cross_query" in t and at.memory is not None:
            s = s + self.read(t, layer_norm(s, t.norm_cross, t.norm_cross_bias), at)
        z = layer_norm(s, t.norm2, t.norm2_bias)
        return s + bottleneck(z, t.mlp_up, t.mlp_up_bias, t.mlp_down, t.mlp_down_bias, self.activation)

    def read(self, t: Tensors, z: Tensor, at: At) -> Tensor:
        """Attention to the encoder's states, which stay as the base has them: (rows, tokens, w) -> like z"""
        heads, memory = self.heads_at(at.site), at.memory.detach()  # type: ignore[union-attr]
        q = split_heads(z @ t.cross_query.mT + t.cross_query_bias, heads)
        k = split_heads(memory @ t.cross_key.mT + t.cross_key_bias, heads)
        v = split_heads(memory @ t.cross_value.mT + t.cross_value_bias, heads)
        real = None if at.memory_mask is None else at.memory_mask[:, None, None, :]
        o = F.scaled_dot_product_attention(q, k, v, real)
        return o.transpose(-3, -2).flatten(-2) @ t.cross_out.mT + t.cross_out_bias

    def seen(self, q: Tensor, k: Tensor, at: At) -> Tensor:
        """(rows or 1, 1, queries, keys) bool: real keys, in a causal base those up to the query."""
        queries, keys = q.shape[-2], k.shape[-2]
        seen = torch.ones_like(q[:1, :1, :, :1], dtype=torch.bool).expand(-1, -1, -1, keys)
        if at.site.causal:  # type: ignore[union-attr]
            seen = seen.tril(keys - queries)
        real = at.mask if queries == keys else at.mask_all
        if real is None:
            return seen
        # A padded query sees itself, or its softmax would be over nothing.
        return (seen & real[:, None, None, :]) | seen.triu(keys - queries).tril(keys - queries)
