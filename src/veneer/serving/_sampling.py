"""Choosing tokens: all rows of a step at once, each row as if it were alone.

Every row draws from a generator of its own, so that its text depends on its seed, prompt and adapter, and not on who
runs beside it. Penalties are those of transformers (repetition) and of OpenAI's API (presence, frequency).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._request import Logprob, Sampling

_seeds = itertools.count(1)
HEAD = 1024  # likeliest tokens that are looked at before a whole vocabulary is put in order


@dataclass
class Chooser:
    """What choosing needs to know of one row. `ends`: tokens that end a text, kept out before `min_tokens`."""

    sampling: Sampling
    prompt: frozenset[int]
    ends: tuple[int, ...]
    counts: Counter[int] = field(default_factory=Counter)  # tokens chosen so far
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.generator.manual_seed(torch.seed() ^ next(_seeds) if seed is None else seed)

    @property
    def length(self) -> int:
        return self.counts.total()

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the logits as they are is the answer."""
        s = self.sampling
        return s.temperature <= 0 and not self._changes

    @property
    def _changes(self) -> bool:
        s = self.sampling
        penalised = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
        return bool(penalised or s.logit_bias or self.length < s.min_tokens)


def choose(logits: Tensor, rows: Sequence[Chooser]) -> tuple[list[int], list[Logprob | None]]:
    """A token for each row, and what was asked about its probability. logits: (rows, vocabulary)."""
    logits = logits.float()
    told = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    plain = logits.log_softmax(-1) if told else logits
    if all(row.plain for row in rows):
        tokens = logits.argmax(-1).tolist()
    else:
        changed = logits.clone()
        for i, row in enumerate(rows):
            if row._changes:
                _change(changed[i], row)
        tokens = changed.argmax(-1).tolist()
        drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
        if drawn:
            for i, token in zip(drawn, _draw(changed[drawn], [rows[i] for i in drawn])):
                tokens[i] = token
    found: list[Logprob | None] = [None] * len(rows)
    for i in told:
        found[i] = _told(plain[i], tokens[i], rows[i].sampling.logprobs or 0)
    for row, token in zip(rows, tokens):
        row.counts[token] += 1
    return tokens, found


def _change(logits: Tensor, row: Chooser) -> None:
    """Penalties, biases and what may not come yet, in place. logits: (vocabulary,)"""
    s = row.sampling
    device = logits.device
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted(row.prompt | row.counts.keys()), device=device)
        own = logits[seen]
        logits[seen] = torch.where(own > 0, own / s.repetition_penalty, own * s.repetition_penalty)
    if row.counts and (s.presence_penalty or s.frequency_penalty):
        seen = torch.tensor(list(row.counts), device=device)
        often = torch.tensor(list(row.counts.values()), device=device, dtype=logits.dtype)
        logits[seen] -= s.presence_penalty + s.frequency_penalty * often
    for token, bias in s.logit_bias.items():
        if 0 <= token < logits.shape[0]:
            logits[token] += bias
    if row.length < s.min_tokens and row.ends:
        logits[torch.tensor(row.ends, device=device)] = -torch.inf


def _draw(logits: Tensor, rows: Sequence[Chooser]) -> list[int]:
    """Drawn by the inverse of the distribution function, with one number a row from its own generator.

    In which order a row's tokens are gone through depends on that row alone: as they are numbered where nothing is cut
    off, else likeliest first, the likeliest HEAD of them where those hold all that is left.
    """
    device = logits.device
    temperature = torch.tensor([r.sampling.temperature for r in rows], device=device)
    scaled = logits / temperature[:, None]
    u = torch.stack([torch.rand((), generator=r.generator, dtype=torch.float64) for r in rows]).to(device)
    found = [0] * len(rows)

    def draw(where: list[int], head: int | None) -> list[int]:
        """The rows that `where` numbers; those whose cut reaches beyond the head are left for another turn."""
        own, cuts = scaled[where], [rows[i] for i in where]
        if head is None:
            p, order = own.double().softmax(-1), None
            inside = [True] * len(where)
        else:
            best, order = (
                own.topk(head) if head < own.shape[1] else own.sort(dim=-1, descending=True, stable=True)
            )
            p = (best.double() - own.double().logsumexp(-1, keepdim=True)).exp()
            kept, whole = _kept(p, cuts, own.shape[1])
            p, inside = p * kept, whole.tolist()
        for i, token, good in zip(where, _at(p, u[where], order), inside):
            if good:
                found[i] = token
        return [i for i, good in zip(where, inside) if not good]

    cut = [i for i, r in enumerate(rows) if r.sampling.top_k or r.sampling.top_p < 1 or r.sampling.min_p]
    free = [i for i in range(len(rows)) if i not in set(cut)]
    if free:
        draw(free, None)
    if cut:
        cut = draw(cut, min(HEAD, logits.shape[1]))
    if cut:
        draw(cut, logits.shape[1])
    return found


def _at(p: Tensor, u: Tensor, order: Tensor | None) -> list[int]:
    """The tokens at which the sums of p (rows, tokens) pass u (rows,) of the whole."""
    total = p.cumsum(-1)
    place = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True)
    # Rounding may point behind the last token that has any probability.
    last = (p > 0).long().mul(torch.arange(p.shape[1], device=p.device)).amax(-1, keepdim=True)
    place = torch.minimum(place, last)
    return (place if order is None else order.gather(-1, place))[:, 0].tolist()


def _kept(p: Tensor, rows: Sequence[Chooser], vocabulary: int) -> tuple[Tensor, Tensor]:
    """What top_k, top_p and min_p leave of each row's likeliest tokens, (rows, tokens) bool; and of which rows that is
    all that they leave of the whole vocabulary, (rows,) bool. p: likeliest first; the first always stays."""
    device = p.device
    k = torch.tensor([r.sampling.top_k or vocabulary for r in rows], device=device)
    top_p = torch.tensor([r.sampling.top_p for r in rows], device=device, dtype=p.dtype)
    min_p = torch.tensor([r.sampling.min_p for r in rows], device=device, dtype=p.dtype)
    rank = torch.arange(p.shape[1], device=device)
    keep = rank[None] < k[:, None]
    before = (p * keep).cumsum(-1) - p * keep
    share = torch.where(k[:, None] <= p.shape[1], (p * keep).sum(-1, keepdim=True), torch.ones_like(p[:, :1]))
    keep = keep & ((before < top_p[:, None] * share) | (top_p[:, None] >= 1))
    keep = keep & (p >= min_p[:, None] * p[:, :1])
    keep[:, 0] = True
    return keep, ~keep[:, -1] | (k <= p.shape[1]) | (p.shape[1] == vocabulary)


def _told(logprobs: Tensor, token: int, count: int) -> Logprob:
    value, index = logprobs.topk(min(count, logprobs.shape[0])) if count else ((), ())
    top = tuple((int(t), float(x)) for t, x in zip(index, value))
    return Logprob(token, float(logprobs[token]), top)
