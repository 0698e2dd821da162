"""Arms: what is compared, written as people type it.

An arm is `method[:option=value,...][+recipe[:option=value,...]]`, in Python and on the command line alike:
`lora:rank=16,sites=attention.{query,value}+lora_plus`. Its text in normal form (options sorted, defaults not
filled in) is its identity: in the ledger, in the results and in the report.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from veneer._written import NAME, named_options, pieces, typed
from veneer.errors import BadOption, UnknownMethod, UnknownName, nearest

CONTROLS = ("untrained", "linear_probe", "full")
"""In every comparison: nothing trained, only the head trained, everything trained."""

ANCHOR = "lora"
"""What all comparisons have in common, so that they can be read beside each other."""

OPTIONAL_CONTROLS = ("random_direction", "duplicate", "broken_scale")
"""Made from the anchor; see `veneer.comparing.planning.controls`."""


@dataclass(frozen=True)
class Recipe:
    """What happens around training, by name, with its options."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return _join(self.name, self.options)


@dataclass(frozen=True)
class Arm:
    """One line of the comparison: a method with options, and recipes. `str(arm)` is its normal form."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()
    recipes: tuple[Recipe, ...] = field(default=())

    def __str__(self) -> str:
        return "+".join([_join(self.method, self.options), *map(str, self.recipes)])

    @property
    def slug(self) -> str:
        """A folder name: readable, and different for different arms."""
        import hashlib

        text = str(self)
        plain = re.sub(r"[^\w.-]+", "-", text).strip("-")[:60]
        return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def is_trained(self) -> bool:
        return self.method != "untrained"

    @property
    def anchor(self) -> Arm:
        """The arm that a control is made from; an arm that is no control is its own."""
        return replace(self, method=ANCHOR) if self.method in OPTIONAL_CONTROLS else self

    def as_control(self, name: str) -> Arm:
        return replace(self, method=name)

    @property
    def takes_rate_of_anchor(self) -> bool:
        """Without trials of its own: it runs at the rate that its anchor chose."""
        return self.method in ("random_direction", "broken_scale")


def parse_arm(
    text: str | Arm,
    methods: Iterable[str] | None = None,
    recipes: Iterable[str] | None = None,
) -> Arm:
    """The arm that `text` names.

    `methods` and `recipes` are the names that exist; without them any name is accepted. Quotes, brackets and
    braces protect commas and plus signs in a value. Errors: UnknownMethod, UnknownName, BadOption.
    """
    if isinstance(text, Arm):
        return text
    first, *rest = [part.strip() for part in pieces(text, "+")]
    method, options = _named(first, text)
    known = None if methods is None else {*methods, *CONTROLS, *OPTIONAL_CONTROLS}
    if known is not None and method not in known:
        raise UnknownMethod(
            f"no method is called '{method}' (in the arm '{text}').",
            nearest=nearest(method, known),
            next_step="veneer methods            lists all of them",
        )
    found = []
    for part in rest:
        name, recipe_options = _named(part, text)
        if recipes is not None and name not in set(recipes):
            raise UnknownName(
                f"no recipe is called '{name}' (in the arm '{text}').",
                nearest=nearest(name, recipes),
                next_step="quote a value that holds a plus sign: method:option='a+b'+recipe",
            )
        found.append(Recipe(name, recipe_options))
    return Arm(method, options, tuple(found))


def parse_arms(
    wanted: str | Iterable[str | Arm],
    methods: Iterable[str] | None = None,
    recipes: Iterable[str] | None = None,
    families: Mapping[str, str] | None = None,
) -> tuple[Arm, ...]:
    """The arms of a comparison in the order given, with the controls in front.

    With `families` ({method: family}) a family or the beginning of one ("additive", "additive/prompt") stands
    for its methods, and "all" for all of them.
    A string is split at commas (`"lora,dora:rank=4,alpha=8"` is two arms: a piece that holds `=` belongs to
    the arm before it). An arm named twice is an error: its two lines could not be told from each other.
    """
    known = None if methods is None else list(methods)
    recipe_names = None if recipes is None else list(recipes)
    listed = split_arms(wanted) if isinstance(wanted, str) else list(wanted)
    texts = [one for text in listed for one in _members(text, families or {})]
    arms = [parse_arm(text, known, recipe_names) for text in texts]
    named = [str(arm) for arm in arms]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise BadOption(
            f"arms are named twice: {', '.join(twice)}.",
            next_step="name each arm once; seeds=N repeats it",
        )
    controls = [Arm(name) for name in CONTROLS if name not in named]
    return (*controls, *arms)


def _members(text: str | Arm, families: Mapping[str, str]) -> list[str | Arm]:
    if text in families or not isinstance(text, str):
        return [text]
    found = [m for m, family in families.items() if text == "all" or f"{family}/".startswith(f"{text}/")]
    return [m for m in found if m not in CONTROLS] or [text]


def split_arms(text: str) -> list[str]:
    """`"a,b:x=1,y=2"` -> `["a", "b:x=1,y=2"]`."""
    arms: list[str] = []
    for piece in pieces(text, ","):
        is_option = arms and ":" in arms[-1] and _is_assignment(piece)
        if is_option:
            arms[-1] += "," + piece
        elif piece.strip():
            arms.append(piece.strip())
    return arms


def _is_assignment(piece: str) -> bool:
    name, equals, _ = piece.partition("=")
    return bool(equals) and ":" not in name and NAME.fullmatch(name.strip()) is not None


def _named(part: str, whole: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    name, options = named_options(part, whole)
    return name, tuple(sorted(options.items()))


def _join(name: str, options: tuple[tuple[str, Any], ...]) -> str:
    if not options:
        return name
    return name + ":" + ",".join(f"{key}={_text(value)}" for key, value in options)


def _text(value: Any) -> str:
    """What reads back as the same value: quoted where it would not read back plain."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if not isinstance(value, str):
        return repr(value)
    if _reads_back(value):
        return value
    return f'"{value}"' if '"' not in value else f"'{value}'"


def _reads_back(value: str) -> bool:
    if not value or value != value.strip() or typed(value) != value or set(value) & set("'\""):
        return False
    return all(list(pieces(f"{value}{at}next", at)) == [value, "next"] for at in ",+")
