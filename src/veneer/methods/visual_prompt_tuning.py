"""Visual prompt tuning: learned rows behind the class token. Jia et al., 2022, arXiv:2203.12119.

    shallow    [class ; p ; patches] enters the first block        p: (length, width)
    deep       and before each later block l the outputs at p's places are thrown away for p_l

The class token stays first, so a head that reads it finds it; the rows have no position embedding. Deep
prompts cost length x width numbers a block. Both start uniform in +-sqrt(6 / (3 patch^2 + width)), the
bound of a patch embedding. The paper keeps the base in evaluation mode (no dropout) while it trains. A base
without a class token, or with windows, needs a rule of its own: there the rows stand behind the first
patch.
"""

import torch
from torch import Tensor

from veneer.edits import At, Method, Site, Sites, Specs, Tensors, dropout, hyper, method, uniform


@method(
    "visual_prompt_tuning",
    paper="arXiv:2203.12119",
    family="additive/prompt",
    starts_as_identity=False,
    reason="a prompt of any value is read by attention",
    rates=(1e-3, 3e-1),
)
class VisualPromptTuning(Method):
    length: int = hyper(5, "rows that are added", at_least=1, alias="num_virtual_tokens", size=True)
    deep: bool = hyper(False, "write new rows before every later block as well")
    patch: int = hyper(16, "side of the patches in pixels; sets the bound of the start", at_least=1)
    dropout: float = hyper(0.0, "share of the rows that is dropped in training", at_least=0, at_most=1)
    sites: Sites = hyper(
        {"tokens": "embedding", "input": "block[1:]"}, "where rows are put in, and where they are renewed"
    )
    place = "after_first"

    def tensors(self, site: Site) -> Specs:
        if site.port == "input" and (not self.deep or site.stack == "decoder"):
            return {}
        bound = (6 / (3 * self.patch**2 + site.width)) ** 0.5
        return {"prompt": uniform(bound, self.length, site.width, decay=False)}

    def tokens(self, t: Tensors, at: At) -> Tensor:
        """-> (length, width)"""
        return dropout(t.prompt, self.dropout, at)

    def input(self, t: Tensors, x: Tensor, at: At) -> Tensor:
        """What enters a later block, (rows, tokens, width), with the block's own rows at the added places."""
        if "prompt" not in t or at.added is None:
            return x
        rows = dropout(t.prompt, self.dropout, at).expand(x.shape[0], -1, -1)
        number = (at.added.long().cumsum(-1) - 1).clamp(0, self.length - 1)[..., None]
        return torch.where(at.added[..., None], torch.take_along_dim(rows, number, -2), x)
