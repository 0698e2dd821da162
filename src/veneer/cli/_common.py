"""What all commands share: their common options, what goes to which stream, and options of methods as typed.

Standard output is for results. With --json it carries one document and nothing else: whatever a library
prints meanwhile is sent to standard error.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from veneer.errors import BadOption, UnknownOption, nearest


class _State:
    """What the common options of the running command said."""

    def __init__(self) -> None:
        self.debug = self.quiet = False
        self.stdout: Any = None

    def reset(self) -> None:
        self.debug = self.quiet = False
        self.stdout = None

    def restore(self) -> None:
        if self.stdout is not None:
            sys.stdout, self.stdout = self.stdout, None


STATE = _State()


def _set_json(value: bool) -> bool:
    if value and STATE.stdout is None:
        STATE.stdout, sys.stdout = sys.stdout, sys.stderr
    return value


def _set_debug(value: bool) -> bool:
    STATE.debug = STATE.debug or value
    return value


def _set_quiet(value: bool) -> bool:
    STATE.quiet = STATE.quiet or value
    return value


AsJson = Annotated[
    bool,
    typer.Option("--json", help="one JSON document on standard output", callback=_set_json, is_eager=True),
]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks", callback=_set_debug, is_eager=True)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="no progress, no notes", callback=_set_quiet, is_eager=True)
]
Seed = Annotated[int, typer.Option("--seed", help="of everything that is drawn")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="of the base: float32, bfloat16, float16; default: its files'")
]
Matmul = Annotated[
    str | None,
    typer.Option("--matmul", help="how frozen weights multiply: plain (float32), packed, bf16, int8"),
]
Columns = Annotated[str | None, typer.Option("--columns", help="which column is what: text=...,label=...")]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="an option of the method: --option rank=8; --rank 8 too"),
]

OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}  # options of methods: --rank 8


def say(text: str) -> None:
    """A message for people, on standard error."""
    print(fitted(text, sys.stderr), file=sys.stderr, flush=True)


def fitted(text: str, stream: Any) -> str:
    """Long lines broken between words where `stream` is a terminal; for other programs lines stay whole."""
    if not stream.isatty():
        return text
    from veneer.cli._table import terminal_width

    lines: list[str] = []
    for line in text.split("\n"):
        hanging = " " * (len(line) - len(line.lstrip()) + 2)
        broken = textwrap.wrap(
            line, terminal_width(), subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False,
            drop_whitespace=True, replace_whitespace=False,
        )  # fmt: skip
        lines += broken or [""]
    return "\n".join(lines)


def note(text: str) -> None:
    """A message that --quiet leaves out."""
    if not STATE.quiet:
        say(text)


def result(value: Any, text: str | None = None) -> None:
    """The result: as JSON where --json was given, else `text` (default: as `value` prints)."""
    if STATE.stdout is not None:
        plain = value.to_dict() if hasattr(value, "to_dict") else value
        print(json.dumps(finite(plain), ensure_ascii=False, indent=2, default=_plain), file=STATE.stdout)
        STATE.stdout.flush()
    else:
        print(fitted(str(value) if text is None else text, sys.stdout))


def finite(value: Any) -> Any:
    """Nested values with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return finite(value.to_dict())
    if hasattr(value, "item"):
        return value.item()
    return str(value)


@contextlib.contextmanager
def show_notes() -> Iterator[None]:
    """Warnings as notes of one line; those of other libraries only with --debug."""

    def show(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
        if STATE.debug or "veneer" in filename.replace("\\", "/").split("/"):
            note(f"note: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def still() -> None:
    """Make transformers keep its loading bars and advice to itself; --debug lets them speak."""
    if STATE.debug:
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# -- options as typed -------------------------------------------------------------------------------


def value_of(text: str) -> Any:
    """What a typed value means: a number, true, false, none, a JSON list or object, else the text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(text)
    if text[:1] in ("[", "{") and text[-1:] in ("]", "}"):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def typed_options(given: Sequence[str] | None) -> dict[str, Any]:
    """`["rank=8", "sites=block"]` as {name: value}."""
    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise BadOption(f"--option {text!r} is not name=value.", next_step="--option rank=8")
        found[name.strip().replace("-", "_")] = value_of(value.strip())
    return found


def extra_options(arguments: Sequence[str], command: str) -> dict[str, Any]:
    """`["--rank", "8", "--rank-stabilized"]` as {name: value}; a flag without a value is true."""
    found: dict[str, Any] = {}
    left = list(arguments)
    while left:
        flag = left.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise BadOption(
                f"veneer {command}: '{flag}' is one argument too many.", next_step=f"veneer {command} --help"
            )
        name, equals, value = flag[2:].partition("=")
        if not equals:
            is_value = bool(left) and not left[0].startswith("--")
            value = left.pop(0) if is_value else "true"
        found[name.replace("-", "_")] = value_of(value)
    return found


def method_options(
    method: str, given: Mapping[str, Any], command: str, flags: Sequence[str] = ()
) -> dict[str, Any]:
    """`given`, after every name was found among the method's options and the engine's.

    A name that is neither is looked for among the flags of the command as well, so that --learning-rat finds
    --learning-rate.
    """
    from veneer.edits import lookup, resolve

    if not given:
        return {}
    cls = lookup(method)
    engine = ("exclude", "layers", "whole", "patterns", "rank_pattern", "alpha_pattern", "modules_to_save",
              "exclude_modules", "layers_to_transform", "allow_partial")  # fmt: skip
    for name, value in given.items():
        if name in engine:
            continue
        try:
            resolve(cls, {name: value})
        except UnknownOption as error:
            near = nearest(f"--{name.replace('_', '-')}", flags)
            raise UnknownOption(
                f"veneer {command} has no option '--{name.replace('_', '-')}', and {method} has no '{name}'.",
                nearest=[*near, *error.nearest],
                next_step=f"veneer methods {method}    shows the method's options; veneer {command} --help the others",
            ) from None
    return dict(given)


def arm_of(text: str) -> tuple[str, dict[str, Any]]:
    """`lora:rank=8` -> ("lora", {"rank": 8}); recipes have no place where nothing is trained."""
    from veneer.comparing import parse_arm

    arm = parse_arm(text)
    if arm.recipes:
        raise BadOption(
            f"'{text}' names a recipe, which acts in training alone.", next_step=f"{arm.method}, without +"
        )
    return arm.method, dict(arm.options)


def human(count: float, units: Sequence[str] = ("B", "KiB", "MiB", "GiB"), step: float = 1024) -> str:
    """1536 -> 1.5 KiB."""
    for unit in units[:-1]:
        if abs(count) < step:
            return f"{count:.0f} {unit}" if unit == units[0] else f"{count:.1f} {unit}"
        count /= step
    return f"{count:.1f} {units[-1]}"
