"""What a training loop asks of a model that carries adapters: leaves, penalties, the work between steps, state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.edits import Tensors
from veneer.errors import NoGradient, NotPrepared, ShapeDiffers

from ._adapter import Adapter
from ._attach import host_of, relayout
from ._conditions import penalty_of
from ._frame import Frame


def parameters(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    recipe: Any = None,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """The leaves of the active adapters (or of one) in groups for torch.optim.

    Each group: params [one flat leaf], lr, weight_decay (0 for tensors that decay would pull from a neutral value),
    and views [(site/tensor, shape, start, stop)], which cut the leaf and its gradient into the declared tensors.
    """
    host = host_of(model)
    groups = []
    for n in [name] if name is not None else host.active:
        adapter = host.adapter(n)
        if recipe is not None and hasattr(recipe, "regroup"):
            relayout(model, n, recipe.regroup)
        for leaf, group in zip(adapter.leaves(), adapter.groups):
            start, views = 0, []
            for e, size in zip(group.entries, group.sizes):
                views.append((f"{n}:{e.key}", e.shape, start, start + size))
                start += size
            groups.append({
                "params": [leaf], "lr": lr * group.rate, "rate": group.rate,
                "weight_decay": weight_decay if group.decay else 0.0, "views": views,
            })  # fmt: skip
    return groups


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """{adapter.site/tensor: shaped view of the flat leaf}: for looking at, and for writing into."""
    host = host_of(model)
    return {f"{n}.{k}": v for n in host.active for k, v in host.adapter(n).named().items()}


def penalty(model: nn.Module) -> Tensor | None:
    """The sum of the active methods' penalties (for the whole batch), or None where there is none."""
    host = host_of(model)
    if not host.active:
        return None
    return penalty_of(host, Frame(host, host.program(host.active, model.training)))


class Run:
    """What a method's `between_steps` sees of one adapter, after a step and before gradients are cleared.

    step: steps done; total_steps; t, grad: {site name: Tensors} of views that can be written in place; state: a dict
    of tensors that is kept in checkpoints; forget(site, tensor, mask): drop what the optimiser knows of entries.
    """

    def __init__(self, adapter: Adapter, step: int, total_steps: int | None, optimizer: Any) -> None:
        self.step, self.total_steps, self.state, self._optimizer = step, total_steps, adapter.state, optimizer
        self._adapter = adapter
        values, gradients = adapter.named(), adapter.gradients()
        frozen = {k: getattr(adapter, b) for k, b in adapter.frozen_own.items()}
        self.t: dict[str, Tensors] = {}
        self.grad: dict[str, Tensors] = {}
        for sp, keys in zip(adapter.plan.sites, adapter.plan.keys):
            self.t[sp.site.name] = Tensors(
                {n: {**frozen, **values}[k] for n, k in keys.items() if k in values or k in frozen}
            )
            self.grad[sp.site.name] = Tensors({n: gradients[k] for n, k in keys.items() if k in gradients})

    def forget(self, site: str, tensor: str, mask: Tensor | None = None) -> None:
        """Zero the optimiser's state of entries (all, or where mask is True)."""
        if self._optimizer is None:
            return
        keys = {sp.site.name: keys for sp, keys in zip(self._adapter.plan.sites, self._adapter.plan.keys)}
        key = keys[site][tensor]
        optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        for leaf, group in zip(self._adapter.leaves(), self._adapter.groups):
            start = 0
            for e, size in zip(group.entries, group.sizes):
                if e.key == key:
                    for value in optimizer.state.get(leaf, {}).values():
                        if isinstance(value, Tensor) and value.shape == leaf.shape:
                            part = value[start : start + size].view(e.shape)
                            part.zero_() if mask is None else part.masked_fill_(mask, 0.0)
                start += size


@torch.no_grad()
def between_steps(model: nn.Module, step: int, total_steps: int | None = None, optimizer: Any = None) -> None:
    """Constraints, then what methods do between steps: after optimizer.step(), before zero_grad."""
    host = host_of(model)
    host.__dict__["step"] = step
    for name in host.active:
        adapter = host.adapter(name)
        for leaf in adapter.leaves():
            torch.autograd.graph.increment_version(leaf)  # fused optimisers do not
        adapter.project()
        total = total_steps if total_steps is not None else adapter.total_steps
        for m in {sp.part: sp.method for sp in adapter.plan.sites}.values():
            if hasattr(m, "between_steps"):
                m.between_steps(Run(adapter, step, total, optimizer))
                for leaf in adapter.leaves():
                    torch.autograd.graph.increment_version(leaf)
                adapter._cached.clear()


def prepare_training(model: nn.Module, total_steps: int | None = None) -> None:
    """Check that the active adapters can be trained; watch which tensors the first backward reaches."""
    host = host_of(model)
    for name in host.active:
        adapter = host.adapter(name)
        adapter.check_prepared()
        adapter.total_steps = total_steps if total_steps is not None else adapter.total_steps
        if getattr(adapter.method, "needs_total_steps", False) and not adapter.total_steps:
            raise NotPrepared(
                f"adapter '{name}' ({adapter.method.key}) has a schedule and needs the number of steps.",
                next_step=f"veneer.attach(model, '{adapter.method.key}', ..., total_steps=1000)",
            )
        adapter.watched = set()


def check_gradients(model: nn.Module) -> None:
    """After the first backward: every trained tensor was reached by the loss, or says why its gradient is zero."""
    host = host_of(model)
    for name in host.active:
        adapter = host.adapter(name)
        seen, adapter.watched = adapter.watched, None
        if seen is None:
            continue
        trained = [g for leaf, g in zip(adapter.leaves(), adapter.groups) if leaf.requires_grad]
        # A recipe may have frozen a leaf: then no gradient is what was asked for.
        missed = [e for g in trained for e in g.entries if e.key not in seen and not e.spec.null_gradient]
        missed = [
            e for e in missed if not getattr(adapter.plan.sites[e.first].method, "may_be_unreached", False)
        ]
        missed = [e for e in missed if adapter.plan.sites[e.first].part == 0]
        if missed:
            sites = sorted({adapter.plan.sites[e.first].site.name for e in missed})
            raise NoGradient(
                f"adapter '{name}' ({adapter.method.key}): {len(missed)} trained tensors got no gradient, "
                f"the first at site '{sites[0]}' ({adapter.plan.sites[missed[0].first].site.module}).",
                next_step=f"leave them out with exclude={sites[:3]!r}, or check that the loss depends on them",
            )


def state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What a checkpoint holds of an adapter: trained and own frozen tensors by key, and what its method keeps."""
    adapter = host_of(model).adapter(name)
    found = {f"t:{k}": v.clone() for k, v in adapter.named().items()}
    found.update({f"f:{k}": getattr(adapter, b).clone() for k, b in adapter.frozen_own.items()})
    found.update({f"s:{k}": v.clone() for k, v in adapter.state.items()})
    found["generator"] = adapter.generator.get_state()
    return found


@torch.no_grad()
def restore(model: nn.Module, name: str, found: dict[str, Tensor]) -> None:
    """Put a checkpoint's state back, in place: the optimiser keeps its leaves."""
    adapter = host_of(model).adapter(name)
    views = adapter.named()
    for key, view in views.items():
        value = found.get(f"t:{key}")
        if value is None or value.shape != view.shape:
            shape = None if value is None else tuple(value.shape)
            raise ShapeDiffers(
                f"checkpoint tensor '{key}' has shape {shape}, the adapter declares {tuple(view.shape)}.",
                next_step="attach the method with the options that it had when the checkpoint was written",
            )
        view.copy_(value)
    for key, buffer in adapter.frozen_own.items():
        if f"f:{key}" in found:
            getattr(adapter, buffer).copy_(found[f"f:{key}"])
    adapter.state = {k[2:]: v.clone() for k, v in found.items() if k.startswith("s:")}
    if "generator" in found:
        adapter.generator.set_state(found["generator"].cpu())
    for leaf in adapter.leaves():
        torch.autograd.graph.increment_version(leaf)
    adapter._cached.clear()


Regroup = Callable[[Any, str, Any], "tuple[str, float] | None"]
