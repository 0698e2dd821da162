"""Arms as people type them: `method[:option=value,...][+recipe[:option=value,...]]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer._written import named_options, pieces

Part = tuple[str, dict[str, Any]]  # name, options


@dataclass(frozen=True)
class Parsed:
    """What an arm names."""

    method: Part
    recipes: tuple[Part, ...] = ()


def parsed(text: str) -> Parsed:
    """`lora:rank=16,sites=attention.{query,value}+lora_plus`. Quotes and brackets protect commas and plus
    signs.
    """
    method, *recipes = (named_options(piece.strip(), text) for piece in pieces(text, "+"))
    return Parsed(method, tuple(recipes))


def text(part: Part) -> str:
    """A name with its options, as it is typed."""
    name, options = part
    return name + ("" if not options else ":" + ",".join(f"{k}={v}" for k, v in sorted(options.items())))
