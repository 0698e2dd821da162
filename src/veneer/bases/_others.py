"""Bases of timm, and of a function in a user's own file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from veneer.bases._base import Base
from veneer.errors import BadFile, BadOption, MissingPackage, UnknownName, VeneerError, nearest


def from_timm(
    spec: str, name: str, task: str | None, num_labels: int | None, options: dict[str, Any]
) -> Base:
    try:
        import timm
    except ImportError as error:
        raise MissingPackage(
            f"opening {spec!r} needs the package 'timm', which is not installed.",
            next_step="pip install timm",
        ) from error
    except Exception as error:  # torchvision wheels that do not fit this torch fail with their own errors
        raise VeneerError(
            f"timm is installed but does not import: {error}",
            next_step="a torchvision wheel of the same build as torch (both CPU, or both CUDA)",
        ) from error
    if not timm.is_model(name):
        raise UnknownName(
            f"timm has no model {name!r}.",
            nearest=nearest(name, timm.list_models()),
            next_step="python -c 'import timm; print(timm.list_models())'    lists all of them",
        )
    if num_labels is not None:
        options = {"num_classes": num_labels, **options}
    options = {"pretrained": True, **options}
    try:
        model = timm.create_model(name, **options)
    except Exception as error:
        raise VeneerError(
            f"timm could not open {name!r}: {error}",
            next_step="pretrained=False opens it with random weights",
        ) from error
    fresh = [] if options["pretrained"] else [n for n, _ in model.named_parameters()]
    return Base(model, name, spec, "timm", task=task, fresh=fresh)


def from_function(spec: str, rest: str, task: str | None, options: dict[str, Any]) -> Base:
    """module:path.py:function -> the model, or (model, tokenizer), that the user's function returns."""
    file, _, function = rest.rpartition(":")
    path = Path(file).expanduser()
    if not file or not path.is_file():
        raise BadFile(
            f"{spec!r} names no Python file; expected module:path.py:function.",
            next_step="module:./my_model.py:build",
        )
    loaded = importlib.util.spec_from_file_location(f"veneer_user_{path.stem}", path)
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UnknownName(
            f"{path.name} has no function {function!r}.",
            nearest=nearest(function, names) or names,
            next_step=f"module:{path}:{names[0]}" if names else f"def {function}(): ...    in {path}",
        )
    made = getattr(module, function)(**options)
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise BadOption(
            f"{spec!r} returned {type(made).__name__}; expected a torch.nn.Module or (module, tokenizer).",
            next_step="return model, or return model, tokenizer",
        )
    return Base(model, f"{path.stem}:{function}", spec, "function", tokenizer=tokenizer, task=task)
