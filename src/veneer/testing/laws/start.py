"""Law 1: an adapter that says it starts as its base does."""

import torch

from veneer import engine

from .._law import Broken, NotClaimed, agree, difference, law
from .._subject import Subject

SAME = {torch.float64: 1e-12, torch.float32: 1e-6}


@law(1, "identity")
def identity(s: Subject) -> str:
    """At the declared start the output equals the base's; methods that start elsewhere say why."""
    contents, worst = s.base.contents(4), 0.0
    for dtype, tolerance in SAME.items():
        model = s.model(dtype)
        bare = s.evaluated(model, contents, dtype=dtype)
        s.attach(model, random=False)
        started = s.evaluated(model, contents, dtype=dtype)
        if s.facts.starts_as_identity:
            worst = max(worst, agree(started, bare, f"at the start, against the base, in {dtype}", tolerance))
        elif not s.facts.reason:
            raise Broken("starts_as_identity=False, and no reason is given")
        elif difference(started, bare) == 0.0:
            raise Broken("starts_as_identity=False, and the start is the base all the same", 0.0)
        with engine.bare(model):
            agree(s.evaluated(model, contents, dtype=dtype), bare, "inside of veneer.bare(model)", 0.0)
    if not s.facts.starts_as_identity:
        raise NotClaimed(s.facts.reason)
    return f"{worst:.1e}"
