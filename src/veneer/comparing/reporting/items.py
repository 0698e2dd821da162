"""Test items as a person sees them: the text of a row, or a small picture, bounded in size.

They stand in `items.jsonl` of a compare folder, a line an item: `item`, `text`, and where there is one `image`
(a picture as a data URI, at most 96 pixels wide). The report shows them where arms disagree.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.comparing.running.ledger import write_atomic

FILE = "items.jsonl"
LONGEST_TEXT = 320
SIDE = 96
TEXT_ROLES = ("text", "question", "context", "query", "document", "source", "prompt")

Shown = dict[str, Any]


def described(row: Mapping[str, Any]) -> Shown:
    """{"text", "image"} of a data row under the names of roles (see `veneer.data`)."""
    parts = [str(row[role]) for role in TEXT_ROLES if row.get(role)]
    if row.get("tokens"):
        parts.append(" ".join(str(token) for token in row["tokens"]))
    if row.get("messages"):
        asked = [m.get("content", "") for m in row["messages"] if m.get("role") == "user"]
        parts.append(str(asked[-1]) if asked else "")
    found: Shown = {"text": clean(" | ".join(parts))}
    image = row.get("image")
    if image is not None:
        found["image"] = thumbnail(image)
    if not found["text"]:
        place = next((row[role] for role in ("image", "audio") if isinstance(row.get(role), str)), "")
        found["text"] = clean(Path(place).name) if len(place) < 500 else ""
    return found


def clean(text: str, most: int = LONGEST_TEXT) -> str:
    """One line, without characters that no file can hold, cut to `most`."""
    text = " ".join(text.encode("utf-8", "replace").decode().replace("\0", " ").split())
    return text if len(text) <= most else text[: most - 1] + "…"


def thumbnail(image: Any, side: int = SIDE) -> str | None:
    """A picture as a data URI of a JPEG, or None where it cannot be read."""
    from veneer.errors import VeneerError
    from veneer.tasks._media import picture

    try:
        small = picture(image)
        small.thumbnail((side, side))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=68)
    except (VeneerError, OSError, ValueError):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_items(
    folder: Path,
    wanted: Sequence[str],
    opened: Iterable[Mapping[str, Any] | None],
    show: Callable[[Sequence[str]], Mapping[str, Shown]] | None,
) -> None:
    """Write items.jsonl for the items in `wanted`: as `show` (of a trainer) tells them, else by the `text` that
    stands beside the scores. What is there already stays where neither knows anything.
    """
    found: dict[str, Shown] = {}
    for one in opened:
        for item in (one or {}).get("items", ()):
            if item.get("text") and item["item"] not in found:
                found[item["item"]] = {"text": clean(str(item["text"]))}
    if show is not None:
        found |= show(list(wanted))
    lines = [{"item": item, **found[item]} for item in wanted if item in found]
    if lines:
        write_atomic(folder / FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
