"""The fourteen laws, a subject a file. Importing this package registers them."""

from . import (
    compiling,
    equation,
    forms,
    generation,
    lifecycle,
    merging,
    padding,
    precision,
    quantised,
    rows,
    start,
    training,
)

__all__ = [
    "compiling", "equation", "forms", "generation", "lifecycle", "merging", "padding", "precision",
    "quantised", "rows", "start", "training",
]  # fmt: skip
