"""Reading a base: its parts, how a person names them, what training will take. Changes nothing in it."""

import sys
import types
from typing import Any

from veneer.anatomy._anatomy import Anatomy, read
from veneer.anatomy._select import PORTS, ROLES, Selector
from veneer.anatomy._types import BaseFacts, Site
from veneer.anatomy.forecast import memory

__all__ = ["PORTS", "ROLES", "Anatomy", "BaseFacts", "Selector", "Site", "memory", "read"]


class _Callable(types.ModuleType):
    """`veneer.anatomy(model)` reads a model; `veneer.anatomy.read` is the same, beside the room's other names."""

    def __call__(self, model: Any, **options: Any) -> Anatomy:
        host = model._modules.get("veneer") if hasattr(model, "_modules") else None
        if host is not None and hasattr(host, "anatomy"):
            return host.anatomy  # of the bare base, where the model carries adapters
        return read(model, **options)


sys.modules[__name__].__class__ = _Callable
