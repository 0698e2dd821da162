"""Options of training for a few steps of it, which stand for the whole when costs are forecast or measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LENGTH = (
    "epochs",
    "max_steps",
    "max_tokens",
    "max_seconds",
    "early_stopping",
    "evaluate_every",
    "save_every",
)


def for_few_steps(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without what says how long training goes on, and what happens on the way."""
    return {name: value for name, value in options.items() if name not in LENGTH}
