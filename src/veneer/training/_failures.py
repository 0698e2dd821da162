"""What went wrong in a step, in words: the first module whose output is not finite, too little memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import TrainingFailed


def first_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Run `forward` again and name the first module whose output holds NaN or infinity; None if there is
    none.

    The first to return is the innermost: a block returns behind what is in it.
    """
    found: list[str] = []
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, _: Any, output: Any) -> None:
        if not found and any(not bool(torch.isfinite(t).all()) for t in _tensors(output)):
            found.append(f"{names[module] or 'the model'} ({type(module).__name__})")

    handles = [module.register_forward_hook(look) for module in names]
    try:
        with torch.no_grad():
            forward()
    except Exception:  # what failed before may fail again; what was seen until then still counts
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        # Masks are infinite on purpose, and are not outputs of modules in floating point with gradients.
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in _tensors(value)]
    return []


def not_finite(
    what: str, step: int, items: Sequence[int], where: str | None, rate: float, kept: str | None
) -> TrainingFailed:
    """The error of a run that diverged."""
    rows = ", ".join(map(str, items[:8])) + (", ..." if len(items) > 8 else "")
    place = f"the first output that is not finite is that of {where}" if where else (
        "every module's output is finite: the loss itself, the penalty or the backward overflowed"
    )  # fmt: skip
    stays = f"the last good checkpoint stays: {kept}" if kept else "no checkpoint had been written yet"
    return TrainingFailed(
        f"{what} is not finite at step {step} (training rows {rows}; learning rate {rate:.3g}); {place}; "
        f"{stays}.",
        next_step=f"learning_rate={rate / 10:.1g}, more warmup, or mixed_precision=None; "
        "then look at those rows",
    )


def out_of_memory(
    error: Exception, step: int, batch_size: int, accumulate: int, length: int, checkpointing: bool
) -> TrainingFailed:
    """The error of a run that needs more memory than there is, with the settings that would help."""
    first = str(error).splitlines()[0][:160]
    ways = [
        f"accumulate={accumulate * 2} (the same result; activations halve: "
        f"{batch_size // (accumulate * 2) or 1} rows at a time)",
        f"max_length={max(16, length // 2)} (activations halve, attention's part falls to a quarter)",
    ]
    if not checkpointing:
        ways.insert(1, "gradient_checkpointing=True (the same result; one block's activations at a time)")
    return TrainingFailed(f"out of memory at step {step}: {first}", next_step="; or ".join(ways))
