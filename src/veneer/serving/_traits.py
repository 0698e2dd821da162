"""What a method needs of the loop that serves it, seen by running it once on a few tokens.

Most edits answer for a token from that token and what came before. Those take a prompt in parts, share what was
computed for a beginning, and run in slots beside all others. An edit that reads where its prompt lies gets it whole.
One that keeps a history, or makes conditions from its input, gets a cache of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from veneer.engine import facts_read, host_of
from veneer.errors import BadFile

from ._alone import Alone

PROBE = 6  # tokens


@dataclass(frozen=True)
class Traits:
    """whole: the prompt goes in at once, and its beginning is not shared. alone: a cache of its own. added: positions
    that it puts before the prompt. attention: it edits attentions. head: it edits what stands behind the backbone."""

    whole: bool = False
    alone: bool = False
    added: int = 0
    attention: bool = False
    head: bool = False


@torch.no_grad()
def traits_of(model: nn.Module, name: str) -> Traits:
    """Run adapter `name` on a few tokens, then on one more; raise where it does not run, or gives no numbers."""
    host = host_of(model)
    adapter = host.adapter(name)
    known = adapter.plan.cache.get("traits")
    if known is not None:
        return known
    prompt = [i % _vocabulary(model) for i in range(3, 3 + PROBE)]
    row = Alone(model, name)
    with facts_read() as read:
        logits = [row.read(prompt)]
        added = row.length - len(prompt)
        logits.append(row.say(prompt[0]))
    if any(bool(torch.isnan(x).any()) for x in logits):
        raise BadFile(
            f"adapter '{name}' gives logits that are no numbers.", next_step="save the adapter again"
        )
    conditional = any("condition" in sp.method.arguments for sp in adapter.plan.sites)
    alone = "history" in read or conditional
    sites = [sp.site for sp in adapter.plan.sites]
    stacks = tuple(f"{name}." for name in host.anatomy.facts.backbones)
    adapter.plan.cache["traits"] = made = Traits(
        bool(read), alone, added,
        attention=any(site.port == "attention" for site in sites),
        head=any(not site.module.startswith(stacks) for site in sites),
    )  # fmt: skip
    return made


def _vocabulary(model: nn.Module) -> int:
    return int(getattr(getattr(model, "config", None), "vocab_size", 0) or 16)
