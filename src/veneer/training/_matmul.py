"""A form of the frozen matmul is measured on the run's own first rows, and told, before it is trained with."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from veneer.training.hooks import Change

if TYPE_CHECKING:
    from torch import nn

    from veneer.training._loop import Run


class MeasureMatmul:
    """Before step 0: the error of the output and of the adapter's gradient against plain float32, as a note."""

    def between_steps(self, run: Run, step: int) -> Change | None:
        from veneer.bases.matmul import matmul_errors

        if step:
            return None
        model = run.model
        batch = run.collate(run.rows_of(0)[:8])
        trained = [p for p in run.subject.parameters() if p.requires_grad]

        def compute() -> Any:
            with run.accelerator.autocast(), run.draws(0), _seen(model) as seen:
                loss = run.task.loss(model, batch)
            return SimpleNamespace(loss=loss, logits=seen.get("output", loss))

        found = matmul_errors(model, compute, trained)
        run.notes.append(str(found))
        run.progress.note(f"note: {found}")
        return None


class _seen:
    """What the model returned inside of the block: the first tensor of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.handle: Any = nullcontext()

    def __enter__(self) -> dict[str, Any]:
        from veneer.bases.matmul import shown_of

        found: dict[str, Any] = {}

        def take(module: Any, arguments: Any, output: Any) -> None:
            found["output"] = shown_of(output)

        self.handle = self.model.register_forward_hook(take)
        return found

    def __exit__(self, *error: object) -> None:
        self.handle.remove()
