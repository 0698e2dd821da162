"""At: the facts that a method's function may ask of its rows.

Made by the engine for one call, then frozen. A method sees facts of its own rows only, in the order in which it
sees x, y, q, k and v.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from veneer.anatomy import Site
from veneer.errors import BadOption, Unsupported


@dataclass(frozen=True)
class At:
    """Facts of the rows of one call at one site. Tensors are None where the call does not tell."""

    site: Site = None  # type: ignore[assignment]  # the engine always says which
    training: bool = False
    past: int = 0  # tokens in the cache before this call; 0 in training and prefill
    mask: Tensor | None = None  # (rows, tokens of this call) bool: True where the token is real
    mask_all: Tensor | None = None  # (rows, tokens so far) bool
    prompt: Tensor | None = None  # (rows, tokens) bool: the prompt's real tokens; all False once past > 0
    added: Tensor | None = None  # (rows, tokens) bool: positions that a `tokens` edit added
    tasks: Tensor | None = None  # (rows,) int: the task of each row
    ids: Tensor | None = None  # (rows, tokens): token ids as given, where there are any
    memory: Tensor | None = (
        None  # a decoder: the encoder's states that it reads, (rows, source tokens, width)
    )
    memory_mask: Tensor | None = None  # (rows, source tokens) bool: True where they are real
    hidden: Tensor | None = None  # attention: what entered the module, (rows, tokens, width)
    conditions: Mapping[str, Tensor] = field(default_factory=dict)  # what `condition` returned, by row
    inputs: Mapping[str, Any] = field(default_factory=dict)  # other named inputs of the call, as given
    members: tuple[Callable[..., Tensor], ...] = ()  # edits of the adapters named by `of=`, at this site
    step: int = 0  # optimiser steps done
    _project: Callable[[str, Tensor], Tensor] | None = None
    _history: Callable[[str, Tensor], Tensor] | None = None
    _bare: Callable[..., Any] | None = None
    _dropout: Callable[[Tensor, float], Tensor] | None = None
    _norm: Callable[[Tensor], Tensor] | None = None

    def project(self, role: str, z: Tensor) -> Tensor:
        """The site's own frozen projection before rotary, "query", "key" or "value".

        (..., width) -> (..., heads, head_dim)
        """
        if self._project is None:
            raise Unsupported(
                f"at.project('{role}') is there in `attention` only (site '{self.site and self.site.name}').",
                next_step="call it in `attention`, or declare a projection in `tensors`",
            )
        return self._project(role, z)

    def norm(self, h: Tensor) -> Tensor:
        """The block's own norm of residual and output, where one reads their sum; else h: any shape -> the same.

        It is the base's, as it stands: frozen, and without the edits of any adapter.
        """
        return h if self._norm is None else self._norm(h)

    def history(self, key: str, x: Tensor) -> Tensor:
        """x of this call -> x of all tokens so far, kept beside the cache and reordered with it."""
        return x if self._history is None else self._history(key, x)

    def bare(self, **inputs: Any) -> Any:
        """The bare base's output for `inputs`."""
        if self._bare is None:
            raise Unsupported(
                "at.bare(...) is there in `condition` only.",
                next_step="call it in `condition`, and read at.conditions[...] here",
            )
        return self._bare(**inputs)

    def positions(self, expression: str, length: int, device: Any = None, rows: int | None = None) -> Tensor:
        """(rows or 1, length) bool mask of `expression`.

        "all"; "prompt"; "prompt[:p]", "prompt[-s:]" and sums of them. Positions are counted on real tokens, so
        padding on either side changes nothing. With p + s over the prompt's length n each end takes at most
        n // 2 of the prompt, and no token is taken twice.
        """
        first, last, whole = parse_positions(expression)
        if whole == "all":
            return torch.ones(1, length, dtype=torch.bool, device=device)
        prompt = self.prompt
        if prompt is None:
            if self.past > 0:
                return torch.zeros(1, length, dtype=torch.bool, device=device)
            prompt = torch.ones(1, length, dtype=torch.bool, device=device)
        if whole == "prompt" or self.past > 0:
            return prompt
        order = prompt.long().cumsum(-1)  # 1-based index of each real prompt token
        count = order[..., -1:]
        cap = torch.where(count < first + last, count // 2, count) if first and last else count
        take_first = torch.minimum(torch.full_like(count, first), cap) if first else torch.zeros_like(count)
        take_last = torch.minimum(torch.full_like(count, last), cap) if last else torch.zeros_like(count)
        return prompt & ((order <= take_first) | (order > count - take_last))

    def where(self, expression: str, new: Tensor, old: Tensor) -> Tensor:
        """`new` at the positions of `expression`, `old` elsewhere: (..., tokens, width)."""
        # A base without tokens has one place a row, and no facts of a prompt: (rows, width), or a row axis and one.
        if expression == "all" or (
            self.prompt is None and self.past == 0 and (old.dim() < 3 or old.shape[-2] == 1)
        ):
            return new
        mask = self.positions(expression, old.shape[-2], old.device)
        return torch.where(mask[..., None], new, old)

    def nowhere(self, expression: str) -> bool:
        """True where no token of this call can be at `expression`: a decode step of a prompt edit."""
        return expression != "all" and self.past > 0

    def with_(self, **facts: Any) -> At:
        """The same facts, some of them changed."""
        if torch.compiler.is_compiling():
            return replace(self, **facts)
        made = object.__new__(
            type(self)
        )  # what `replace` does, at a tenth of its cost: this runs at every site
        made.__dict__.update(self.__dict__)
        made.__dict__.update(facts)
        return made


_TERM = re.compile(r"prompt\[(?:(:)(\d+)|(-\d+)(:))\]")


def parse_positions(expression: str) -> tuple[int, int, str]:
    """ "prompt[:4] + prompt[-4:]" -> (4, 4, ""); "all" -> (0, 0, "all"); "prompt" -> (0, 0, "prompt")."""
    text = expression.replace(" ", "")
    if text in ("all", "prompt"):
        return 0, 0, text
    first = last = 0
    for term in text.split("+"):
        found = _TERM.fullmatch(term)
        if not found:
            raise BadOption(
                f"positions={expression!r}: '{term}' is not a position.",
                nearest=("all", "prompt", "prompt[:4]", "prompt[-4:]", "prompt[:4] + prompt[-4:]"),
                next_step="positions='prompt[:4] + prompt[-4:]'",
            )
        if found.group(1):
            first = max(first, int(found.group(2)))
        else:
            last = max(last, -int(found.group(3)))
    return first, last, ""
