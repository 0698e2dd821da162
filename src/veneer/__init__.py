"""veneer: thin trainable layers on a frozen PyTorch model, every method behind one contract, compared fairly."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "veneer.engine": (
        "activate", "active", "adapters", "attach", "bare", "detach", "export", "load", "memory_budget", "merge",
        "parameters", "plan", "rows", "save", "trainable", "tune_forms", "unmerge",
    ),
    "veneer.catalogue": ("method", "methods"),
    "veneer.bases": ("open_base",),
    "veneer.training": ("Cohort", "train", "predict", "evaluate", "generate"),
    "veneer.comparing": ("compare",),
    "veneer.errors": ("VeneerError",),
}  # fmt: skip
_NAMES = {name: module for module, names in _WHERE.items() for name in names}
_ROOMS = ("engine", "edits", "anatomy", "bases", "data", "tasks", "training", "comparing", "testing", "interop",
          "recipes", "errors", "methods", "serving")  # fmt: skip

__version__ = "0.1.0"
__all__ = sorted([*_NAMES, "anatomy", "testing"])


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"veneer.{name}")
    raise AttributeError(f"module 'veneer' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
