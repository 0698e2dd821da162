"""What the registry knows of each method, as plain data: for `veneer methods` and for the pages of the docs."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterable
from typing import Any


def entries() -> list[dict[str, Any]]:
    """All methods, by family and name."""
    from veneer.edits import registry

    return sorted((entry(key) for key in registry()), key=lambda row: (row["family"], row["key"]))


def entry(key: str) -> dict[str, Any]:
    """One method: its facts, its docstring, its options. Raises UnknownMethod."""
    from veneer.edits import lookup

    cls: Any = lookup(key)
    f = cls.facts
    doc = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or "")
    return {
        "key": f.key, "name": cls.__name__, "sentence": sentence(doc), "paper": f.paper, "family": f.family,
        "ports": list(cls.ports), "mergeable": merges(cls), "starts_as_identity": f.starts_as_identity,
        "reason": f.reason, "certainty": f.certainty, "rates": list(f.rates), "kinds": list(f.kinds),
        "needs": NEEDS.get(f.data, f.data), "not_claimed": [list(pair) for pair in f.not_claimed],
        "options": [option(field) for field in dataclasses.fields(cls)], "doc": doc,
        **known_elsewhere(f.key),
    }  # fmt: skip


NEEDS = {"squared_gradients": "training rows: its start is made from their gradients", "members": "other adapters"}


def known_elsewhere(key: str) -> dict[str, Any]:
    """What the catalogue adds to the declared facts (size, witnesses, parity), where it is there."""
    try:
        from veneer import catalogue
    except ImportError:
        return {}
    info = next((info.to_dict() for info in catalogue.methods() if info.key == key), {})
    return {k: v for k, v in info.items() if k not in ("key", "options", "doc", "mergeable", "name")}


def merges(cls: Any) -> bool:
    """Weight edits and affine edits merge, others do not, unless the method says so itself."""
    if cls.facts.mergeable is not None:
        return bool(cls.facts.mergeable)
    return set(cls.ports) <= {"weight"} or ("affine" in cls.arguments and set(cls.ports) <= {"weight", "input", "output"})


def sentence(doc: str) -> str:
    """The first sentence, without the name and the citation around it."""
    first = doc.split("\n\n")[0].replace("\n", " ")
    _, _, rest = first.partition(": ")
    text = (rest or first).split(". ")[0].strip().rstrip(".")
    return text[:1].upper() + text[1:] if text else ""


def option(field: Any) -> dict[str, Any]:
    """A hyperparameter as its declaration tells it."""
    m = field.metadata
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    bounds = [
        f"{words} {m[name]:g}"
        for name, words in (("at_least", "at least"), ("at_most", "at most"), ("more_than", "more than"))
        if m.get(name) is not None
    ]
    if m.get("choices"):
        bounds.append("one of " + ", ".join(map(str, m["choices"])))
    meaning = m.get("meaning") or ("where it edits: roles, slices and names" if field.name == "sites" else "")
    return {
        "name": field.name, "default": shown(default), "meaning": meaning, "limits": ", ".join(bounds),
        "alias": list(m.get("alias", ())), "size": bool(m.get("size")),
    }  # fmt: skip


def shown(value: Any) -> str:
    if isinstance(value, str):
        return value or '""'
    return repr(value) if not isinstance(value, float) else f"{value:g}"


def shares(keys: Iterable[str]) -> dict[str, float]:
    """The share of parameters that each method trains on a BERT of base size, by its own defaults.

    Methods that do not fit a text encoder are left out.
    """
    import torch
    import transformers

    from veneer import engine
    from veneer.errors import VeneerError

    config = transformers.BertConfig()
    with torch.device("meta"):
        shell = transformers.BertModel(config)
    model = shell.to_empty(device="cpu")  # no values are needed, so that none are drawn
    total = sum(p.numel() for p in model.parameters())
    found = {}
    for key in keys:
        try:
            found[key] = engine.plan(model, key).trainable_parameters / total
        except VeneerError:
            continue
    return found
