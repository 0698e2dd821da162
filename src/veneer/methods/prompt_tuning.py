"""Prompt tuning: learned rows before the embedded text. Lester et al., 2021, arXiv:2104.08691.

    [p_1, ..., p_length ; e(x)]        prompt: (length, width)

The rows stand before the first real token, on whichever side the padding is; masks, labels and positions
follow, and outputs keep the length of the text. In an encoder-decoder they go to the encoder. A longer
sequence is a longer attention in every block, and `length` places of the cache.

What the prompt starts from decides how well it trains: rows of the vocabulary (`init="vocabulary"`: drawn
among the first `frequent` ones, which common vocabularies sort by frequency; `init_ids`: those of a text
that states the task) or uniform numbers of at most 0.5, as in the paper. HF PEFT draws from N(0, 1), far
larger than an embedding. The paper trains with a rate of 0.3 (Adafactor) and no decay.
"""

import torch
from torch import Tensor

from veneer.edits import At, Site, Sites, Specs, Tensors, TokensMethod, dropout, hyper, method, uniform


@method(
    "prompt_tuning",
    paper="arXiv:2104.08691",
    family="additive/prompt",
    starts_as_identity=False,
    reason="a prompt of any value is read by attention",
    rates=(1e-3, 3e-1),
)
class PromptTuning(TokensMethod):
    length: int = hyper(20, "rows that are added", at_least=1, alias="num_virtual_tokens", size=True)
    init: str = hyper("vocabulary", "what the rows start from", choices=("vocabulary", "uniform"))
    frequent: int = hyper(5000, "the start is drawn among this many first rows of the vocabulary", at_least=1)
    init_ids: tuple[int, ...] = hyper(
        (), "token ids whose embeddings are the start, repeated or cut to `length`"
    )
    place: str = hyper(
        "first", "before the first token, or behind it (a class token)", choices=("first", "after_first")
    )
    dropout: float = hyper(0.0, "share of the prompt that is dropped in training", at_least=0, at_most=1)
    sites: Sites = "embedding"

    def tensors(self, site: Site) -> Specs:
        return {"prompt": uniform(0.5, self.length, site.width, decay=False)}

    def start(self, site: Site, W: Tensor | None, t: Tensors) -> dict[str, Tensor]:
        """W: (vocabulary, width), the table of token embeddings; None where the base has none."""
        if W is None or W.shape[-1] != site.width or (self.init == "uniform" and not self.init_ids):
            return {}
        if self.init_ids:
            ids = torch.tensor(self.init_ids).repeat(-(-self.length // len(self.init_ids)))
            return {"prompt": W[ids[: self.length]]}
        # The uniform draw from the adapter's own seed says which rows: no other randomness is needed.
        share = (t.prompt[:, 0].double() + 0.5).clamp(0, 1 - 1e-9)
        return {"prompt": W[(share * min(self.frequent, W.shape[0])).long()]}

    def tokens(self, t: Tensors, at: At) -> Tensor:
        """-> (length, width)"""
        return dropout(t.prompt, self.dropout, at)
