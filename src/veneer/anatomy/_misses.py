"""What a selector that names nothing says: what is missing, what comes near, what to type next."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from veneer.anatomy._types import Site
from veneer.errors import NoSiteFound, nearest

if TYPE_CHECKING:
    from veneer.anatomy._anatomy import Anatomy

Selector = str | Sequence["str | Site"]
NEXT = "veneer anatomy MODEL      shows every role and its modules"
BLOCK = re.compile(r"block(\[(?P<slice>[^\[\]]*)\])?(\.(?P<rest>.+))?$")


def show(selector: Selector | Site) -> str:
    """A selector as it was typed."""
    if isinstance(selector, str):
        return repr(selector)
    members = [selector] if isinstance(selector, Site) else selector
    return repr([str(getattr(member, "name", member)) for member in members])


def describe(anatomy: Anatomy) -> str:
    count = sum(len(blocks) for blocks in anatomy.stacks.values())
    return f"{anatomy.model_class} ({count} blocks)"


def nothing(
    anatomy: Anatomy,
    selector: Selector,
    missing: list[str],
    wrong: list[Site],
    port: str,
    option: str = "sites",
) -> NoSiteFound:
    members = [selector] if isinstance(selector, str) else list(selector)
    several = len(members) > 1 or (missing and [str(m) for m in members] != missing)
    if wrong:
        names = ", ".join(sorted({s.role or s.module for s in wrong}))
        what = f" names {names} in {describe(anatomy)}, which has no port {port!r}."
    elif several and missing:
        what = f": {', '.join(map(repr, missing))} matches nothing in {describe(anatomy)}."
    else:
        what = f" matches nothing in {describe(anatomy)}."
    what = f"{option}={show(selector)}{what}"
    return NoSiteFound(what, nearest=_near(anatomy, (missing or [""])[0], wrong), next_step=NEXT)


def _near(anatomy: Anatomy, text: str, wrong: list[Site]) -> list[str]:
    counts = Counter(s.role for s in anatomy.sites if s.role)
    bare = BLOCK.match(text)
    word = (bare["rest"] or text) if bare else text
    roles = [r for r in counts if any(r.startswith(s.role + ".") for s in wrong)] or nearest(word, counts)
    leaves = Counter(
        s.module.rpartition(".")[2]
        for s in anatomy.sites
        if s.parameter and not s.module.rpartition(".")[2].isdigit()
    )
    leaf = text.rpartition(".")[2] or text
    modules = [name for name in nearest(leaf, leaves) if name not in roles]
    near = [f"{role} ({counts[role]} sites)" for role in roles] + [
        f"{name} ({leaves[name]} modules)" for name in modules
    ]
    return near or [f"{role} ({n} sites)" for role, n in counts.most_common(3)]
