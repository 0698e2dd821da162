"""The loss of language models, computed only where there are labels, a piece at a time.

Most positions of a batch (prompts, padding) have no label, and the logits of those that have one are larger
than all else in the step: (tokens, vocabulary) in float32. So the hidden states that enter the output layer
are taken from the model's own forward, and those with a label are picked. Where the output layer's result is
the logits, losses are made from them in pieces. Where the model does more behind its output layer (a cap, a
scale), it does so at the picked places alone. Where neither gives what the model's full logits give, or an
adapter edits that layer, the full logits are used: the result is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.tasks._collate import IGNORED, takes
from veneer.tasks._logits import CHUNK_BYTES, losses_in_chunks, losses_of

# What was found of models that do more behind their output layer: whether that can be done at some places alone.
_PICKED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def answer_losses(
    model: nn.Module, inputs: dict[str, Any], targets: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Negative log likelihoods of the targets, and the rows that they belong to.

    targets: (rows, tokens), of the logits at the same place; -100 where there is none. Returns (labels,)
    losses in row-major order, float32 (float64 for logits of that type), and (labels,) row numbers.
    """
    wanted = targets != IGNORED
    rows = wanted.nonzero()[:, 0]
    if takes(model, "use_cache"):
        inputs = {**inputs, "use_cache": False}
    head = output_layer(model)
    if head is None:
        return losses_of(logits_at(model(**inputs), wanted), targets[wanted]), rows
    if isinstance(model, nn.Module) and _PICKED.get(model):
        return losses_of(_picked(model, head, inputs, wanted), targets[wanted]), rows
    if isinstance(model, nn.Module) and model in _PICKED:
        return losses_of(logits_at(model(**inputs), wanted), targets[wanted]), rows
    hidden, first = hidden_states(model, head, inputs)
    fits = hidden is not None and hidden.shape[:2] == targets.shape
    if fits and is_all(head, hidden, first):
        return losses_in_chunks(head, hidden[wanted], targets[wanted], chunk_bytes), rows
    if fits and isinstance(model, nn.Module):
        _PICKED[model] = _can_pick(model, head, inputs, wanted)
        return answer_losses(model, inputs, targets, chunk_bytes)
    return losses_of(logits_at(model(**inputs), wanted), targets[wanted]), rows


def shifted(labels: Tensor) -> Tensor:
    """Labels of tokens -> targets of logits: what stands at t is to be said at t - 1. (rows, tokens) both."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def logits_at(output: Any, wanted: Tensor) -> Tensor:
    """(labels, vocabulary) of the wanted places."""
    logits = _logits(output)
    return logits[wanted.to(logits.device)]


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


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
    seen, output = _watched(model, head, inputs, lambda hidden: hidden[:, :1])
    if len(seen) != 1 or seen[0].dim() != 3:
        return None, None
    return seen[0], _logits(output)


def _watched(
    model: nn.Module, head: nn.Module, inputs: dict[str, Any], choose: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], Any]:
    """What entered the output layer, once a call of it, and the model's output with `choose` of that in its place."""
    seen: list[Tensor] = []

    def take(_: nn.Module, arguments: tuple[Any, ...]) -> Any:
        seen.append(arguments[0])
        if len(arguments) != 1 or len(seen) > 1 or not isinstance(arguments[0], Tensor):
            return None  # called in another way, or twice: whoever asked sees it by `seen`
        return (choose(arguments[0]),) if arguments[0].dim() == 3 else None

    handle = head.register_forward_pre_hook(take)
    try:
        return seen, model(**inputs)
    finally:
        handle.remove()


def is_all(head: nn.Module, hidden: Tensor, first: Tensor) -> bool:
    """The model's logits are the output layer's and nothing else, seen at the first place of every row."""
    with torch.no_grad():
        alone = head(hidden[:, :1])
    return first.shape == alone.shape and torch.equal(first.to(alone.dtype), alone)


def _picked(model: nn.Module, head: nn.Module, inputs: dict[str, Any], wanted: Tensor) -> Tensor:
    """(labels, vocabulary): the model's own logits, of which it makes the wanted places alone."""
    _, output = _watched(model, head, inputs, lambda hidden: hidden[wanted.to(hidden.device)][None])
    return _logits(output)[0]


def _can_pick(model: nn.Module, head: nn.Module, inputs: dict[str, Any], wanted: Tensor) -> bool:
    """Whether picking before the output layer gives what picking behind it gives, on this very batch."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            ours = _picked(model, head, inputs, wanted)
            whole = logits_at(model(**inputs), wanted)
    except (RuntimeError, IndexError, ValueError):  # what stands behind the layer needs the batch's own shape
        return False
    finally:
        for module, mode in modes.items():
            module.training = mode
    near = 1e-5 if whole.dtype in (torch.float32, torch.float64) else 1e-2
    largest = float(whole.abs().max()) if whole.numel() else 0.0
    return ours.shape == whole.shape and bool(((ours - whole).abs() <= near * largest).all())
