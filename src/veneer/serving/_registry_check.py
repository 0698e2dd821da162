"""Whether an adapter fits a base, tried on a shadow of it.

The shadow has modules of its own that hold the base's own parameters. An adapter is attached to it as it would be
to the base, with every comparison that loading makes, while the base itself goes on serving undisturbed.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from torch import nn

from veneer import engine
from veneer.engine._swap import restore
from veneer.errors import ShapeDiffers

from ._registry_content import Content


def shadow(model: nn.Module) -> nn.Module:
    """A copy of a model's modules around the same parameters and buffers; it carries no adapters."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    carried = model._modules.get("veneer")
    if carried is not None:
        memo[id(carried)] = nn.Identity()
    made = copy.deepcopy(model, memo)
    made._modules.pop("veneer", None)
    for module in made.modules():
        restore(module)
    return made.eval()


def check_on(model: nn.Module, *, exact: bool | None = None) -> Callable[[Path, Content], None]:
    """A `Registry`'s check: loads a folder on a shadow of `model`, and takes it off again.

    exact: refuse a base of other weights too, not of other shapes alone (default: where the base is float32 and not
    quantised, so that its weights can be compared). Raises what `veneer.load` raises, and ShapeDiffers.
    """
    if exact is None:
        exact = all(p.dtype.itemsize == 4 for p in model.parameters() if p.is_floating_point()) and all(
            p.is_floating_point() for p in model.parameters()
        )
    ghost = shadow(model)
    one_at_a_time = threading.Lock()

    def check(folder: Path, content: Content) -> None:
        with one_at_a_time, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = engine.load(ghost, folder, "checked", activate=False)
            try:
                now = engine.fingerprint(engine.host_of(ghost).anatomy, ghost, adapter.plan)
            finally:
                engine.detach(ghost, "checked")
        then = content.base
        if exact and then.get("values") and then["values"] != now["values"]:
            raise ShapeDiffers(
                f"the adapter was made for another {then.get('class', 'base')}: its weights are not this base's.",
                next_step="serve the base that it was trained on",
            )

    return check
