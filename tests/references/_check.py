"""The list of methods that have a reference, and comparing with them."""

import importlib
import pkgutil

import torch

import references
from references._cases import Case

METHODS = sorted(
    name
    for _, name, _ in pkgutil.iter_modules(references.__path__)
    if not name.startswith(("_", "test_")) and name != "counts"
)
MODULES = {name: importlib.import_module(f"references.{name}") for name in METHODS}


def close(found, expected, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, check_dtype=False)


def slopes_close(found, expected) -> None:
    """Five-point differences at step 1e-4 lose about five of the sixteen digits."""
    close(found, expected, rtol=1e-8, atol=3e-9)


def case_named(method: str, part: str) -> Case:
    """The first case whose name has this part."""
    return next(case for case in MODULES[method].cases() if part in case["name"])
