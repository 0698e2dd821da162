"""UniPELT: a prefix, an adapter and LoRA, each behind a gate. Mao et al., 2022, arXiv:2110.07577.

    attention      K' = [G P_K ; K]    V' = [G P_V ; V]      G = mean over tokens of sigma(w . x + b)
    MLP            y' = y + G U act(D y + b_D) + b_U)        x: what enters the sub-layer
    query, value   y' = W x + g B A x                        g = sigma(w . x + b), a gate for each token

The gates read the input, so the model decides by sentence which of the three to use, and nothing can be
merged. The mean runs over real tokens (the published code counts padding); in a causal base it is the mean
up to each token, which never sees the future and is the same with and without a cache. LoRA's gate stands
in place of alpha / rank, as in the published code. Each gate costs width + 1 numbers and starts near one
half.

B and U start at zero; the prefix takes a share of the softmax whatever its value, so the model does not
begin as its base. The prefix is flat here; the paper makes it by a network while training (`prefix_tuning`
has that).
"""

import torch
from torch import Tensor

from veneer.edits import (
    ACTIVATIONS,
    At,
    Method,
    Site,
    Sites,
    Specs,
    Tensors,
    before,
    bottleneck,
    bottleneck_tensors,
    hyper,
    kaiming,
    masked_mean,
    method,
    normal,
    open_before,
    prefix_tensors,
    running_mean,
    widen,
    zeros,
)

PARTS = {"weight": "gate_lora", "output": "gate_adapter", "attention": "gate_prefix"}


@method(
    "unipelt",
    paper="arXiv:2110.07577",
    family="hybrid/gated",
    starts_as_identity=False,
    reason="a prefix of any value takes a share of the softmax",
    mergeable=False,
    rates=(1e-4, 3e-3),
)
class UniPELT(Method):
    rank: int = hyper(8, "width of LoRA's update", at_least=1, alias="r", size=True)
    length: int = hyper(10, "keys of the prefix", at_least=1, alias="prefix_length")
    reduction: float = hyper(
        16.0, "width of the stream over width of the adapter", more_than=0, alias="reduction_factor"
    )
    activation: str = hyper(
        "swish", "act, between D and U", choices=tuple(ACTIVATIONS), alias="non_linearity"
    )
    sites: Sites = hyper(
        {"weight": "attention.{query,value}", "output": "mlp", "attention": "attention"},
        "where LoRA, the adapter and the prefix stand",
    )

    def tensors(self, site: Site) -> Specs:
        width = site.n_in if site.port == "weight" else site.width
        part = PARTS[site.port]
        gate = {part: normal(0.02, width, decay=False), part + "_bias": zeros(decay=False)}
        if site.port == "weight":
            return {"A": kaiming(self.rank, site.n_in), "B": zeros(site.n_out, self.rank), **gate}
        if site.port == "attention":
            return {**prefix_tensors(site, self.length), **gate}
        return {**bottleneck_tensors(width, max(1, int(width // self.reduction))), **gate}

    def branch(self, t: Tensors, x: Tensor) -> Tensor:
        """What LoRA adds to the output: (..., in) -> (..., out)"""
        return self.token_gate(t, x, "weight") * ((x @ t.A.mT) @ t.B.mT)

    def output(self, t: Tensors, x: Tensor, y: Tensor, at: At) -> Tensor:
        """(rows, tokens, width) -> (rows, tokens, width)"""
        f = bottleneck(y, t.D, t.D_bias, t.U, t.U_bias, self.activation)
        return y + self.gate(t, x, at) * f

    def attention(self, t: Tensors, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, attend, at: At) -> Tensor:
        """q: (rows, heads, queries, head_dim), k and v: (rows, kv_heads, keys, head_dim) -> like q"""
        mask = open_before(mask, self.length)
        gate = self.gate(t, at.hidden, at)[:, None]  # type: ignore[arg-type]
        if not at.site.causal:  # type: ignore[union-attr]
            return attend(q, before(gate * t.K, k), before(gate * t.V, v), mask)
        # A gate for each query cannot be put into keys that all queries share. Twice the width can: the
        # second half of q is G q and meets the prefix alone; that of the output is what G has to scale.
        own_K, own_V = widen(t.K, k.shape[-1]), widen(t.V, v.shape[-1])
        K = before(torch.cat([torch.zeros_like(own_K), own_K], -1), torch.cat([k, torch.zeros_like(k)], -1))
        V = before(torch.cat([torch.zeros_like(own_V), own_V], -1), torch.cat([v, torch.zeros_like(v)], -1))
        own, prefix = attend(torch.cat([q, gate * q], -1), K, V, mask).chunk(2, -1)
        return own + gate * prefix

    def token_gate(self, t: Tensors, x: Tensor, port: str) -> Tensor:
        """(..., width) -> (..., 1)"""
        gate, bias = (getattr(t, PARTS[port] + end) for end in ("", "_bias"))
        return torch.sigmoid((x * gate).sum(-1, keepdim=True) + bias)

    def gate(self, t: Tensors, x: Tensor, at: At) -> Tensor:
        """G: (rows, tokens, width) -> (rows, 1, 1), or (rows, tokens, 1) in a causal base"""
        each = self.token_gate(t, x, at.site.port)  # type: ignore[union-attr]
        if not at.site.causal:  # type: ignore[union-attr]
            return masked_mean(each, at.mask)
        so_far = at.history("gate", each)
        mask = at.mask if so_far.shape[-2] == each.shape[-2] else at.mask_all
        return running_mean(so_far, mask)[..., -each.shape[-2] :, :]
