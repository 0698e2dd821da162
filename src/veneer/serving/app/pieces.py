"""What one token is, for log probabilities: its text, and its bytes where it is only a part of a character.

A token of a byte-level vocabulary is written in letters that stand for bytes; other vocabularies have tokens named
<0xE4>. OpenAI writes such a part as `bytes:\\xe4`, so that two of them are not the same key of an object.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Piece(NamedTuple):
    """text: as a client is shown it. bytes: of it, or of the part of a character. length: what it adds to a text."""

    text: str
    bytes: bytes
    length: int


class Pieces:
    """Tokens as pieces, remembered: a stream asks for the same ones again. engine: with `decode` and `tokenizer`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.get = functools.lru_cache(50_000)(self._make)

    def _make(self, token: int) -> Piece:
        text, name = self._engine.decode([token]), self._name(token)
        if name.startswith("▁") and not text.startswith(" "):
            text = " " + text  # decoding drops it where a text begins
        if text and "\ufffd" not in text:
            return Piece(text, text.encode(), len(text))
        part = _bytes_of(name)
        if text and part is not None:
            return Piece("bytes:" + "".join(f"\\x{b:02x}" for b in part), part, 0)
        return Piece(text or name, (text or name).encode("utf-8", "replace"), len(text))

    def _name(self, token: int) -> str:
        """How the vocabulary writes it: of special tokens this is all there is to show."""
        try:
            return str(self._engine.tokenizer.convert_ids_to_tokens([token])[0])
        except (AttributeError, IndexError, TypeError, ValueError):
            return ""


def _bytes_of(name: str) -> bytes | None:
    """The bytes that a token's name stands for; None where it stands for none."""
    if one := _BYTE.fullmatch(name):
        return bytes([int(one[1], 16)])
    letters = _letters()
    return bytes(letters[c] for c in name) if name and all(c in letters for c in name) else None


@functools.cache
def _letters() -> dict[str, int]:
    """{letter: byte} of byte-level vocabularies: printable bytes are themselves, the others follow from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}
