"""adapter_config.json: checked against a table of fields, missing keys as HF PEFT 0.21.2 reads them.

A field has HF PEFT's default and the kind of value that it takes. A field that veneer cannot express has to stay at
its default; a key that nobody knows is kept, with a warning.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.engine._store import inside
from veneer.errors import BadFile, Unsupported, nearest

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
VERSION = "0.21.2"  # the release whose fields and defaults are meant

COMMON = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version",
)  # fmt: skip


@dataclass(frozen=True)
class Field:
    """One field of a type's config. `supported=False`: only the default (or nothing) can be expressed."""

    default: Any
    kind: str = "any"
    supported: bool = True
    why: str = ""


def only(default: Any, why: str = "") -> Field:
    """A field that has to stay at its default."""
    return Field(default, "any", False, why)


TARGETS: dict[str, Field] = {
    "target_modules": Field(None, "names"),
    "exclude_modules": Field(None, "names"),
    "modules_to_save": Field(None, "list of names"),
    "layers_to_transform": Field(None, "numbers"),
    "layers_pattern": Field(None, "names"),
    "fan_in_fan_out": Field(False, "any"),  # read off the module itself, as HF PEFT does
}


class Config(Mapping[str, Any]):
    """A folder's config: values by field, HF PEFT's defaults where the file is silent."""

    def __init__(self, path: Path, raw: dict[str, Any], fields: Mapping[str, Field]) -> None:
        self.path, self.raw, self.fields = path, raw, fields
        self.unknown = {k: v for k, v in raw.items() if k not in fields and k not in COMMON}
        self._values = {name: self._value(name, field) for name, field in fields.items()}
        kept = [k for k, v in self.unknown.items() if v not in (None, False, "", [], {})]
        if kept:
            warnings.warn(
                f"'{path}': {', '.join(sorted(kept))} unknown to HF PEFT {VERSION} as veneer reads it; kept, without "
                "effect.",
                stacklevel=6,
            )

    def _value(self, name: str, field: Field) -> Any:
        value = self.raw.get(name, field.default)
        if value is None and field.default in ({}, [], ()):
            value = field.default
        if not field.supported:
            if value != field.default and value not in (None, False, {}, []):
                raise Unsupported(
                    f"{self.peft_type}: {name}={_short(value)} has no form here{field.why and ': ' + field.why}.",
                    next_step=f"an adapter whose {name} is {field.default!r}",
                )
            return field.default
        wrong = _wrong(value, field.kind) if value != field.default or isinstance(value, bool) else ""
        if wrong:
            raise BadFile(
                f"'{self.path}': {name}={_short(value)}; {wrong} was expected.",
                next_step=f"correct {name} in that file, or copy it again",
            )
        return value

    @property
    def peft_type(self) -> str:
        return str(self.raw["peft_type"])

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def kept(self) -> dict[str, Any]:
        """What is carried along without effect, to be written again: who made it, for which base, unknown keys."""
        common = {k: self.raw[k] for k in ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
                  if self.raw.get(k) is not None}  # fmt: skip
        return {"peft_type": self.peft_type, **common, "unknown": self.unknown}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


_KINDS: dict[str, tuple[str, Any]] = {
    "any": ("anything", lambda v: True),
    "whole": ("a whole number", _is_whole),
    "number": ("a number", _is_number),
    "text or nothing": ("a text", lambda v: v is None or isinstance(v, str)),
    "flag": ("true or false", lambda v: isinstance(v, bool)),
    "text": ("a text", lambda v: isinstance(v, str)),
    "names": (
        "a list of names, or one expression",
        lambda v: v is None or isinstance(v, str) or _is_names(v),
    ),
    "list of names": ("a list of names", lambda v: v is None or _is_names(v)),
    "numbers": (
        "a whole number or a list of them",
        lambda v: v is None or _is_whole(v) or (isinstance(v, list) and all(map(_is_whole, v))),
    ),
    "numbers by name": (
        "numbers by name",
        lambda v: isinstance(v, dict) and all(_is_number(n) for n in v.values()),
    ),
    "tokens": (
        "token ids, or token ids by module",
        lambda v: (
            v is None or _is_tokens(v) or (isinstance(v, dict) and all(_is_tokens(ids) for ids in v.values()))
        ),
    ),
    "masks by name": (
        "lists of true and false by name",
        lambda v: (
            v is None
            or (
                isinstance(v, dict)
                and all(isinstance(m, list) and all(isinstance(x, bool) for x in m) for m in v.values())
            )
        ),
    ),
    "start": ("true, false or the name of a start", lambda v: isinstance(v, bool | str)),
}


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(_is_whole(v) and v >= 0 for v in value)


def _wrong(value: Any, kind: str) -> str:
    words, good = _KINDS[kind]
    return "" if good(value) else words


def read_json(folder: Path, name: str = CONFIG) -> tuple[Path, dict[str, Any]]:
    """The config's path and content. Raises BadFile."""
    path = inside(folder, name)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError, OSError) as e:
        raise BadFile(f"'{path}' is not readable as JSON ({e}).", next_step="copy it again") from None
    if not isinstance(raw, dict):
        raise BadFile(
            f"'{path}' should hold an object of options, it holds a {type(raw).__name__}.",
            next_step="copy adapter_config.json again",
        )
    return path, raw


def type_of(
    path: Path, raw: Mapping[str, Any], known: Mapping[str, Any], supported: Mapping[str, str]
) -> str:
    """The folder's PEFT type. `supported`: type -> veneer's method; `known`: type -> the nearest of them."""
    value = raw.get("peft_type")
    if not isinstance(value, str):
        if "architecture" in raw or "config" in raw:
            raise Unsupported(
                f"'{path}' has no peft_type: it looks like an AdapterHub folder, not one of HF PEFT.",
                next_step="train it anew with veneer: veneer methods    lists AdapterHub's methods too",
            )
        raise BadFile(
            f"'{path}' does not say its peft_type.",
            nearest=sorted(supported)[:3],
            next_step='"peft_type": "LORA" in that file',
        )
    if value in supported:
        return value
    if value in known:
        near = known[value]
        names = [n for n in (near, *supported) if n][:3]
        raise Unsupported(
            f"'{path}' is of type {value}, which veneer does not read; it reads {', '.join(sorted(supported))}.",
            nearest=[f"{n} ({supported[n]})" for n in dict.fromkeys(names) if n in supported],
            next_step="HF PEFT itself: merge_and_unload() and save_pretrained(folder) make a plain base of it",
        )
    raise BadFile(
        f"'{path}': peft_type={_short(value)} is no type of HF PEFT {VERSION}.",
        nearest=nearest(value, supported) or sorted(supported)[:3],
        next_step="copy the folder again, or save it with HF PEFT 0.21.2",
    )


def version_of(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """(0, 21, 2) of "0.21.2"; (0,) where the file does not say."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(raw.get("peft_version", "")))
    return tuple(int(n or 0) for n in found.groups()) if found else (0,)
