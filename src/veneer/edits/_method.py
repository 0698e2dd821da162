"""Method: a frozen dataclass of hyperparameters that declares tensors and pure functions at ports.

A method never holds state, never sees a module's forward, never names an architecture. Which ports it uses is read
off the functions that its class defines, so nothing is declared twice.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, dataclass_transform

from torch import Tensor

from veneer.anatomy import Site
from veneer.errors import BadOption, UnknownMethod, UnknownOption, nearest

from ._spec import Specs
from ._tensors import Tensors

Sites = str | Sequence[str] | Mapping[str, Any]  # a selector, or one a port

PORTS: dict[str, tuple[str, ...]] = {  # port -> functions that may define it
    "weight": ("delta", "weight", "branch"),
    "input": ("input",),
    "output": ("output",),
    "attention": ("attention",),
    "tokens": ("tokens",),
    "exit": ("exit",),
    "around": ("around",),
}
FUNCTIONS = tuple(f for functions in PORTS.values() for f in functions) + (
    "derive", "penalty", "condition", "affine", "low_rank", "start", "prepare", "remark",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a method declares about itself, beside its hyperparameters."""

    key: str
    paper: str
    family: str
    starts_as_identity: bool = True
    reason: str = ""  # why it does not start as the identity, or does not claim a law
    mergeable: bool | None = None  # None: weight edits and affine edits merge, others do not
    not_claimed: tuple[tuple[str, str], ...] = ()  # (law, reason)
    rates: tuple[float, float] = (1e-4, 3e-3)  # the range of learning rates to search
    certainty: str = "A"
    kinds: tuple[str, ...] = ()  # kinds of site that it can edit; () is any that its ports allow
    data: str = ""  # what `prepare` needs: "squared_gradients"; "" is nothing


class Method:
    """Base of all methods. Subclasses are made by `@method(...)`; each function below is optional.

    | function | at | gives |
    |---|---|---|
    | tensors(site) | plan | the declared tensors of one site |
    | start(site, W, t[, blocks]) | attach | starts that need the base's weight: {name: tensor} |
    | remark(site[, blocks]) | a printed plan | how it starts on this base, in words; "" for nothing |
    | prepare(sites) | attach with `data=` | starts that need data: {site name: {name: tensor}} |
    | also() | plan | other methods that belong to the same adapter |
    | condition(t, inputs) | once a call, before the first block | {name: (rows, ...)} |
    | derive(t, W) | once a call | tensors made from tensors, added to t |
    | delta(t, W), weight(t, W), branch(t, x[, y]) | weight | dW, W', or dy |
    | input(t, x), output(t, x, y[, residual]) | input, output | x', y' |
    | affine(t) | input, output | (scale, shift), when the edit is scale * . + shift: the engine merges it |
    | low_rank(t) | weight | (down, up), when branch is x down^T up^T without dropout; None where it is more |
    | attention(t, q, k, v, mask, attend) | attention | o |
    | tokens(t) | tokens | (length, width), put before the first real token |
    | exit(t, taps, h) | exit | the last hidden state |
    | around(t, call, x) | around | the block's output |
    | penalty(t) | training | a scalar for one site, added to the loss |

    Any of them may also name `at` (facts about the rows, see `At`). Functions broadcast: use `.mT` and negative axes.
    """

    facts: ClassVar[Facts]
    ports: ClassVar[tuple[str, ...]] = ()
    arguments: ClassVar[dict[str, tuple[str, ...]]] = {}
    sites: Sites
    broadcasts: ClassVar[bool] = True  # False: the engine runs adapters of a batch one after the other

    def tensors(self, site: Site) -> Specs:
        return {}

    def also(self) -> Sequence[Method]:
        return ()

    @property
    def key(self) -> str:
        return self.facts.key

    def options(self) -> dict[str, Any]:
        """Hyperparameters by name, as saved."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def non_default(self) -> dict[str, Any]:
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != _default(f)
        }

    def changed(self, **options: Any) -> Any:
        """The same method with other hyperparameters (aliases accepted)."""
        return dataclasses.replace(self, **resolve(type(self), options))  # type: ignore[type-var]

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.non_default().items())
        return f"{self.key}({inside})"


class WeightMethod(Method):
    """Edits W. Define `delta(t, W)`, or `weight(t, W)` for W' as a function of W; `branch(t, x)` where it factors."""


class OutputMethod(Method):
    """Edits what a module returns: `output(t, x, y[, at])`."""


class InputMethod(Method):
    """Edits what a module is given: `input(t, x[, at])`."""


class AttentionMethod(Method):
    """Edits an attention: `attention(t, q, k, v, mask, attend, at)`."""


class TokensMethod(Method):
    """Puts tokens before the first real one: `tokens(t[, at])`."""


class ExitMethod(Method):
    """Reads block outputs and writes the last hidden state: `exit(t, taps, h[, at])`."""


def hyper(
    default: Any,
    meaning: str,
    *,
    alias: str | tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    more_than: float | None = None,
    choices: Sequence[Any] = (),
    size: bool = False,
) -> Any:
    """A hyperparameter: its default, what it does to the result, and what it accepts.

    `alias` are HF PEFT's names. `size=True` marks the knob that sets the number of trained parameters.
    """
    aliases = (alias,) if isinstance(alias, str) else tuple(alias)
    metadata = {
        "meaning": meaning, "alias": aliases, "at_least": at_least, "at_most": at_most,
        "more_than": more_than, "choices": tuple(choices), "size": size,
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_REGISTRY: dict[str, type[Method]] = {}


@dataclass_transform(field_specifiers=(hyper,))
def method(
    key: str, *, paper: str, family: str, registered: bool = True, **facts: Any
) -> Callable[[type], Any]:
    """Register a method under `key`. Facts: see `Facts`. Works in any module, veneer's or a user's own.

    `registered=False` makes a part that other methods name in `also()`.
    """

    def register(cls: type) -> type:
        if not hasattr(cls, "sites"):
            raise BadOption(
                f"method '{key}' ({cls.__name__}) says no default for 'sites'.",
                next_step='add a line such as  sites: Sites = "attention.{query,value}"',
            )
        cls.facts = Facts(key=key, paper=paper, family=family, **facts)  # type: ignore[attr-defined]
        cls.__post_init__ = _check(cls, cls.__dict__.get("__post_init__"))  # type: ignore[attr-defined]
        made: Any = dataclasses.dataclass(frozen=True)(cls)
        made.ports = tuple(p for p, names in PORTS.items() if any(hasattr(made, n) for n in names))
        made.arguments = {
            name: tuple(inspect.signature(getattr(made, name)).parameters)[1:]
            for name in FUNCTIONS
            if hasattr(made, name)
        }
        if registered:
            _REGISTRY[key] = made
        return made

    return register


def _check(cls: Any, own: Any) -> Any:
    def __post_init__(self: Any) -> None:
        for f in dataclasses.fields(self):
            _check_value(cls.facts.key, f, getattr(self, f.name))
        if own is not None:
            own(self)

    return __post_init__


def _check_value(key: str, f: Any, value: Any) -> None:
    m = f.metadata
    if m.get("choices") and value not in m["choices"]:
        raise BadOption(
            f"{key}: {f.name}={value!r} is not one of {', '.join(map(repr, m['choices']))}.",
            nearest=nearest(str(value), [str(c) for c in m["choices"]]),
            next_step=f"veneer methods {key}    shows every option",
        )
    default = _default(f)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    wants_number = isinstance(default, (int, float)) and not isinstance(default, bool)
    if wants_number and value is not None and not is_number:
        raise BadOption(
            f"{key}: {f.name}={value!r} should be a number (the default is {default!r}).",
            next_step=f"veneer methods {key}    shows every option",
        )
    if wants_number and isinstance(default, int) and is_number and int(value) != value:
        raise BadOption(
            f"{key}: {f.name}={value!r} should be a whole number (the default is {default!r}).",
            next_step=f"veneer methods {key}    shows every option",
        )
    if not is_number:
        return
    for name, ok, words in (
        ("at_least", lambda v, b: v >= b, "at least"),
        ("at_most", lambda v, b: v <= b, "at most"),
        ("more_than", lambda v, b: v > b, "more than"),
    ):
        bound = m.get(name)
        if bound is not None and not ok(value, bound):
            raise BadOption(
                f"{key}: {f.name}={value!r} should be {words} {bound} ({m['meaning']}).",
                next_step=f"veneer methods {key}    shows every option",
            )


def _default(f: Any) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else None


def registry() -> dict[str, type[Method]]:
    """All registered methods by key; veneer's own are imported on first use, by the name of their package.

    By name, since the edits know no method: a file in `veneer.methods` is all that it takes.
    """
    importlib.import_module("veneer.methods")
    return _REGISTRY


def lookup(key: str) -> type[Method]:
    known = registry()
    if key not in known:
        raise UnknownMethod(
            f"no method is called '{key}'.",
            nearest=nearest(key, known),
            next_step="veneer methods    lists all of them",
        )
    return known[key]


def resolve(cls: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """Option names and aliases -> field names; an unknown one is an error with the nearest."""
    names: dict[str, str] = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        names[f.name] = f.name
        names.update(dict.fromkeys(f.metadata.get("alias", ()), f.name))
    names.setdefault("target_modules", "sites")
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name not in names:
            raise UnknownOption(
                f"{cls.facts.key} has no option '{name}' (given: {name}={value!r}).",
                nearest=nearest(name, names),
                next_step=f"veneer methods {cls.facts.key}    shows every option",
            )
        field = names[name]
        if field in found:
            raise BadOption(
                f"{cls.facts.key}: '{name}' and another name for '{field}' are both given; give one.",
                next_step=f"{field}= alone",
            )
        found[field] = value
    return found


def build(what: str | Method | type[Method], **options: Any) -> Method:
    """A method from its key, its class, or an instance (then options change it)."""
    if isinstance(what, Method):
        return what.changed(**options) if options else what
    cls = lookup(what) if isinstance(what, str) else what
    if not (isinstance(cls, type) and issubclass(cls, Method) and hasattr(cls, "facts")):
        raise UnknownMethod(
            f"{what!r} is not a method: expected a key such as 'lora', or a class made with @method.",
            next_step="veneer methods    lists all of them",
        )
    return cls(**resolve(cls, options))


def call(m: Method, function: str, t: Tensors | None, have: Mapping[str, Any]) -> Any:
    """m.function(t, ...) with the arguments that its signature names."""
    wanted = m.arguments[function]
    return getattr(m, function)(*(t if name == "t" else have[name] for name in wanted))


def delta_of(m: Method, t: Tensors, W: Tensor) -> Tensor:
    """dW of a weight edit, from `delta` or from `weight`."""
    if "delta" in m.arguments:
        return m.delta(t, W)  # type: ignore[attr-defined]
    return m.weight(t, W) - W  # type: ignore[attr-defined]
