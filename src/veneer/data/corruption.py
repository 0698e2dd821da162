"""Corrupted copies of test rows: what people and cameras do to text and pictures, at fixed seeds and severities.

Pure functions: the same row, kind, severity and seed give the same corruption, wherever the row stands and whatever
was corrupted before. The severities of noise and contrast are those of ImageNet-C (Hendrycks and Dietterich, 2019,
arXiv:1903.12261); those of text are the share of words that is hit.
"""

from __future__ import annotations

import hashlib
import io
import random
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veneer.errors import BadOption, UnknownName, missing_package, nearest

SEVERITIES = (1, 2, 3, 4, 5)
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)  # of words, by severity
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of values in [0, 1]
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # what is left of the distance to the mean
BLUR = (0.01, 0.02, 0.03, 0.045, 0.06)  # radius, of the shorter side
COVERED = (0.05, 0.1, 0.2, 0.3, 0.4)  # of the area
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
TEXT_ROLES = {
    "classify": ("text", "text_pair"),
    "multilabel": ("text", "text_pair"),
    "regress": ("text", "text_pair"),
    "qa": ("question",),
    "vqa": ("question",),
    "rank": ("query",),
    "seq2seq": ("source",),
}
"""What is read, and not also what is predicted."""


def typos(word: str, draw: random.Random) -> str:
    """One key next to the right one, one letter lost, or one doubled."""
    place = draw.randrange(len(word))
    letter, how = word[place], draw.choice(("next", "lost", "doubled"))
    if how == "next":
        return word[:place] + _next_key(letter, draw) + word[place + 1 :]
    if how == "lost" and len(word) > 1:
        return word[:place] + word[place + 1 :]
    return word[:place] + 2 * letter + word[place + 1 :]


def swaps(word: str, draw: random.Random) -> str:
    """Two neighbouring letters change places; words of one letter stay."""
    if len(word) < 2:
        return word
    place = draw.randrange(len(word) - 1)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def drops(word: str, draw: random.Random) -> str:
    """The word is lost."""
    return ""


def case(word: str, draw: random.Random) -> str:
    """Capitals, or none, or the other way round."""
    changed = [word.upper(), word.lower(), word.swapcase()]
    return draw.choice([one for one in changed if one != word] or [word])


def _next_key(letter: str, draw: random.Random) -> str:
    row = next((row for row in ROWS if letter.lower() in row), None)
    if row is None:
        return draw.choice(string.ascii_lowercase)
    place = row.index(letter.lower())
    found = draw.choice([row[at] for at in (place - 1, place + 1) if 0 <= at < len(row)])
    return found.upper() if letter.isupper() else found


def noise(pixels: Any, severity: int, draw: Any) -> Any:
    """Gaussian noise, independent for each value. pixels: (height, width, 3) in [0, 1]; so below."""
    return pixels + NOISE[severity - 1] * draw.standard_normal(pixels.shape)


def blur(pixels: Any, severity: int, draw: Any) -> Any:
    """Out of focus: a Gaussian whose width is a share of the shorter side."""
    import numpy as np
    from PIL import Image, ImageFilter

    image = Image.fromarray((255 * pixels).round().astype(np.uint8))
    radius = BLUR[severity - 1] * min(pixels.shape[:2])
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius))) / 255


def contrast(pixels: Any, severity: int, draw: Any) -> Any:
    """Every value closer to the picture's mean."""
    mean = pixels.mean((0, 1), keepdims=True)
    return mean + CONTRAST[severity - 1] * (pixels - mean)


def occlusion(pixels: Any, severity: int, draw: Any) -> Any:
    """A grey rectangle of the picture's form, somewhere inside."""
    height, width = (round(size * COVERED[severity - 1] ** 0.5) for size in pixels.shape[:2])
    top, left = draw.integers(pixels.shape[0] - height + 1), draw.integers(pixels.shape[1] - width + 1)
    covered = pixels.copy()
    covered[top : top + height, left : left + width] = 0.5
    return covered


TEXT: dict[str, Callable[[str, random.Random], str]] = {
    "typos": typos,
    "swaps": swaps,
    "drops": drops,
    "case": case,
}
IMAGE: dict[str, Callable[[Any, int, Any], Any]] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "occlusion": occlusion,
}


def corrupt_text(text: str, kind: str, severity: int = 3, seed: int = 0) -> str:
    """`text` with a share of its words corrupted, at least one of them, and never all lost."""
    words = text.split(" ")
    changed = corrupt_words(words, kind, severity, seed)
    return " ".join(new for old, new in zip(words, changed, strict=True) if new or not old)


def corrupt_words(words: Sequence[str], kind: str, severity: int = 3, seed: int = 0) -> list[str]:
    """As many words, of which a share is corrupted; a lost word is empty, and an empty one stays."""
    changed = list(words)
    real = [place for place, word in enumerate(words) if word]
    draw = random.Random(_seed("\n".join(words), kind, severity, seed))
    count = min(max(1, round(SHARES[severity - 1] * len(real))), len(real) - (kind == "drops"))
    for place in draw.sample(real, max(0, count)):
        changed[place] = TEXT[kind](changed[place], draw)
    return changed


def corrupt_image(image: Any, kind: str, severity: int = 3, seed: int = 0) -> bytes:
    """A PIL picture -> the bytes of a PNG with the corruption."""
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise missing_package("pillow", "vision", "corrupting pictures") from error
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    draw = np.random.default_rng(_seed(pixels.tobytes(), kind, severity, seed))
    changed = np.clip(IMAGE[kind](pixels, severity, draw), 0, 1)
    file = io.BytesIO()
    Image.fromarray((255 * changed).round().astype(np.uint8)).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _seed(what: str | bytes, kind: str, severity: int, seed: int) -> int:
    data = what.encode("utf-8", "surrogatepass") if isinstance(what, str) else what
    start = hashlib.sha256(f"{kind}/{severity}/{seed}/".encode())
    start.update(data)
    return int.from_bytes(start.digest()[:8], "big")


def corrupt_row(
    row: Mapping[str, Any],
    task: str,
    kind: str,
    severity: int = 3,
    seed: int = 0,
    opened: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """A copy of `row` with what is read corrupted, and all else as it was. opened: from a row's image to PIL."""
    changed = dict(row)
    if kind in IMAGE:
        assert opened is not None
        return changed | {"image": corrupt_image(opened(row["image"]), kind, severity, seed)}
    if task == "tag":  # word by word, so that each keeps its tag
        return changed | {"tokens": corrupt_words(row["tokens"], kind, severity, seed)}
    roles = [role for role in TEXT_ROLES[task] if row.get(role) is not None]
    return changed | {role: corrupt_text(str(row[role]), kind, severity, seed) for role in roles}


def parse_corruptions(wanted: str | list[str] | tuple[str, ...], task: str) -> list[tuple[str, int]]:
    """`"typos,case:5"` or `"all"` -> [(kind, severity)], for the kinds that fit the task.

    Errors: UnknownName for a kind, BadOption for a severity that is not 1 to 5 or a kind that does not fit.
    """
    fitting = _fitting(task)
    pieces = wanted.split(",") if isinstance(wanted, str) else [p for text in wanted for p in text.split(",")]
    found = []
    for piece in (text.strip() for text in pieces if text.strip()):
        kind, _, level = piece.partition(":")
        if kind not in {"all", *TEXT, *IMAGE}:
            known = [*TEXT, *IMAGE]
            raise UnknownName(f"no corruption is called '{kind}'.", nearest=nearest(kind, known) or known,
                              next_step="--corrupt typos,swaps:5 or --corrupt all")  # fmt: skip
        if level and level not in map(str, SEVERITIES):
            raise BadOption(f"the severity of '{piece}' is '{level}': expected a number from 1 to 5.",
                            next_step=f"--corrupt {kind}:3")  # fmt: skip
        if kind != "all" and kind not in fitting:
            raise BadOption(f"the corruption '{kind}' does not fit the task '{task}'.", nearest=fitting,
                            next_step="--corrupt all takes those that fit")  # fmt: skip
        kinds = fitting if kind == "all" else [kind]
        found += [(one, int(level or 3)) for one in kinds]
    return list(dict.fromkeys(found))


def _fitting(task: str) -> list[str]:
    if task == "image-classify":
        return list(IMAGE)
    if task == "tag":
        return [kind for kind in TEXT if kind != "drops"]
    if task in TEXT_ROLES:
        return list(TEXT)
    raise BadOption(
        f"test rows of the task '{task}' cannot be corrupted: what is read there is also what is predicted, or sound.",
        next_step="leave --corrupt out; --shifted DATA measures on other test sets",
    )
