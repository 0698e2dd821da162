"""Hooks: the six places where a method or a recipe may take part in training.

They are the smallest set that covers the known methods: data passes and stages (`phases`), changes of the
support (`between_steps`), further losses (`loss_terms`), gradients (`on_gradients`), a step of another kind
(`step`), and tensors that leave the process (`exchange`). Every one is optional; what does nothing need not
be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from veneer.tasks import Batch
    from veneer.training._loop import Run

Change = Literal["unchanged", "support_changed", "groups_changed"]


@dataclass(frozen=True)
class Phase:
    """A stage of training. share: its part of the steps. optimizer: "keep" its state, or "rebuild" it at
    the start.

    enter(run) and exit(run) may read data (`run.batches`), take and rewind snapshots, and change the adapter.
    """

    name: str = "train"
    share: float = 1.0
    optimizer: Literal["keep", "rebuild"] = "keep"
    enter: Callable[[Run], None] | None = None
    exit: Callable[[Run], None] | None = None


class Hooks:
    """Does nothing; derive from it, or give any object that has some of these functions."""

    def phases(self, run: Run) -> Sequence[Phase]:
        """The stages, in order. None is one stage."""
        return ()

    def between_steps(self, run: Run, step: int) -> Change | None:
        """Before step 0 and behind every step, before gradients are zeroed.

        After "groups_changed" the optimizer is built anew, and keeps the state of every parameter that stays.
        """
        return None

    def loss_terms(self, run: Run, batch: Batch) -> dict[str, Tensor]:
        """Scalars by name, added to the loss once a step."""
        return {}

    def on_gradients(self, run: Run, step: int) -> None:
        """Behind the last backward of a step, before clipping: read, mask or rescale `.grad`."""

    def step(self, run: Run, closure: Callable[..., Tensor], step: int) -> Tensor | None:
        """A step of another kind: returns its loss, or None for the ordinary step.

        closure(backward=True) computes the loss of this step's rows, with the same random draws at each call.
        """
        return None

    def exchange(self, run: Run, message: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of the step by number, sent and received: the one way for tensors to leave the
        process.
        """
        return message


NAMES = ("phases", "between_steps", "loss_terms", "on_gradients", "step", "exchange")


class AllHooks:
    """The hooks of several objects as one. `has` says which names any of them implements."""

    def __init__(self, objects: Iterable[Any] = (), methods: Iterable[Any] = ()) -> None:
        """methods: their `between_steps` is called by the engine, which knows their tensors; the rest is
        here.
        """
        self.has: dict[str, list[Any]] = {name: [] for name in NAMES}
        for of, names in ((objects, NAMES), (methods, [n for n in NAMES if n != "between_steps"])):
            for thing in of:
                for name in names:
                    if thing is not None and _implements(thing, name):
                        self.has[name].append(getattr(thing, name))

    def phases(self, run: Run) -> list[Phase]:
        found = [p for function in self.has["phases"] for p in function(run) or ()]
        return found or [Phase()]

    def between_steps(self, run: Run, step: int) -> Change:
        said = {function(run, step) for function in self.has["between_steps"]}
        order: tuple[Change, ...] = ("groups_changed", "support_changed")
        return next((change for change in order if change in said), "unchanged")

    def loss_terms(self, run: Run, batch: Batch) -> dict[str, Tensor]:
        return {k: v for function in self.has["loss_terms"] for k, v in function(run, batch).items()}

    def on_gradients(self, run: Run, step: int) -> None:
        for function in self.has["on_gradients"]:
            function(run, step)

    def step(self, run: Run, closure: Callable[..., Tensor], step: int) -> Tensor | None:
        for function in self.has["step"]:
            loss = function(run, closure, step)
            if loss is not None:
                return loss
        return None

    def exchange(self, run: Run, message: dict[str, Tensor]) -> dict[str, Tensor]:
        for function in self.has["exchange"]:
            message = function(run, message)
        return message


def _implements(thing: Any, name: str) -> bool:
    """Has a function of this name that is not the empty one of `Hooks`."""
    own = getattr(type(thing), name, None)
    return callable(getattr(thing, name, None)) and own is not getattr(Hooks, name)


Views = Mapping[
    Tensor, Sequence[tuple[str, Any, int, int]]
]  # leaf -> (label, shape, start, stop) of its parts


def carry_state(old: Any, new: Any, before: Views | None = None, after: Views | None = None) -> None:
    """Move what an optimizer remembers to another, which may hold the same tensors in other leaves.

    A parameter that both have keeps its state. Of another the parts are gathered by their labels; a new
    part begins at zero. Step counts come from the first part that was there.
    """
    places = {label: (leaf, a, b) for leaf, views in (before or {}).items() for label, _, a, b in views}
    for parameter in (p for group in new.param_groups for p in group["params"]):
        if parameter in old.state:
            new.state[parameter] = old.state[parameter]
            continue
        views = (after or {}).get(parameter, ())
        found = [places[label] for label, *_ in views if label in places and old.state.get(places[label][0])]
        if found and _is_by_entry(old.state[found[0][0]], found[0][0]):
            new.state[parameter] = _gathered(old.state, parameter, views, places, found[0][0])


def _is_by_entry(state: Mapping[str, Any], leaf: Tensor) -> bool:
    """Every tensor of the state is a number, or has one value for each entry of the leaf."""
    tensors = [v for v in state.values() if isinstance(v, Tensor)]
    return all(v.numel() == 1 or v.shape == leaf.shape for v in tensors)


def _gathered(states: Any, parameter: Tensor, views: Any, places: Any, first: Tensor) -> dict[str, Any]:
    """The state of a leaf, from the states of the leaves that its parts were in."""
    state: dict[str, Any] = {}
    for key, value in states[first].items():
        if not isinstance(value, Tensor) or value.shape != first.shape:
            state[key] = value.clone() if isinstance(value, Tensor) else value
            continue
        state[key] = torch.zeros_like(parameter, dtype=value.dtype)
        for label, _, start, stop in views:
            leaf, a, b = places.get(label, (None, 0, 0))
            if leaf is not None and key in states.get(leaf, ()) and b - a == stop - start:
                state[key][start:stop] = states[leaf][key][a:b]
    return state


def forget_state(optimizer: Any, parameter: Tensor, index: Tensor | None = None) -> None:
    """Drop what an optimizer remembers of a parameter, or of some of its entries (set to zero).

    Step counts stay, as do tensors of another shape than the parameter's.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    if index is None:
        del optimizer.state[parameter]
        return
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value[index.to(value.device)] = 0
