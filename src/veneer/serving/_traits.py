"""What a method needs of the loop that serves it, seen by running it once on a few tokens.

Most edits answer for a token from that token and what came before. Those take a prompt in parts, share what was
computed for a beginning, and run in slots beside all others. An edit that reads where its prompt lies gets it whole.
One that keeps a history, or makes conditions from its input, gets a cache of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from veneer.engine import begin, facts_read, host_of, within
from veneer.errors import BadFile

PROBE = 6  # tokens


@dataclass(frozen=True)
class Traits:
    """whole: the prompt goes in at once, and its beginning is not shared. alone: a cache of its own. added: positions
    that it puts before the prompt."""

    whole: bool = False
    alone: bool = False
    added: int = 0


@torch.no_grad()
def traits_of(model: nn.Module, name: str) -> Traits:
    """Run adapter `name` on a few tokens, then on one more; raise where it does not run, or gives no numbers."""
    host = host_of(model)
    adapter = host.adapter(name)
    known = adapter.plan.cache.get("traits")
    if known is not None:
        return known
    ids = torch.arange(3, 3 + PROBE, device=host.device)[None] % _vocabulary(model)
    session, inputs = begin(model, [name], {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with facts_read() as read, within(session):
        out = model(**inputs, use_cache=True)
        cache = out.get("past_key_values")
        if cache is not None:
            mask = torch.ones(1, inputs["attention_mask"].shape[1] + 1, dtype=torch.long, device=host.device)
            out = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
    if not torch.isfinite(out.logits).all():
        raise BadFile(
            f"adapter '{name}' gives logits that are no numbers.", next_step="save the adapter again"
        )
    conditional = any("condition" in sp.method.arguments for sp in adapter.plan.sites)
    alone = "history" in read or conditional
    added = inputs["attention_mask"].shape[1] - ids.shape[1]
    adapter.plan.cache["traits"] = made = Traits(bool(read), alone, added)
    return made


def _vocabulary(model: nn.Module) -> int:
    return int(getattr(getattr(model, "config", None), "vocab_size", 0) or 16)
