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

About 12 w^2 + width w numbers a rung, and 2 w^2 + 2 width w more where it reads an encoder. As in the paper
(section 3.2) the B_i begin as the base's own blocks, pruned to width w: the same features of the stream in
every rung, equally many of each head. They are chosen by magnitude, where the paper weighs by Fisher
information and so needs data. Where the shapes do not map (fewer keys than queries, gated MLPs) the rungs
begin new, and the plan says so. In an encoder-decoder the ladder stands beside the decoder; the paper gives
the encoder one too. The blocks have no position embedding: positions are in the h_i.
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

Blocks = Callable[[str], list[Tensor]]  # role -> the weights (out, in) of the base's blocks


def shape(W: Tensor) -> tuple[int, ...]:
    return tuple(W.shape)


def strength(W: Tensor, axis: int) -> Tensor:
    """(out, in) -> the sum of magnitudes over an axis"""
    return W.abs().sum(axis)


def strongest(score: Tensor, count: int, groups: int = 1) -> Tensor:
    """(n,) -> (count,) indices in order, equally many from each of the groups of neighbours."""
    each = score.view(groups, -1).topk(count // groups, dim=1).indices.sort(1).values
    return (each + torch.arange(groups, device=score.device)[:, None] * (len(score) // groups)).flatten()


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
    begin: str = hyper("pruned", "the rungs: cut from the base's blocks, or new", choices=("pruned", "new"))
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

    start_reads_weight = False

    def start(self, site: Site, blocks: Blocks) -> dict[str, Tensor]:
        """Rungs cut out of the base's blocks, the strongest rows and columns, where the shapes map."""
        return self.cut(site, blocks) if self.remark(site, blocks).endswith("blocks") else {}

    def remark(self, site: Site, blocks: Blocks) -> str:
        """How the rungs begin, for the plan."""
        if site.stack == "encoder":
            return ""
        if self.begin == "new":
            return "the rungs begin new"
        d, w = site.width, self.width(site)
        square = [blocks(f"attention.{part}") for part in ("query", "key", "value", "output")]
        up, down = blocks("mlp.up"), blocks("mlp.down")
        if self.heads_at(site) != (site.heads or 1) or any(
            not W or {*map(shape, W)} != {(d, d)} for W in square
        ):
            return "the rungs begin new: the base's attentions are no square matrices with as many heads"
        if not up or not down or blocks("mlp.gate") or min(len(W) for W in up) < 4 * w:
            return "the rungs begin new: the base's MLPs are gated, or narrower than the rungs'"
        return "the rungs begin as pruned blocks"

    def cut(self, site: Site, blocks: Blocks) -> dict[str, Tensor]:
        w, heads = self.width(site), self.heads_at(site)
        q, k, v, o = (blocks(f"attention.{part}") for part in ("query", "key", "value", "output"))
        up, down = blocks("mlp.up"), blocks("mlp.down")
        # The stream's features are the same ones in every rung: what reads them and what writes them counts.
        stream = [*(strength(W, 0) for W in (*q, *k, *v, *up)), *(strength(W, 1) for W in (*o, *down))]
        kept = strongest(torch.stack(stream).sum(0), w)
        found: dict[str, list[Tensor]] = {}
        for i in self.rungs or range(site.blocks):
            scores = strongest(strength(q[i], 1) + strength(k[i], 1), w, heads)
            values = strongest(strength(v[i], 1) + strength(o[i], 0), w, heads)
            hidden = strongest(strength(up[i], 1) + strength(down[i], 0), 4 * w)
            made = {
                "query": q[i][scores][:, kept], "key": k[i][scores][:, kept], "value": v[i][values][:, kept],
                "out": o[i][kept][:, values], "mlp_up": up[i][hidden][:, kept], "mlp_down": down[i][kept][:, hidden],
            }  # fmt: skip
            for name, W in made.items():
                found.setdefault(name, []).append(W)
        return {name: torch.stack(W) for name, W in found.items()}

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
