"""The class swap: an edited module becomes an instance of a generated subclass of its own class.

Names, `isinstance`, `state_dict` keys, deepcopy and pickle hold, since the object stays the object; taking the class
back is the whole of detaching. One subclass is generated for each (class, kind), with wrappers of its own, so that
signatures stay those of the base.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from veneer.errors import Unsupported

_CLASSES: dict[tuple[type, str], type] = {}
_KINDS: dict[str, Callable[[type], dict[str, Any]]] = {}

HOST, NAME, PLAIN = "_veneer_host", "_veneer_name", "_veneer_plain"


def kind(name: str) -> Callable[[Any], Any]:
    """Register what a generated class of this kind adds: a function (base class) -> class attributes."""

    def register(make: Callable[[type], dict[str, Any]]) -> Any:
        _KINDS[name] = make
        return make

    return register


def swapped_class(base: type, kinds: tuple[str, ...]) -> type:
    """The generated subclass of `base` for these kinds, made once."""
    name = "+".join(kinds)
    made = _CLASSES.get((base, name))
    if made is None:
        attributes: dict[str, Any] = {
            "__reduce_ex__": _reduce,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
        }
        attributes[PLAIN] = base
        attributes["_veneer_kinds"] = kinds
        made = base
        for each in kinds:
            made = type(base.__name__, (made,), {**attributes, **_KINDS[each](made)})
        made.__qualname__ = base.__qualname__
        _CLASSES[(base, name)] = made
    return made


def plain_class(module: nn.Module) -> type:
    return getattr(type(module), PLAIN, type(module))


def kinds_of(module: nn.Module) -> tuple[str, ...]:
    return getattr(type(module), "_veneer_kinds", ())


def swap(module: nn.Module, name: str, host: Any, kind: str) -> None:
    """Give `module` one kind more; the order of kinds is fixed, so that classes are shared."""
    _rebind_instance_forward(module, name)
    base, kinds = plain_class(module), kinds_of(module)
    if kind in kinds:
        return
    module.__dict__[HOST], module.__dict__[NAME] = host, name
    ordered = tuple(
        k
        for k in ("statistics", "site", "attention", "pooler", "block", "backbone", "door")
        if k in (*kinds, kind)
    )
    module.__class__ = swapped_class(base, ordered)


def restore(module: nn.Module) -> None:
    base = plain_class(module)
    if type(module) is not base:
        module.__class__ = base
    module.__dict__.pop(HOST, None)
    module.__dict__.pop(NAME, None)


def rebase(module: nn.Module, plain: type) -> None:
    """Another plain class (a subclass or base of the one there is) beneath what adapters made of the module."""
    kinds = kinds_of(module)
    module.__class__ = swapped_class(plain, kinds) if kinds else plain


def wraps(function: Callable[..., Any], base: type, name: str) -> Callable[..., Any]:
    """`function` with the signature of base.name: a wrapper of its own for each generated class."""
    return functools.wraps(getattr(base, name))(function)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    state = self.__getstate__() if hasattr(self, "__getstate__") else dict(self.__dict__)  # type: ignore[operator]
    return _rebuild, (plain_class(self), kinds_of(self)), state


def _rebuild(base: type, kinds: tuple[str, ...]) -> nn.Module:
    made = swapped_class(base, kinds)
    return made.__new__(made)  # type: ignore[call-overload]


def _rebind_instance_forward(module: nn.Module, name: str) -> None:
    """accelerate's hooks set `forward` on the instance, and then no class's forward is ever called."""
    own = module.__dict__.get("forward")
    if own is None:
        return
    old = module.__dict__.get("_old_forward")
    if old is not None and getattr(old, "__self__", None) is module:
        module.__dict__["_old_forward"] = functools.partial(_class_forward, module)
        return
    raise Unsupported(
        f"module '{name}' ({type(module).__name__}) has a `forward` of its own on the instance, which an edit of its "
        "class would never see.",
        next_step="attach before whatever sets module.forward, or delete that attribute",
    )


def _class_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


def twin(module: nn.Module, replaced: dict[str, Tensor | None], **facts: Any) -> nn.Module:
    """A shallow stand-in for `module`: its plain class, its state, other parameters (dotted names reach children).
    `facts` are other attributes that it has, such as training=False.

    Thread-safe, since the module itself is untouched, and traced by dynamo.
    """
    base = plain_class(module)
    if "weight" in replaced and hasattr(
        module, "dense_weight"
    ):  # a quantised form reads its codes, not a weight
        made = object.__new__(nn.Linear)
        made.__dict__.update(module.__dict__)
        made.__dict__["_parameters"] = {"bias": getattr(module, "bias", None), **replaced}
        made.__dict__["_buffers"] = {}
        return made
    if parametrize.is_parametrized(module):
        base = base.__bases__[0]  # torch puts the parametrized class right above the plain one
    made = object.__new__(base)
    state = dict(module.__dict__)
    own = {k: v for k, v in replaced.items() if "." not in k}
    state["_parameters"] = {**module._parameters, **own}
    children: dict[str, dict[str, Tensor | None]] = {}
    for key, value in replaced.items():
        if "." in key:
            child, rest = key.split(".", 1)
            children.setdefault(child, {})[rest] = value
    if children:
        state["_modules"] = {
            **module._modules, **{c: twin(getattr(module, c), changes) for c, changes in children.items()}
        }  # fmt: skip
    for key in own:  # old weight_norm leaves the computed weight here
        state.pop(key, None)
    if "_flat_weights_names" in state:  # recurrent modules keep a second list of their parameters
        state["_flat_weights"] = [own.get(n, module._parameters.get(n)) for n in state["_flat_weights_names"]]
    if "statistics" in kinds_of(module) and module.track_running_stats and not state[HOST].update_statistics:
        state["training"] = False  # what the module itself does (see `_blocks`), its stand-in does too
    made.__dict__.update({**state, **facts})
    return made
