"""The bias that a base adds to its scores by the distance between a query and a key, asked of the base itself.

Which distance gets which bias is code inside of an attention. So one text is run, longer than any distance that the
base tells from the next, and what its last token adds to each key is written down.
"""

from __future__ import annotations

import inspect
import warnings
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from veneer.edits import AttentionMethod, Sites, Specs, method
from veneer.engine import Host, active, attach

_LONGEST = 1024
_seen: ContextVar[dict[str, Tensor] | None] = ContextVar("seen", default=None)


@method("scores_seen", paper="", family="additive/prompt", registered=False)
class ScoresSeen(AttentionMethod):
    """Edits nothing: it keeps what is added to the scores of the last two queries."""

    sites: Sites = "attention"

    def tensors(self, site: Any) -> Specs:
        return {}

    def attention(
        self, t: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, attend: Any, at: Any
    ) -> Tensor:
        """q, k, v: (rows, heads, tokens, head_dim) -> like q"""
        seen = _seen.get()
        if seen is not None:
            seen[at.site.module] = mask[0, :, -2:].detach().clone()
        return attend(q, k, v, mask)


def biases_by_distance(host: Host, sites: str, owner: str) -> dict[str, Tensor]:
    """Attention -> (heads, distances): what is added for a key 1, 2, .. places in front of the query.

    The last of them holds for every greater distance. {} where the base adds no such thing, or cannot be asked.
    owner: the module that runs the blocks of `sites` by itself.
    """
    length = 257
    while length <= _LONGEST + 1:
        rows = _rows(host, sites, owner, length)
        if not rows or not all(_by_distance(r) for r in rows.values()):
            return {}
        found = {name: r[:, 1, :-1].flip(-1) for name, r in rows.items()}
        if all(bool((b[:, -(length // 4) :] == b[:, -1:]).all()) for b in found.values()):
            return {name: b.cpu() for name, b in found.items()}
        length = 2 * length - 1
    return {}


def _by_distance(rows: Tensor) -> bool:
    """Whether the last query adds to each key what the one before it added to the key before. rows: (heads, 2, n)"""
    return rows.is_floating_point() and torch.allclose(rows[:, 1, 1:], rows[:, 0, :-1], rtol=1e-5, atol=1e-6)


def _rows(host: Host, sites: str, owner: str, length: int) -> dict[str, Tensor]:
    module, name = host.module(owner), "veneer.interop.distances"
    given = {
        "inputs_embeds": torch.zeros(
            1, length, host.anatomy.facts.width, dtype=host.dtype, device=host.device
        )
    }
    if "encoder_hidden_states" in inspect.signature(module.forward).parameters:
        given["encoder_hidden_states"] = given["inputs_embeds"][:, :1]
    seen: dict[str, Tensor] = {}
    attach(host.root, ScoresSeen(sites), name, activate=False)
    token, training = _seen.set(seen), host.root.training
    try:
        host.root.eval()
        with active(host.root, name), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module(**given)
    except (RuntimeError, TypeError, ValueError, IndexError):  # a stack that takes neither, or no such length
        return {}
    finally:
        host.root.train(training)
        _seen.reset(token)
        host.drop(name)
    return seen
