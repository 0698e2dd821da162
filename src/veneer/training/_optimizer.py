"""The optimizer of a run: made from groups of leaves, saved without a pickle, put back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from veneer.errors import TrainingFailed


def make_optimizer(
    groups: list[dict[str, Any]], recipe: Any, learning_rate: float, weight_decay: float
) -> Any:
    """The recipe's optimizer, else AdamW. TrainingFailed where there is nothing to train."""
    groups = [g for g in groups if g["params"]]
    if sum(p.numel() for g in groups for p in g["params"] if p.requires_grad) == 0:
        raise TrainingFailed(
            "there is nothing to train: the active adapter has no parameter that requires a gradient.",
            next_step="veneer.trainable(model) lists what is trained; it needs a method with sites, "
            "or a fresh head",
        )
    if recipe is not None:
        return recipe.optimizer(groups, learning_rate, weight_decay)
    from veneer.recipes import adamw

    return adamw(groups, learning_rate)


def views_of(groups: list[dict[str, Any]]) -> dict[Tensor, Any]:
    """{leaf: (label, shape, start, stop) of its parts}."""
    return {p: g.get("views", ()) for g in groups for p in g["params"]}


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """state_dict without what groups carry for the step alone (views of leaves): those are made anew."""
    saved = optimizer.state_dict()
    plain = [{k: v for k, v in g.items() if _is_plain(v)} for g in saved["param_groups"]]
    return {**saved, "param_groups": plain}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def load_optimizer(optimizer: Any, saved: Any) -> None:
    """Put back what `optimizer_state` gave; what groups carry for the step alone stays that of now."""
    now = optimizer.param_groups
    if len(saved["param_groups"]) != len(now):
        raise TrainingFailed(
            f"the checkpoint's optimizer has {len(saved['param_groups'])} groups of parameters, "
            f"this one has {len(now)}.",
            next_step="give the run another output, to begin it anew",
        )
    groups = [
        {**{k: v for k, v in n.items() if k != "params"}, **s} for n, s in zip(now, saved["param_groups"])
    ]
    optimizer.load_state_dict({**saved, "param_groups": groups})
