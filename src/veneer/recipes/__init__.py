"""Recipes: what happens around training. Update rules and optimisers, one file each; they know no method."""

import importlib
import pkgutil

from ._recipe import Group, Recipe, View, adamw, describe, lookup, parse, recipe, registry

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Group", "Recipe", "View", "adamw", "describe", "lookup", "parse", "recipe", "registry"]
