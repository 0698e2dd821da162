"""Recipe: what happens around training, beside the method that is trained.

A recipe is a frozen dataclass of options. It may sort an adapter's tensors into other groups (`regroup`),
makes the optimiser, and says whether a step needs a backward pass. It knows names and shapes of tensors, and
no method.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, dataclass_transform

import torch

from veneer.anatomy import Site
from veneer.edits import Spec, hyper
from veneer.errors import BadOption, UnknownName, UnknownOption, nearest

Group = dict[str, Any]  # params: [a flat leaf], lr, weight_decay, views: [(label, shape, start, stop), ...]
View = tuple[str, tuple[int, ...], int, int]  # leaf[start:stop].view(shape) is the tensor called `label`


class Recipe:
    """Base of all recipes. Each function is optional; the defaults train with AdamW as it comes."""

    key: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    backward: ClassVar[bool] = True  # False: the optimiser's `step(closure)` does all, without gradients
    rates: ClassVar[tuple[float, float] | None] = None  # learning rates to search; None: the method's own

    def regroup(self, site: Site, name: str, spec: Spec) -> tuple[str, float] | None:
        """(group, factor of the learning rate) of a trained tensor; None leaves it where it is."""
        return None

    def optimizer(self, groups: list[Group], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """The optimiser of these groups. Its `state_dict` holds all that the next step depends on."""
        return adamw(groups, lr)

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def __str__(self) -> str:
        given = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return self.key + (":" + ",".join(given) if given else "")


def adamw(groups: list[Group], lr: float, **options: Any) -> torch.optim.AdamW:
    """torch's fused AdamW over flat leaves, one kernel a leaf; views are not its business."""
    bare = [{name: value for name, value in group.items() if name != "views"} for group in groups]
    fused = {p.device.type for group in bare for p in group["params"]} <= {"cpu", "cuda"}
    return torch.optim.AdamW(bare, lr=lr, fused=fused, **options)


_REGISTRY: dict[str, type[Recipe]] = {}


@dataclass_transform(field_specifiers=(hyper,))
def recipe(key: str, *, paper: str = "", **facts: Any) -> Callable[[type], Any]:
    """Register a recipe under `key`. Facts are class attributes: `backward`, `rates`."""

    def register(cls: type) -> Any:
        for name, value in {"key": key, "paper": paper, **facts}.items():
            setattr(cls, name, value)
        cls.__post_init__ = _check  # type: ignore[attr-defined]
        made: Any = dataclasses.dataclass(frozen=True)(cls)
        _REGISTRY[key] = made
        return made

    return register


def _check(self: Any) -> None:
    bounds = {
        "at_least": ("at least", lambda v, b: v >= b),
        "at_most": ("at most", lambda v, b: v <= b),
        "more_than": ("more than", lambda v, b: v > b),
    }
    for f in dataclasses.fields(self):
        value = getattr(self, f.name)
        numeric = isinstance(f.default, (int, float)) and not isinstance(f.default, bool)
        if numeric and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise BadOption(
                f"{self.key}: {f.name}={value!r} should be a number (the default is {f.default!r}).",
                next_step=f"{self.key}:{f.name}={f.default!r}",
            )
        for name, (words, holds) in bounds.items():
            bound = f.metadata.get(name)
            if bound is not None and not holds(value, bound):
                raise BadOption(
                    f"{self.key}: {f.name}={value!r} should be {words} {bound} ({f.metadata['meaning']}).",
                    next_step=f"{self.key}:{f.name}={f.default!r}",
                )


def registry() -> dict[str, type[Recipe]]:
    """All recipes by key."""
    importlib.import_module("veneer.recipes")
    return _REGISTRY


def lookup(key: str) -> type[Recipe]:
    known = registry()
    if key not in known:
        raise UnknownName(
            f"no recipe is called '{key}'.",
            nearest=nearest(key, known) or sorted(known),
            next_step="recipes go behind the method: lora+lora_plus:ratio=16",
        )
    return known[key]


def parse(what: str | Recipe | type[Recipe] | None, **options: Any) -> Recipe | None:
    """A recipe from "key", "key:option=value,option=value", a class or an instance; None stays None.

    Also takes what has a `name` and pairs of `options`, as the recipes of an arm have.
    """
    if what is None or isinstance(what, Recipe):
        return dataclasses.replace(what, **options) if what is not None and options else what  # type: ignore[type-var]
    if isinstance(what, type):
        return what(**options)
    if not isinstance(what, str):
        return _build(what.name, {**dict(what.options), **options})
    key, _, text = what.partition(":")
    given = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise BadOption(
                f"recipe '{what}': '{part}' should be option=value.", next_step=f"{key}:{part}=VALUE"
            )
        given[name.strip()] = value.strip()
    return _build(key.strip(), {**given, **options})


def _build(key: str, given: Mapping[str, Any]) -> Recipe:
    cls = lookup(key)
    names = {f.name: f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        names |= dict.fromkeys(f.metadata.get("alias", ()), f.name)
    found = {}
    for name, value in given.items():
        if name not in names:
            raise UnknownOption(
                f"recipe '{key}' has no option '{name}' (given: {name}={value!r}).",
                nearest=nearest(name, names) or sorted(names),
                next_step=f"{key}:" + ",".join(f"{n}=VALUE" for n in sorted(set(names.values()))),
            )
        found[names[name]] = _value(value)
    return cls(**found)


def _value(text: Any) -> Any:
    """ "16" -> 16, "1e-3" -> 0.001, "true" -> True; other words stay words."""
    if not isinstance(text, str):
        return text
    word = {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return text


def describe() -> list[dict[str, Any]]:
    """What there is: key, paper, first line, options with meaning and default."""
    found = []
    for key, cls in sorted(registry().items()):
        module = inspect.getdoc(inspect.getmodule(cls)) or ""
        options = {
            f.name: {"default": f.default, "meaning": f.metadata.get("meaning", "")}
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        }
        found.append(
            {"key": key, "paper": cls.paper, "summary": module.partition("\n")[0], "options": options}
        )
    return found


def labels(groups: Iterable[Group]) -> list[tuple[str, tuple[int, ...]]]:
    """(label, shape) of every tensor in the groups."""
    return [(label, tuple(shape)) for group in groups for label, shape, _, _ in group.get("views", ())]
