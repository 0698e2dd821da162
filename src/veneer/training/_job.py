"""What is trained: the method and the recipe that an arm names."""

from __future__ import annotations

import math
from typing import Any

from veneer.errors import BadOption
from veneer.training import _arm


class Job:
    """The method and the recipe that an arm names."""

    def __init__(self, method: Any, options: dict[str, Any], recipe: Any) -> None:
        self.recipes: list[Any] = [] if recipe is None else [recipe]
        if isinstance(method, str):
            arm = _arm.parsed(method)
            method, options = arm.method[0], {**arm.method[1], **options}
            self.recipes = [*arm.recipes, *self.recipes]
        self.is_trained = method != "untrained"
        self.method: Any = None
        if self.is_trained:
            from veneer.edits import build

            self.method = build(method, **options)

    @property
    def method_text(self) -> str:
        return _arm.text((self.method.key, self.method.non_default())) if self.is_trained else "untrained"

    @property
    def recipe_text(self) -> str:
        shown = (
            r if isinstance(r, str) else _arm.text(r) if isinstance(r, tuple) else str(r)
            for r in self.recipes
        )
        return "+".join(shown)

    def recipe(self) -> Any:
        """The recipe by its name and options; several become one."""
        if not self.recipes:
            return None
        from veneer import recipes

        if len(self.recipes) > 1:
            raise BadOption(
                f"the arm names {len(self.recipes)} recipes: {self.recipe_text}; one makes the optimiser.",
                next_step="name one recipe",
            )
        (only,) = self.recipes
        return recipes.parse(only[0], **only[1]) if isinstance(only, tuple) else recipes.parse(only)

    def rate(self, given: float | None, recipe: Any) -> float:
        """The given rate, or two thirds up the range (of logarithms) that the recipe or the method
        declares.
        """
        if given is not None:
            return given
        low, high = getattr(recipe, "rates", None) or getattr(self.method, "facts", _NoFacts).rates
        return math.exp((math.log(low) + 2 * math.log(high)) / 3)


class _NoFacts:
    rates = (1e-5, 1e-3)
