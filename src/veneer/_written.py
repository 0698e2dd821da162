"""How options are written in an arm, `method:option=value,...`: read once, for training and for comparing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from veneer.errors import BadOption

NAME = re.compile(r"[A-Za-z_][\w-]*")


def named_options(part: str, whole: str) -> tuple[str, dict[str, Any]]:
    """`name:option=value,...` -> (name, {option: value}). `whole` is the arm that the message names."""
    name, colon, rest = part.partition(":")
    name = name.strip()
    if not NAME.fullmatch(name):
        raise BadOption(
            f"the arm '{whole}' cannot be read: '{part}' does not begin with a name.",
            next_step="write method[:option=value,...][+recipe], as in lora:rank=16+lora_plus",
        )
    if not colon:
        return name, {}
    options: dict[str, Any] = {}
    for piece in pieces(rest, ","):
        key, equals, value = piece.partition("=")
        key = key.strip()
        if not equals or not NAME.fullmatch(key):
            raise BadOption(
                f"the arm '{whole}' cannot be read: '{piece.strip()}' is not option=value.",
                next_step="write method[:option=value,...][+recipe], as in lora:rank=16+lora_plus",
            )
        if key in options:
            raise BadOption(f"the arm '{whole}' gives '{key}' twice.", next_step="give each option once")
        options[key] = typed(value.strip())
    return name, options


def pieces(text: str, at: str) -> Iterator[str]:
    """Pieces of `text` between the characters `at` that stand outside of quotes and brackets."""
    piece, depth, quote = "", 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        elif character == at and depth == 0:
            # A plus sign with spaces around it is part of a value: prompt[:4] + prompt[-4:]
            # A plus sign in a number (1e+3) too.
            in_value = at == "+" and (piece[-1:].isspace() or re.search(r"\d[eE]$", piece) is not None)
            if not in_value:
                yield piece
                piece = ""
                continue
        piece += character
    yield piece


def typed(text: str) -> Any:
    """A Python value for what was typed: number, truth value, none, quoted or plain text."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
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
