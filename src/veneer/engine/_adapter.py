"""An adapter: a named method with tensors on a base.

Trained tensors lie in one flat parameter for each group (same decay, rate and group name), cut by one `split` a
call. Frozen tensors that a seed makes again are drawn once and shared between adapters; frozen ones made from the
base or from data are the adapter's own buffers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.edits import Spec, Tensors
from veneer.errors import NotPrepared

from ._plan import Entry, Plan, is_saved


@dataclass(frozen=True)
class Group:
    """Entries that share a leaf."""

    name: str
    decay: bool
    rate: float
    entries: tuple[Entry, ...]

    @property
    def sizes(self) -> list[int]:
        return [_numel(e.shape) for e in self.entries]


def _saw(seen: set[str], key: str, gradient: Tensor) -> None:
    seen.add(key)


def _numel(shape: Iterable[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


class Adapter(nn.Module):
    """One adapter. `model.veneer` holds it; its parameters are flat leaves."""

    still: list[Tensor]

    def __init__(self, name: str, plan: Plan, seed: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.name, self.plan, self.seed = name, plan, seed
        self.keep_dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.groups: list[Group] = []
        self.frozen_shared: dict[str, Any] = {}  # entry key -> key in the host's store
        self.frozen_own: dict[str, str] = {}  # entry key -> buffer name
        self.of: tuple[str, ...] = ()
        self.prepared = True
        self.total_steps: int | None = None
        self.state: dict[str, Tensor] = {}  # what between_steps keeps
        self.info: dict[str, Any] = {}  # task, head, and what else is saved beside the tensors
        self.watched: set[str] | None = None  # entry keys that got a gradient, while that is asked
        self._cached: dict[Any, Any] = {}

    @property
    def method(self) -> Any:
        return self.plan.method

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.leaves())

    def check_prepared(self) -> None:
        if not self.prepared:
            raise NotPrepared(
                f"adapter '{self.name}' ({self.method.key}) is not prepared: its start needs data.",
                next_step=f"veneer.attach(model, '{self.method.key}', ..., data=batches)",
            )

    def leaves(self) -> list[nn.Parameter]:
        own = self.__dict__["_parameters"]
        return [own[f"leaf_{i}"] for i in range(len(self.groups))]

    def _refresh(self) -> None:
        """Forget what was made from the leaves. `still` are the same leaves for compiled code without gradients:
        they never change `requires_grad`, which a graph would be guarded by."""
        self._cached.clear()
        self.__dict__["still"] = [p.detach() for p in self.leaves()]

    @property
    def settled(self) -> bool:
        """Whether what is made from the leaves may be kept: no optimiser is about to move them. Versions alone do
        not tell, since torch's fused optimisers do not raise them."""
        return not torch.compiler.is_compiling() and all(p.grad is None for p in self.leaves())

    def stamp(self) -> tuple[Any, ...] | None:
        """Its version, where it is settled, else None."""
        found: list[Any] = []
        for p in self.leaves():
            if p.grad is not None:
                return None
            found += (p._version, p.data_ptr())
        return None if torch.compiler.is_compiling() else tuple(found)

    def version(self) -> tuple[Any, ...]:
        """Changes when a leaf is written to, or given other data."""
        return tuple((p._version, p.data_ptr()) for p in self.leaves())

    def keeps(self, i: int, t: Tensors) -> bool:
        """Whether `t` is what this adapter keeps for its site plan `i`, and not made for one call."""
        kept = self._cached.get("derived")
        return kept is not None and kept[i] is t

    # -- layout -------------------------------------------------------------------------------------------------

    def lay_out(
        self, values: dict[str, Tensor], regroup: Callable[[Entry], tuple[str, float] | None] | None = None
    ) -> None:
        """Put the trained tensors into leaves. values: entry key -> tensor, all trained entries."""
        sorted_entries: dict[tuple[bool, float, str], list[Entry]] = {}
        for e in self.plan.entries:
            if not e.spec.trained or e.key not in values:
                continue
            changed = regroup(e) if regroup else None
            group, rate = changed if changed else (e.spec.group, e.spec.rate)
            sorted_entries.setdefault((e.spec.decay, rate, group), []).append(e)
        for i in range(len(self.groups)):
            delattr(self, f"leaf_{i}")
        self.groups = []
        dtype = self.keep_dtype or torch.float32
        for i, ((decay, rate, group), entries) in enumerate(
            sorted(sorted_entries.items(), key=lambda found: str(found[0]))
        ):
            shaped = tuple(
                e if e.shape == (shape := tuple(values[e.key].shape)) else dataclasses.replace(e, shape=shape)
                for e in entries
            )
            self.groups.append(Group(group, decay, rate, shaped))
            flat = (
                torch.cat([values[e.key].reshape(-1).to(dtype) for e in shaped]) if shaped else torch.zeros(0)
            )
            self.register_parameter(f"leaf_{i}", nn.Parameter(flat))
        self._refresh()

    def named(self, detached: bool = True, still: bool = False) -> dict[str, Tensor]:
        """Entry key -> shaped view of its leaf."""
        views: dict[str, Tensor] = {}
        for leaf, group in zip(self.still if still else self.leaves(), self.groups):
            parts = (leaf.detach() if detached and not still else leaf).split(group.sizes)
            views.update({e.key: p.view(e.shape) for e, p in zip(group.entries, parts)})
        return views

    def gradients(self) -> dict[str, Tensor]:
        """Entry key -> shaped view of its leaf's gradient; leaves without one are left out."""
        views: dict[str, Tensor] = {}
        for leaf, group in zip(self.leaves(), self.groups):
            if leaf.grad is not None:
                views.update(
                    {e.key: p.view(e.shape) for e, p in zip(group.entries, leaf.grad.split(group.sizes))}
                )
        return views

    def frozen(self, shared: dict[Any, Tensor]) -> dict[str, Tensor]:
        found = {key: shared[store] for key, store in self.frozen_shared.items()}
        found.update({key: getattr(self, buffer) for key, buffer in self.frozen_own.items()})
        return found

    def saved_tensors(self) -> dict[str, Tensor]:
        """What a file holds: trained tensors, and frozen ones that no seed makes again."""
        saved = {k: v.clone() for k, v in self.named().items()}
        specs = {e.key: e.spec for e in self.plan.entries}
        saved.update({k: getattr(self, b).clone() for k, b in self.frozen_own.items() if is_saved(specs[k])})
        return saved

    def own_buffer(self, key: str, value: Tensor) -> None:
        buffer = f"frozen_{len(self.frozen_own)}"
        self.frozen_own[key] = buffer
        self.register_buffer(buffer, value)

    @torch.no_grad()
    def project(self) -> None:
        """Apply the declared constraints in place, if the leaves changed since the last time."""
        kept = [e for e in self.plan.entries if e.spec.keep is not None and e.spec.trained]
        if not kept:
            return
        views = self.named()
        moved = False
        for e in kept:
            now, new = views[e.key], e.spec.keep(views[e.key])  # type: ignore[misc]
            if (new - now).abs().max() > 64 * torch.finfo(
                now.dtype
            ).eps:  # else it lies on it, but for rounding
                now.copy_(new)
                moved = True
        if moved:
            for leaf in self.leaves():
                torch.autograd.graph.increment_version(leaf)
            self._cached.clear()

    # -- reading ------------------------------------------------------------------------------------------------

    def site_tensors(
        self, shared: dict[Any, Tensor], dtype: torch.dtype | None, training: bool
    ) -> list[Tensors]:
        """For each site plan the tensors that its functions receive.

        With gradients on they are made anew each call, or a second backward would meet freed tensors.
        """
        keep = not torch.is_grad_enabled() and not training and self.settled
        if not keep and not torch.compiler.is_compiling():
            self._cached.clear()
        version = (dtype, self.version()) if keep else None
        if keep and self._cached.get("version") == version:
            return self._cached["tensors"]
        views: dict[str, Tensor] = {}
        still = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        for leaf, group in zip(self.still if still else self.leaves(), self.groups):
            cast = leaf if dtype is None or leaf.dtype == dtype else leaf.to(dtype)
            views.update({e.key: p.view(e.shape) for e, p in zip(group.entries, cast.split(group.sizes))})
        for key, value in self.frozen(shared).items():
            views[key] = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        if any(e.spec.compute == "float32" for e in self.plan.entries):
            exact = self.named(detached=not torch.is_grad_enabled(), still=still)
            views.update(
                {e.key: exact[e.key] for e in self.plan.entries if e.spec.compute and e.key in exact}
            )
        if self.watched is not None and torch.is_grad_enabled():
            # Hooks on the shaped views tell which tensors the loss reached; the leaf's gradient cannot.
            for e in self.plan.entries:
                if views[e.key].requires_grad:
                    views[e.key].register_hook(functools.partial(_saw, self.watched, e.key))
        made = [self._at_site(i, views, training) for i in range(len(self.plan.sites))]
        if keep:
            self._cached = {"version": version, "tensors": made}
        return made

    def _at_site(self, i: int, views: dict[str, Tensor], training: bool) -> Tensors:
        sp, found = self.plan.sites[i], {}
        for name, key in self.plan.keys[i].items():
            value, shape = views[key], sp.specs[name].shape
            if sp.specs[name].scope != "site" and tuple(value.shape) != shape:
                value = value[
                    tuple(slice(0, n) for n in shape)
                ]  # shared tensors are drawn at the largest shape
            found[name] = value
        for name, spec in sp.specs.items():
            if spec.noise and training:
                found[name] = spec.start(spec.shape, self.generator)
        return Tensors(found)

    # -- dtype and device ---------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.half()` of the model moves the adapter, and keeps its precision."""
        before = {n: p.data for n, p in self.named_parameters(recurse=False)}
        made = super()._apply(fn, recurse)
        for n, p in self.named_parameters(recurse=False):
            if self.keep_dtype is not None and p.dtype != self.keep_dtype:
                p.data = before[n].to(device=p.device, dtype=self.keep_dtype)  # no bit is lost on the way
        self._refresh()
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        import copy

        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        state = {k: v for k, v in self.__dict__.items() if k not in ("plan", "generator", "_cached", "still")}
        made.__dict__.update(copy.deepcopy(state, memo))
        made.__dict__["plan"] = self.plan  # pure data, shared
        made.__dict__["generator"] = torch.Generator()
        made.generator.set_state(self.generator.get_state())
        made.__dict__["_cached"] = {}
        made._refresh()
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["generator"] = self.generator.get_state()
        state["_cached"] = {}
        state.pop("still", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        seen = state.pop("generator")
        super().__setstate__({**state, "_cached": {}})
        self.generator = torch.Generator()
        self.generator.set_state(seen)
        self._refresh()

    def extra_repr(self) -> str:
        return f"{self.name}: {self.method}, {self.trainable_parameters:,} trained"


def draw(spec: Spec, shape: tuple[int, ...], seed: int, key: str) -> Tensor:
    """The starting value of a tensor from its own seed, so that neither order nor other tensors change it."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    if len(shape) > len(spec.shape):  # one draw for each expert
        return torch.stack([spec.start(shape[1:], generator) for _ in range(shape[0])])
    return spec.start(shape, generator)
