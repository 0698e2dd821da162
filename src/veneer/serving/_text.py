"""Text from tokens as they come: whole characters alone, and nothing that may yet become a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what decoding shows for the first bytes of a character


class Text:
    """The text of one answer. decode: token ids -> text. stop: texts before which it ends."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, tuple(s for s in stop if s)
        self.tokens: list[int] = []
        self._start = 0  # decoding starts here: what a token looks like depends on the one before it
        self._read = 0  # tokens whose text is out
        self._held = ""  # may yet become a stop text
        self.stopped = False

    def add(self, token: int, watch: bool = True) -> str:
        """The text that this token sets free; `stopped` tells whether a stop text was found.

        watch: False where a stop text does not count yet.
        """
        self.tokens.append(token)
        before = self.decode(self.tokens[self._start : self._read])
        whole = self.decode(self.tokens[self._start :])
        if len(whole) <= len(before) or whole.endswith(UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self.tokens)
        return self._free(whole[len(before) :], watch)

    def finish(self) -> str:
        """What was held back, at the end: the rest of the text, or nothing behind a stop text."""
        if self.stopped:
            return ""
        before = self.decode(self.tokens[self._start : self._read])
        rest = self.decode(self.tokens[self._start :])[len(before) :]
        self._start = self._read = len(self.tokens)
        held = self._free(rest, True) + self._held
        self._held = ""
        return "" if self.stopped and not held else held

    def _free(self, new: str, watch: bool) -> str:
        if not self.stop:
            return new
        text = self._held + new
        if not watch:
            self._held = ""
            return text
        places = [p for p in (text.find(s) for s in self.stop) if p >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, s) for s in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
