"""What a sub-layer's output is added to, and the norm behind the sum: for output edits that name `residual`.

Where a norm comes first, the residual is what that norm reads; where it comes last, it is what the sub-layer
reads. A block whose sub-layers read one norm side by side adds all of them at once: it has none.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ._swap import twin


def wants_residual(method: Any) -> bool:
    return "residual" in method.arguments.get("output", ())


def reads(facts: Any, method: Any, site: Any) -> list[str]:
    """Modules whose first input an output edit at `site` needs beside what the site itself is given."""
    if site.port != "output":
        return []
    names = [site.source, residual_source(facts, site) if wants_residual(method) else ""]
    return [name for name in dict.fromkeys(names) if name and name != site.module]


def residual_source(facts: Any, site: Any) -> str:
    """The module whose first input is the residual at this site; "" where there is none."""
    if site.kind not in ("attention", "mlp") or not site.norm:
        return ""
    return {"pre": site.norm, "post": site.source or site.module}.get(facts.norm_place, "")


def residual(op: Any, frame: Any, x: Tensor) -> Tensor | None:
    """(rows, tokens, width), of the whole batch. x: what enters the site's own module."""
    name = residual_source(frame.host.anatomy.facts, op.site)
    if not name:
        return None
    return x if name == op.site.module else frame.captured.get(name)


def norm(op: Any, frame: Any) -> Any:
    """h -> the block's own norm of h, frozen and without edits; h itself where no norm reads the sum."""
    if frame.host.anatomy.facts.norm_place != "post" or not op.site.norm:
        return _same
    return functools.partial(_bare_norm, frame.host, op.site.norm)


def _same(h: Tensor) -> Tensor:
    return h


def _bare_norm(host: Any, name: str, h: Tensor) -> Tensor:
    module = host.module(name)
    own = {
        n: host.kept[name, n] for n in module._parameters if (name, n) in host.kept
    }  # of adapters merged into it
    return twin(module, own)(h)
