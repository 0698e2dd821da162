"""The loss that a model of transformers computes itself when it is given labels, from its output and the labels.

In a shared forward the model is called without labels, since its own loss would be one mean over the rows of all
members. What stands here is checked against the model's own loss on a batch before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import BadData, Unsupported
from veneer.tasks._collate import IGNORED, takes

LABELS = ("labels", "start_positions", "end_positions")


def without_labels(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(inputs, labels) of a batch as the model's own forward takes it."""
    inputs = {k: v for k, v in batch.items() if k not in LABELS}
    labels = {k: v for k, v in batch.items() if k in LABELS}
    y = labels.get("labels")
    if isinstance(y, Tensor) and _config(model, "is_encoder_decoder") and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=y)  # type: ignore[operator]
    ids = inputs.get("input_ids")
    if isinstance(y, Tensor) and isinstance(ids, Tensor) and y.shape == ids.shape and _is_causal(model):
        inputs.setdefault(
            "prompt_mask", _before_the_answer(inputs, y)
        )  # edits at the prompt read it off the labels
    return inputs, labels


def _before_the_answer(inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    mask = inputs.get("attention_mask")
    real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    return real & ((labels != IGNORED).long().cumsum(1) == 0)


def own_loss(model: nn.Module, output: Any, labels: Mapping[str, Any]) -> Tensor:
    """The mean that the model itself would give for these labels."""
    y = labels.get("labels")
    logits = getattr(output, "logits", None)
    if isinstance(y, Tensor) and isinstance(logits, Tensor):
        _check_range(logits, y)
        if _config(model, "is_encoder_decoder"):
            return F.cross_entropy(logits.float().flatten(0, -2), y.flatten(), ignore_index=IGNORED)
    config = getattr(model, "config", None)
    given = (
        {k: v for k, v in dict(output.items()).items() if k.endswith("logits")}
        if hasattr(output, "items")
        else {}
    )
    return model.loss_function(  # type: ignore[operator]
        **given, **labels, pooled_logits=logits, config=config,
        vocab_size=None if logits is None else logits.shape[-1],
    )  # fmt: skip


def _check_range(logits: Tensor, labels: Tensor) -> None:
    """A label that no class has stops one member, where a device would stop the process."""
    if labels.is_floating_point() or not labels.numel():
        return
    real = labels[labels != IGNORED]
    if real.numel() and (int(real.min()) < 0 or int(real.max()) >= logits.shape[-1]):
        bad = int(real.min()) if int(real.min()) < 0 else int(real.max())
        raise BadData(
            f"the label {bad} is outside of 0..{logits.shape[-1] - 1}, the classes of this base.",
            next_step="correct the row, or open the base with more classes (num_labels=)",
        )


def check_own_loss(model: nn.Module, batch: Mapping[str, Any], loss: Any) -> None:
    """Raise Unsupported where `loss(model)` of a batch is not the model's own, on the bare base."""
    from veneer import engine
    from veneer.training._evaluate import evaluating

    if not hasattr(model, "loss_function"):
        raise Unsupported(
            f"{type(model).__name__} does not say how it computes its loss from labels.",
            next_step="loss=lambda model, batch: ...   a scalar from one call of the model",
        )
    with torch.no_grad(), engine.bare(model), evaluating(model):
        mine = loss(model)
        own = model(**batch).loss
    if own is None or not torch.allclose(own.float(), mine.float(), rtol=1e-4, atol=1e-6, equal_nan=True):
        raise Unsupported(
            f"{type(model).__name__} computes its loss in a way of its own (here {float(mine):.4f}, its own "
            f"{'none' if own is None else format(float(own), '.4f')}).",
            next_step="loss=lambda model, batch: ...   a scalar from one call of the model",
        )


def _config(model: nn.Module, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)


def _is_causal(model: nn.Module) -> bool:
    from veneer import engine

    facts = engine.host_of(model).anatomy.facts
    return facts.causal and not facts.encoder_decoder and takes(model, "input_ids")
