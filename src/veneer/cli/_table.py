"""Tables for terminals of any width: columns that do not fit are left out, least important first."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

WIDEST = 140


def terminal_width() -> int:
    """Columns of the terminal; of a pipe 100."""
    return min(WIDEST, shutil.get_terminal_size((100, 24)).columns)


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int | None = None,
    drop: Sequence[str] = (),
    right: Sequence[str] = (),
) -> str:
    """Columns that line up, at most `width` wide.

    drop: columns that may go, the first first. right: columns aligned to the right. When all that may go is
    gone, the last column is cut.
    """
    width = width or terminal_width()
    shown = list(range(len(head)))
    for name in drop:
        if _width(head, rows, shown) <= width:
            break
        shown = [i for i in shown if head[i] != name]
    widths = {i: max(len(row[i]) for row in [head, *rows]) for i in shown}
    over = _width(head, rows, shown) - width
    if over > 0:
        widths[shown[-1]] = max(8, widths[shown[-1]] - over)
    lines = []
    for row in [head, *rows]:
        cells = [
            cut(row[i], widths[i]).rjust(widths[i])
            if head[i] in right
            else cut(row[i], widths[i]).ljust(widths[i])
            for i in shown
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * widths[i] for i in shown))
    return "\n".join(lines)


def _width(head: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[int]) -> int:
    return sum(max(len(row[i]) for row in [head, *rows]) for i in shown) + 2 * (len(shown) - 1)


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(1, width - 1)] + "…"


def facts(pairs: Sequence[tuple[str, str]], width: int | None = None) -> str:
    """Lines `name  value`; long values go on below, indented as they began."""
    width = width or terminal_width()
    wide = max((len(name) for name, _ in pairs), default=0)
    lines: list[str] = []
    for name, value in pairs:
        for at, line in enumerate(str(value).split("\n")):
            lines += textwrap.wrap(
                line, width, initial_indent=f"{name if at == 0 else '':<{wide}}  ",
                subsequent_indent=" " * (wide + 2), break_long_words=False, break_on_hyphens=False,
            ) or [name]  # fmt: skip
    return "\n".join(lines)
