"""Q-PEFT: a prompt made from the query and the document, for reranking. Peng et al., 2024, arXiv:2404.04522.

    score(q, d) = mean log P(q | prompt, hints(q, d), d)          by a frozen language model

    retrieve    the k tokens of d that are most similar to a token of q, in the order of the text:
                e + up relu(down e + b) + c                       e: the token's embedding, up starts at zero
    attend      a hint for each token of q:
                output softmax((query E_q)(key E_d)^T) value E_d  heads of it, at width `rank`

Before the text stand `length` learned rows, then the hints. The call brings `query_ids` and `document_ids`,
(rows, tokens), each with a mask (`query_mask`, `document_mask`) where rows differ in length. No gradient
reaches the similarity: of "retrieve" only the network and the learned rows train, of "attend" everything.

The query is scored, so hints that contain its tokens make the score a measure of lexical overlap:
`exclude_query` leaves them out (the paper's filter "q"), and scores of different queries are not
comparable. The published code trains a copy of the whole vocabulary and square matrices besides, 230 M
numbers beside a 7 B base; the matrices here have `rank` rows and the vocabulary stays frozen. A row with
fewer hints than others has fewer tokens in front of it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.edits import (
    At,
    Site,
    Sites,
    Specs,
    Tensors,
    TokensMethod,
    bottleneck,
    hyper,
    kaiming,
    method,
    split_heads,
    uniform,
    zeros,
)
from veneer.errors import BadOption


@method(
    "q_peft",
    paper="arXiv:2404.04522",
    family="additive/prompt",
    starts_as_identity=False,
    reason="hints of any value are read by attention",
    certainty="B",
    rates=(1e-3, 3e-2),
)
class QPEFT(TokensMethod):
    variant: str = hyper("retrieve", "Q-PEFT-R or Q-PEFT-A", choices=("retrieve", "attend"))
    length: int = hyper(10, "learned rows before the hints", at_least=0, alias="num_virtual_tokens")
    k: int = hyper(5, "tokens of the document that are retrieved", at_least=1)
    rank: int = hyper(32, "width of the network, or of the attention", at_least=1, size=True)
    heads: int = hyper(2, "heads of the attention", at_least=1)
    exclude_query: bool = hyper(True, "retrieve no token that the query has")
    sites: Sites = "embedding"
    inputs = ("query_ids", "document_ids", "query_mask", "document_mask")

    def tensors(self, site: Site) -> Specs:
        d, r = site.width, self.rank
        specs: Specs = {}
        if self.length:
            specs["prompt"] = uniform(0.5, self.length, d, decay=False)
        if self.variant == "retrieve":
            specs |= {"down": kaiming(r, d), "down_bias": zeros(r, decay=False)}
            return {**specs, "up": zeros(d, r), "up_bias": zeros(d, decay=False)}
        for name in ("query", "key", "value"):
            specs |= {
                name: kaiming(r, d),
                name + "_bias": zeros(r, decay=False, null_gradient=NULL.get(name, "")),
            }
        return {**specs, "output": kaiming(d, r), "output_bias": zeros(d, decay=False)}

    def condition(self, t: Tensors, inputs: dict, at: At) -> dict[str, Tensor]:
        """{"hints": (rows, hints, width)} from the ids of the query and of the document"""
        if "query_ids" not in inputs or "document_ids" not in inputs or "embed" not in inputs:
            raise BadOption(
                f"q_peft makes its prompt from query_ids and document_ids; the call has {', '.join(inputs)}.",
                next_step="model(**batch, query_ids=..., document_ids=...), on a base that reads token ids",
            )
        query, document = inputs["query_ids"], inputs["document_ids"]
        asked, real = (_mask(inputs.get(n + "_mask"), inputs[n + "_ids"]) for n in ("query", "document"))
        E_q, E_d = inputs["embed"](query), inputs["embed"](document)
        if self.variant == "attend":
            hints, found = self.attended(t, E_q, E_d, real), asked
        else:
            if self.exclude_query:
                real = real & ~((document[:, :, None] == query[:, None, :]) & asked[:, None, :]).any(-1)
            place, found = self.retrieved(E_q, E_d, asked, real)
            e = torch.take_along_dim(E_d, place[..., None], -2)
            hints = e + bottleneck(e, t.down, t.down_bias, t.up, t.up_bias, "relu")
        return {"hints": hints * found[..., None], "found": found}

    def attended(self, t: Tensors, E_q: Tensor, E_d: Tensor, real: Tensor) -> Tensor:
        """(rows, tokens of the query, width)"""
        q = split_heads(E_q @ t.query.mT + t.query_bias, self.heads)
        k, v = (
            split_heads(E_d @ getattr(t, n).mT + getattr(t, n + "_bias"), self.heads)
            for n in ("key", "value")
        )
        o = F.scaled_dot_product_attention(q, k, v, real[:, None, None, :])
        return o.transpose(-3, -2).flatten(-2) @ t.output.mT + t.output_bias

    def retrieved(self, E_q: Tensor, E_d: Tensor, asked: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, k): places in the document, in its order, and whether each holds a hint"""
        with torch.no_grad():
            same = F.normalize(E_d, dim=-1) @ F.normalize(E_q, dim=-1).mT
            score = same.masked_fill(~asked[:, None, :], -torch.inf).amax(-1).masked_fill(~real, -torch.inf)
            tokens = score.shape[-1]
            best = F.pad(score, (0, max(0, self.k - tokens)), value=-torch.inf).topk(self.k, -1)
            place = best.indices.masked_fill(best.values == -torch.inf, tokens).sort(-1).values
            return place.clamp(max=tokens - 1), place < tokens

    def tokens(self, t: Tensors, at: At) -> Tensor | tuple[Tensor, Tensor]:
        """-> (rows, length + hints, width), and which of them each row has: a row may have fewer hints"""
        hints, found = at.conditions["hints"], at.conditions.get("found")
        if self.length:
            hints = torch.cat([t.prompt.to(hints.dtype).expand(hints.shape[0], -1, -1), hints], -2)
        if found is None:
            return hints
        return hints, torch.nn.functional.pad(found, (self.length, 0), value=True)


NULL = {"key": "a shift of every score leaves the softmax alone"}


def _mask(mask: Tensor | None, ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
