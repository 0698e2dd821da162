"""Building blocks: what several methods need, as pure functions that broadcast over a leading row axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.anatomy import Site
from veneer.errors import BadOption

from ._method import Method, Sites, WeightMethod, method
from ._spec import Specs, from_base, kaiming, normal, truncated_normal, uniform, zeros
from ._tensors import Tensors

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "swish": F.silu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": lambda x: x,
    "leaky_relu": F.leaky_relu,
}  # fmt: skip


def bottleneck(h: Tensor, D: Tensor, D_bias: Tensor, U: Tensor, U_bias: Tensor, act: str) -> Tensor:
    """act(h D^T + b_D) U^T + b_U: (..., width) -> (..., width). D: (m, width), U: (width, m)."""
    return ACTIVATIONS[act](h @ D.mT + D_bias) @ U.mT + U_bias


BOTTLENECK_STARTS = ("identity", "houlsby", "bert")


def bottleneck_tensors(width: int, m: int, start: str = "identity") -> Specs:
    """D, D_bias, U, U_bias of a bottleneck of width m: (m, width), (m,), (width, m), (width,).

    "identity": U = 0 and D as in nn.Linear; "houlsby": both normal, 0.01, cut at two deviations; "bert": both
    N(0, 0.02^2). Biases start at zero.
    """
    D, U = {
        "identity": (kaiming(m, width), zeros(width, m)),
        "houlsby": (truncated_normal(0.01, m, width), truncated_normal(0.01, width, m)),
        "bert": (normal(0.02, m, width), normal(0.02, width, m)),
    }[start]
    return {"D": D, "D_bias": zeros(m, decay=False), "U": U, "U_bias": zeros(width, decay=False)}


def layer_norm(
    x: Tensor, gain: Tensor | None = None, shift: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Layer norm over the last axis, with gains that may have a row axis."""
    y = F.layer_norm(x, x.shape[-1:], eps=eps)
    y = y if gain is None else y * gain
    return y if shift is None else y + shift


def dropout(x: Tensor, p: float, at: Any) -> Tensor:
    """Dropout in training, the identity otherwise. Its draws are the adapter's own where the loop gave it a seed."""
    if not p or not at.training:
        return x
    return F.dropout(x, p, True) if at._dropout is None else at._dropout(x, p)


def widen(extra: Tensor, width: int) -> Tensor:
    """(..., d) -> (..., width), zeros behind: keys and values beside an edit further out that works at more width.

    Such an edit keeps the attention's own heads in the first d places, and zeros meet nothing in the others.
    """
    return extra if extra.shape[-1] == width else F.pad(extra, (0, width - extra.shape[-1]))


def before(extra: Tensor, x: Tensor) -> Tensor:
    """[extra; x] along the token axis.

    extra: (heads, length, d) or (rows, heads, length, d); x: (rows, heads, tokens, d)
    """
    extra = widen(extra, x.shape[-1])
    if extra.dim() < x.dim():
        extra = extra.expand(x.shape[0], *extra.shape)
    return torch.cat([extra.to(x.dtype), x], dim=-2)


def open_before(mask: Tensor, length: int | Tensor) -> Tensor:
    """The mask for `length` more keys in front that every query sees.

    (rows or 1, 1 or heads, q, k) -> (..., q, length + k)

    Bool masks are True where a key is seen; float masks are added to the scores. `length` may be a (rows, length)
    bool tensor: keys of padding stay closed.
    """
    shape = list(mask.shape)
    if isinstance(length, Tensor):
        live = length[:, None, None, :].expand(length.shape[0], *shape[1:-1], length.shape[-1])
        mask = mask.expand(length.shape[0], *shape[1:])
    else:
        live = torch.ones(*shape[:-1], length, dtype=torch.bool, device=mask.device)
    if mask.dtype == torch.bool:
        return torch.cat([live, mask], dim=-1)
    closed = torch.zeros_like(live, dtype=mask.dtype).masked_fill(~live, torch.finfo(mask.dtype).min)
    return torch.cat([closed, mask], dim=-1)


def prefix_tensors(site: Site, length: int, hidden: int = 0) -> Specs:
    """A prefix of keys and values, K and V (kv_heads, length, head_dim), or the network of that width that makes it.

    The network's first layer and its rows E are shared by all sites; its last, U, is one a site.
    """
    heads, d = site.kv_heads, site.head_dim
    if not hidden:
        return {name: normal(0.02, heads, length, d, decay=False) for name in ("K", "V")}
    return {
        "E": normal(1.0, length, site.width, scope="adapter", decay=False),
        "D": kaiming(hidden, site.width, scope="adapter"),
        "D_bias": zeros(hidden, scope="adapter", decay=False),
        "U": uniform(hidden**-0.5, 2, heads, d, hidden),
        "U_bias": zeros(2, heads, 1, d, decay=False),
    }


def made_prefix(t: Tensors) -> dict[str, Tensor]:
    """K and V that such a network makes, (kv_heads, length, head_dim); nothing where there is none."""
    if "E" not in t:
        return {}
    inner = torch.tanh(t.E @ t.D.mT + t.D_bias)[..., None, None, :, :]
    K, V = (inner @ t.U.mT + t.U_bias).unbind(-4)
    return {"K": K, "V": V}


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., tokens, heads * d) -> (..., heads, tokens, d)"""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(..., kv_heads, tokens, d) -> (..., heads, tokens, d), each key head serving its group of queries."""
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], dim=-3)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens: (rows, tokens, width), (rows, tokens) -> (rows, 1, width)."""
    if mask is None:
        return x.mean(-2, keepdim=True)
    m = mask.to(x.dtype)[..., None]
    return (x * m).sum(-2, keepdim=True) / m.sum(-2, keepdim=True).clamp(min=1.0)


def running_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens up to and including each token: (rows, tokens, width) -> the same shape."""
    m = torch.ones_like(x[..., :1]) if mask is None else mask.to(x.dtype)[..., None]
    return (x * m).cumsum(-2) / m.cumsum(-2).clamp(min=1.0)


def block_diagonal(x: Tensor, R: Tensor) -> Tensor:
    """x_block R_block for each block: x (..., blocks * b), R (blocks, b, b) or (rows, blocks, b, b) -> like x."""
    blocks, b = R.shape[-3], R.shape[-1]
    parts = x.unflatten(-1, (blocks, b))
    if R.dim() == 3:
        return torch.einsum("...nb,nbc->...nc", parts, R).flatten(-2)
    return torch.einsum("r...nb,rnbc->r...nc", parts, R).flatten(-2)


def skew(vector: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrix from its upper triangle, row by row: (..., size (size - 1) / 2) -> (..., size, size)."""
    row, column = torch.triu_indices(size, size, 1, device=vector.device)
    flat = torch.zeros(*vector.shape[:-1], size * size, dtype=vector.dtype, device=vector.device)
    upper = flat.scatter(-1, (row * size + column).expand(vector.shape), vector).unflatten(-1, (size, size))
    return upper - upper.mT


@method("trained_copy", paper="", family="selective", registered=False)
class TrainedCopy(WeightMethod):
    """W' = V, V starting at W: what full fine-tuning, trained heads, norms and biases are made of."""

    sites: Sites = "head"
    with_bias: bool = True  # the bias beside each chosen weight is copied too

    def tensors(self, site: Site) -> Specs:
        return {"W": from_base(*site.shape, decay=len(site.shape) > 1)}

    def start(self, site: Site, W: Tensor, t: Tensors) -> dict[str, Tensor]:
        return {"W": W}

    def weight(self, t: Tensors, W: Tensor) -> Tensor:
        """Any shape -> the same shape"""
        return t.W


@method("trained_rows", paper="", family="selective", registered=False)
class TrainedRows(WeightMethod):
    """W'[ids] = W[ids] + D, D (ids, width) starting at zero: some tokens of a vocabulary, and a head that shares it.

    Decay pulls a row to what the base has, and not to zero. At a head only the logits of these tokens change.
    """

    ids: Sequence[int] = ()
    sites: Sites = "token_embedding"

    def tensors(self, site: Site) -> Specs:
        wrong = [i for i in self.ids if not 0 <= i < site.shape[0]]
        if wrong:
            raise BadOption(
                f"trainable_tokens: {wrong[0]} is no row of '{site.name}', which has {site.shape[0]}.",
                next_step=f"token ids from 0 to {site.shape[0] - 1}; resize the base first, where tokens are new",
            )
        return {"D": zeros(len(self.ids), *site.shape[1:])}

    def delta(self, t: Tensors, W: Tensor) -> Tensor:
        """(vocabulary, width) -> the same shape"""
        return t.D.new_zeros(W.shape).index_copy(0, self._index(W), t.D)

    def branch(self, t: Tensors, x: Tensor, at: Any) -> Tensor:
        """At a head: (..., width) -> (..., vocabulary)"""
        logits = x @ t.D.mT
        none = logits.new_zeros(*x.shape[:-1], at.site.shape[0])
        return none.index_copy(-1, self._index(x), logits)

    def _index(self, like: Tensor) -> Tensor:
        return torch.tensor(self.ids, device=like.device)


def trained_tokens(tokens: Sequence[int] | Mapping[str, Sequence[int]]) -> tuple[Method, ...]:
    """Parts for an option `trainable_tokens`: ids of the table of tokens, or ids by the name of a module."""
    by_table = dict(tokens) if isinstance(tokens, Mapping) else {"token_embedding": tokens} if tokens else {}
    for ids in by_table.values():
        if not isinstance(ids, Sequence) or isinstance(ids, str) or any(type(i) is not int for i in ids):
            raise BadOption(
                f"trainable_tokens={tokens!r:.60}: a list of token ids was expected.",
                next_step="trainable_tokens=tokenizer.convert_tokens_to_ids(['<new>'])",
            )
        if len(set(ids)) != len(ids):
            twice = next(i for i in ids if list(ids).count(i) > 1)
            raise BadOption(
                f"trainable_tokens names {twice} twice.", next_step="trainable_tokens=sorted(set(ids))"
            )
    return tuple(TrainedRows(tuple(ids), table) for table, ids in by_table.items() if ids)
