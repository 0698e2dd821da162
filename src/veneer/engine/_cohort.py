"""What training several adapters at once asks of the engine: one of them in the active place, and a still base.

The rows of a batch choose their adapters by `rows(...)`. All else that concerns one adapter (its penalty, what its
method does between steps, its evaluation) reads the active ones, so each is put there for as long as that takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ._attach import host_of
from ._host import Host


@contextmanager
def alone(model: nn.Module, name: str) -> Iterator[None]:
    """`name` is the only active adapter inside of the block; no leaf's `requires_grad` changes."""
    host = host_of(model)
    host.adapter(name)
    before, host.active = host.active, (name,)
    try:
        yield
    finally:
        host.active = tuple(n for n in before if n in host.names)


def require_gradients(model: nn.Module, name: str, wanted: bool = True) -> None:
    """Whether an adapter's leaves ask for gradients, active or not."""
    for leaf in host_of(model).adapter(name).leaves():
        leaf.requires_grad_(wanted)


def draws(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The states of adapters' own generators, to put back with `put_draws` where a forward is run again."""
    host = host_of(model)
    return {name: host.adapter(name).generator.get_state() for name in names}


def put_draws(model: nn.Module, states: Mapping[str, Tensor]) -> None:
    host = host_of(model)
    for name, state in states.items():
        host.adapter(name).generator.set_state(state)


def random_places(model: nn.Module) -> list[tuple[Any, str, float]]:
    """(owner, attribute, value) of every probability with which the base drops something: dropout, paths, layers.

    Modules keep it as a number whose name holds "drop", torch's own as `p`; some read it off their config.
    """
    found: list[tuple[Any, str, float]] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Host) or name == "veneer" or name.startswith("veneer."):
            continue
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        for owner in (module, getattr(module, "config", None)):
            if owner is None or id(owner) in seen:
                continue
            seen.add(id(owner))
            own = [*(names if owner is module else []), *(k for k in vars(owner) if "drop" in k.lower())]
            values = ((k, vars(owner).get(k)) for k in own)
            found += [(owner, k, v) for k, v in values if type(v) is float and v > 0]
    return found


@contextmanager
def without_dropout(model: nn.Module, places: list[tuple[Any, str, float]] | None = None) -> Iterator[None]:
    """The base drops nothing inside of the block, in training mode too. places: what `random_places` gave."""
    places = random_places(model) if places is None else places
    for owner, key, _ in places:
        setattr(owner, key, 0.0)
    try:
        yield
    finally:
        for owner, key, value in places:
            setattr(owner, key, value)


def is_still(model: nn.Module) -> bool:
    """Whether nothing of the base is drawn at random in training."""
    return not random_places(model)


__all__ = ["alone", "draws", "is_still", "put_draws", "random_places", "require_gradients", "without_dropout"]
