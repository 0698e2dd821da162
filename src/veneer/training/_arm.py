"""Arms as people type them: `method[:option=value,...][+recipe[:option=value,...]]`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from veneer.errors import BadOption

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
    method, *recipes = (_part(piece.strip(), text) for piece in _pieces(text, "+"))
    return Parsed(method, tuple(recipes))


def text(part: Part) -> str:
    """A name with its options, as it is typed."""
    name, options = part
    return name + ("" if not options else ":" + ",".join(f"{k}={v}" for k, v in sorted(options.items())))


def _part(piece: str, whole: str) -> Part:
    name, _, rest = piece.partition(":")
    if not re.fullmatch(r"[A-Za-z_][\w-]*", name.strip()):
        raise BadOption(
            f"the arm {whole!r} cannot be read: {piece!r} does not begin with a name.",
            next_step="write method[:option=value,...][+recipe], as in lora:rank=16+lora_plus",
        )
    options: dict[str, Any] = {}
    for given in _pieces(rest, ",") if rest else ():
        key, equals, value = given.partition("=")
        if not equals or key.strip() in options:
            raise BadOption(
                f"the arm {whole!r} cannot be read: {given.strip()!r} is not option=value, or comes twice.",
                next_step="write method[:option=value,...][+recipe], as in lora:rank=16+lora_plus",
            )
        options[key.strip()] = _value(value.strip())
    return name.strip(), options


def _pieces(text: str, at: str) -> Iterator[str]:
    """Pieces between the characters `at` outside of quotes and brackets; a plus in a value has a blank
    before it.
    """
    piece, depth, quote = "", 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == at and depth == 0 and not (at == "+" and re.search(r"\s$|\d[eE]$", piece)):
            yield piece
            piece = ""
            continue
        piece += c
    yield piece


def _value(text: str) -> Any:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return text
