"""LLaMA-Adapter: gated attention to learned prompts. Zhang et al., 2023, arXiv:2303.16199.

    o = softmax(q K^T + mask) V + g softmax(q K_A^T) V_A    K_A = A W_K^T,  V_A = A W_V^T,  A: (length, width)

A goes through the site's own frozen projections, is not rotated, and is seen by every query; its softmax is
its own, so the text's attention is not diluted. g = tanh(gate), one gate a head, starts at 0: an adapted
model begins as its base model, bit for bit, and the prompts begin to learn once the gates have moved. The
last 30 blocks by default.

HF PEFT has one gate a block, without tanh, and adds behind the output projection (`gate="layer"`); for a
projection without bias that is the same place. Its GPT-2 form, which leaves that projection out, is another
method. The gated part depends on q, so nothing can be merged.
"""

import torch
from torch import Tensor

from veneer.edits import At, AttentionMethod, Site, Sites, Specs, Tensors, hyper, method, normal, widen, zeros


@method("llama_adapter", paper="arXiv:2303.16199", family="additive/prompt", rates=(1e-3, 3e-2))
class LlamaAdapter(AttentionMethod):
    length: int = hyper(10, "rows of A", at_least=1, alias="adapter_len", size=True)
    gate: str = hyper(
        "head_tanh", "one tanh gate a head, or one plain gate a site", choices=("head_tanh", "layer")
    )
    sites: Sites = "block[-30:].attention"

    def tensors(self, site: Site) -> Specs:
        gates = (site.heads,) if self.gate == "head_tanh" else ()
        return {
            "prompt": normal(1.0, self.length, site.width, decay=False),
            "gate": zeros(*gates, decay=False),
        }

    def attention(self, t: Tensors, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, attend, at: At) -> Tensor:
        """q: (rows, heads, queries, head_dim), k and v: (rows, kv_heads, keys, head_dim) -> like q"""
        K, V = (self.projected(role, t.prompt, q.shape[0], at) for role in ("key", "value"))
        K, V = widen(K, k.shape[-1]), widen(V, v.shape[-1])
        seen = torch.ones_like(q[:1, :1, :, :1], dtype=torch.bool).expand(-1, -1, -1, self.length)
        if self.gate == "head_tanh":
            gate = t.gate.tanh().reshape(-1, q.shape[1], 1, 1)
        else:
            gate = t.gate.reshape(-1, 1, 1, 1)
        return attend(q, k, v, mask) + gate * attend(q, K, V, seen)

    def projected(self, role: str, prompt: Tensor, rows: int, at: At) -> Tensor:
        """(length, width) -> (rows, kv_heads, length, head_dim)"""
        z = at.project(role, prompt).transpose(-3, -2)
        return z.expand(rows, *z.shape[-3:])
