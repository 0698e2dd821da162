"""The kinds of values that fields of a comparison file have: each checks one, and gives it in one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veneer.comparing.planning.arms import split_arms
from veneer.errors import UnknownName, nearest

DATA_FIELDS = ("data", "name", "task", "metric", "columns", "group", "sizes", "split", "smallest_effect", "groups",
               "shifted", "corrupt", "forgetting")  # fmt: skip
"""What one [[data]] table may say; what it does not say is as for all."""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return split_arms(value)
    return [_text(one) for one in _listed(value)]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise TypeError
    return list(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise TypeError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _share(value: Any) -> Any:
    return value if isinstance(value, str) else _number(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError
    return value


def _seeds(value: Any) -> Any:
    return _count(value) if isinstance(value, int) else [_count(one) for one in _listed(value)]


def _rates(value: Any) -> dict[str, list[float]]:
    if not isinstance(value, Mapping):
        raise TypeError
    return {str(arm): [_number(rate) for rate in _listed(rates)] for arm, rates in value.items()}


def _pairs(value: Any) -> list[tuple[str, str]]:
    found = []
    for pair in _listed(value):
        first, second = _texts(pair)  # "lora,dora", or a list of two
        found.append((first, second))
    return found


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    return dict(value)


def _data(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    tables = [value] if isinstance(value, Mapping) else _listed(value)
    found = [{"data": _text(one)} if isinstance(one, str) else _data_table(_table(one)) for one in tables]
    if not found:
        raise ValueError
    return found


def _data_table(table: dict[str, Any]) -> dict[str, Any]:
    table = {{"path": "data", "spec": "data"}.get(str(key), str(key)): value for key, value in table.items()}
    for key in table:
        if key not in DATA_FIELDS:
            raise UnknownName(
                f"a [[data]] table has no field '{key}'.",
                nearest=nearest(key, DATA_FIELDS) or DATA_FIELDS,
                next_step="fields of all data sets stand above the first [[data]]",
            )
    table["data"] = _text(table.get("data"))
    return table


KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "text": ("a text", _text),
    "texts": ("a list of texts, or one text with commas", _texts),
    "data": ("a text, or [[data]] tables", _data),
    "number": ("a number", _number),
    "flag": ("true or false", _flag),
    "share": ("a part, as 2% or 0.02", _share),
    "count": ("a whole number, not below 0", _count),
    "seeds": ("a whole number, or a list of them", _seeds),
    "rates": ("a table of lists of numbers, by arm or method", _rates),
    "pairs": ("a list of pairs of arms", _pairs),
    "table": ("a table", _table),
    "any": ("a value", lambda value: value),
}
