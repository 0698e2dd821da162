"""The loss of language models, computed only where there are labels, a piece at a time.

Most positions of a batch (prompts, padding) have no label, and the logits of those that have one are larger
than all else in the step: (tokens, vocabulary) in float32. So the hidden states that enter the output layer
are taken from the model's own forward, those with a label are picked, and logits and losses are made in
chunks that the backward makes again. Where the model does more behind its output layer (a cap, a scale), or
an adapter edits that layer, the model's own full logits are used: the result is the same everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.tasks._collate import IGNORED, takes

CHUNK_BYTES = 1 << 26  # of float32 logits that are held at a time


def answer_losses(
    model: nn.Module, inputs: dict[str, Any], targets: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Negative log likelihoods of the targets, and the rows that they belong to.

    targets: (rows, tokens), of the logits at the same place; -100 where there is none. Returns (labels,)
    float32 losses in row-major order, and (labels,) row numbers.
    """
    wanted = targets != IGNORED
    rows = wanted.nonzero()[:, 0]
    if takes(model, "use_cache"):
        inputs = {**inputs, "use_cache": False}
    head = output_layer(model)
    if head is None:
        return _plain(logits_at(model(**inputs), wanted), targets[wanted]), rows
    hidden, first = hidden_states(model, head, inputs)
    fits = hidden is not None and hidden.shape[:2] == targets.shape
    if not fits or not is_all(head, hidden, first):
        return _plain(logits_at(model(**inputs), wanted), targets[wanted]), rows
    return _in_chunks(head, hidden[wanted], targets[wanted], chunk_bytes), rows


def shifted(labels: Tensor) -> Tensor:
    """Labels of tokens -> targets of logits: what stands at t is to be said at t - 1. (rows, tokens) both."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def logits_at(output: Any, wanted: Tensor) -> Tensor:
    """(labels, vocabulary) of the wanted places."""
    logits = output.logits if hasattr(output, "logits") else output[0]
    return logits[wanted.to(logits.device)]


def _plain(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that gives logits; None where there is none, or where an adapter acts on it.

    An edited layer needs the frame of the model's own forward, so it is not called apart from that.
    """
    find = getattr(model, "get_output_embeddings", None)
    try:
        head = find() if find is not None else None
    except (AttributeError, NotImplementedError):
        return None
    unedited = type(head) is nn.Linear or getattr(type(head), "forms_its_product", False)
    return head if unedited and not getattr(type(head), "_veneer_kinds", ()) else None


def hidden_states(model: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """What enters the output layer, and the model's logits of the first place (all that it makes)."""
    seen: list[Tensor] = []

    def take(_: nn.Module, arguments: tuple[Any, ...]) -> Any:
        if len(arguments) != 1 or not isinstance(arguments[0], Tensor) or arguments[0].dim() != 3 or seen:
            seen.append(arguments[0])  # called in another way, or twice: `fits` or `is_all` will say no
            return None
        seen.append(arguments[0])
        return (arguments[0][:, :1],)

    handle = head.register_forward_pre_hook(take)
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].dim() != 3:
        return None, None
    return seen[0], output.logits if hasattr(output, "logits") else output[0]


def is_all(head: nn.Module, hidden: Tensor, first: Tensor) -> bool:
    """The model's logits are the output layer's and nothing else, seen at the first place of every row."""
    with torch.no_grad():
        alone = head(hidden[:, :1])
    return first.shape == alone.shape and torch.equal(first.to(alone.dtype), alone)


def _in_chunks(head: nn.Module, hidden: Tensor, targets: Tensor, chunk_bytes: int) -> Tensor:
    vocabulary = int(head.out_features)  # type: ignore[arg-type]
    size = max(1, chunk_bytes // (4 * vocabulary))
    found = []
    for h, y in zip(hidden.split(size), targets.split(size)):
        if torch.is_grad_enabled() and len(targets) > size:
            found.append(checkpoint(_piece, head, h, y, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(_piece(head, h, y))
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


def _piece(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return _plain(head(hidden), targets)
