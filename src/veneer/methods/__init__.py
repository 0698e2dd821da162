"""The methods, one file each. Importing this package registers all of them; nothing imports a method by name."""

import importlib
import pkgutil
import sys
import types
from typing import Any

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


class _Callable(types.ModuleType):
    """`veneer.methods()` is the catalogue; this package has its name, so it answers the call."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module("veneer.catalogue").methods(*args, **options)


sys.modules[__name__].__class__ = _Callable
