"""Prefix tuning: learned keys and values before an attention's own. Li and Liang, 2021, arXiv:2101.00190.

    K' = [P_K ; K]        V' = [P_V ; V]        P_K, P_V: (kv_heads, length, head_dim)

Every query sees the whole prefix. The keys are learned as they are compared, after any rotation, so they
have no position; no query is added and outputs keep their length. Even a prefix of zeros takes a share of
the softmax: the model does not begin as its base, and nothing can be merged.

With `projection` both come from a network that trains more stably, and can be dropped once trained:

    [P_K, P_V] = U tanh(D E + b_D) + b_U      E: (length, width)  D: (hidden, width)  U: one a site

An encoder-decoder has a third attention: sites=["attention", "cross_attention"]. E and D are shared by all
sites (AdapterHub keeps one pair a stack of an encoder-decoder, which U makes up for here). Where the text's
positions start is a convention that a rotary or absolute base can tell: at 0 here and in AdapterHub, at
`length` in HF PEFT, which serves the prefix as a cache (`position_offset`). A base that counts by itself
and has a table of learned positions (BART's decoder) reads `position_table` that many rows further; the last
rows are then of no use, and a text that would need them comes out as NaN. A base that adds a bias by distance to its
scores (T5) gives the prefix none here, and in HF PEFT that of keys in front of the text: a frozen `bias` by distance,
which comes with the folders that are read (`distances` says up to which; farther keys get the last).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.edits import (
    At,
    AttentionMethod,
    Method,
    Site,
    Sites,
    Specs,
    Tensors,
    WeightMethod,
    before,
    from_base,
    hyper,
    made_prefix,
    method,
    open_before,
    prefix_tensors,
)
from veneer.errors import BadOption


@method("moved_table", paper="", family="selective", registered=False)
class MovedTable(WeightMethod):
    """W'[p] = W[p + by]: learned positions that start later. It trains nothing."""

    by: int = 0
    sites: Sites = ""

    def weight(self, t: Tensors, W: Tensor) -> Tensor:
        """(positions, width) -> the same shape"""
        return torch.cat([W[self.by :], torch.full_like(W[: self.by], torch.nan)])


@method(
    "prefix_tuning",
    paper="arXiv:2101.00190",
    family="additive/prompt",
    starts_as_identity=False,
    reason="a prefix of any value takes a share of the softmax",
    rates=(3e-4, 3e-2),
)
class PrefixTuning(AttentionMethod):
    length: int = hyper(16, "keys that are added", at_least=1, alias="num_virtual_tokens", size=True)
    projection: bool = hyper(
        False, "make keys and values by a network while training", alias="prefix_projection"
    )
    hidden: int = hyper(512, "width inside that network", at_least=1, alias="encoder_hidden_size")
    position_offset: int = hyper(0, "position of the first token of the text", at_least=0)
    position_table: str = hyper(
        "", "table of positions that is read so much further, where a base counts by itself"
    )
    distances: int = hyper(
        0, "distances whose bias the prefix's keys get, as in HF PEFT; set by reading its folders", at_least=0
    )
    sites: Sites = "attention"

    start_reads_weight = False

    def also(self) -> Sequence[Method]:
        return (MovedTable(self.position_offset, self.position_table),) if self.position_table else ()

    def tensors(self, site: Site) -> Specs:
        found = prefix_tensors(site, self.length, self.hidden if self.projection else 0)
        if self.distances:
            found["bias"] = from_base(site.heads, self.distances, trained=False)
        return found

    def start(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        if self.distances:
            raise BadOption(
                f"prefix_tuning: distances={self.distances} is what the base adds to its scores, which comes with a "
                "folder of HF PEFT and cannot be made anew.",
                next_step="distances=0, or veneer.load(model, folder)",
            )
        return {}

    def derive(self, t: Tensors) -> dict[str, Tensor]:
        """The prefix that the network makes: K and V, (kv_heads, length, head_dim)."""
        return made_prefix(t)

    def attention(self, t: Tensors, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, attend, at: At) -> Tensor:  # type: ignore[no-untyped-def]
        """q: (rows, heads, queries, head_dim), k and v: (rows, kv_heads, keys, head_dim) -> like q"""
        wider = open_before(mask, self.length)
        if "bias" in t:
            wider = torch.cat(
                [self._in_front(t, q, at).to(mask.dtype).expand_as(wider[..., : self.length]), mask], -1
            )
        return attend(q, before(t.K, k), before(t.V, v), wider)

    def _in_front(self, t: Tensors, q: Tensor, at: At) -> Tensor:
        """What is added to the scores of the prefix's keys: (rows or 1, heads, queries, length)"""
        query = at.past + torch.arange(q.shape[-2], device=q.device)[:, None]
        key = torch.arange(-self.length, 0, device=q.device)
        found = t.bias[..., (query - key).clamp(max=self.distances) - 1]
        return found if found.dim() == 4 else found[None]
