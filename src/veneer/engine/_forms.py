"""Forms: in which way the rows of several adapters go through one site. All compute the same.

`bmm`: tensors gathered by row, one product for all rows. `packed`: the factors of the adapters side by side as columns
of one matrix, and a mask. `kernel`: Triton's, where a GPU has them. `segments`: adapter by adapter, each its own rows.
`vmap`: a definition that knows one adapter alone, mapped over the rows. The one idea: a form is chosen for each site
of a program, by what the method brings and by a table of measurements, so that no method is asked to know it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer import kernels
from veneer.edits import At, Tensors, add_row_axis, call
from veneer.errors import BadOption, nearest

from ._low_rank import factors
from ._plan import SitePlan

FORMS = ("bmm", "packed", "segments", "vmap", "kernel")
ONE_BY_ONE = ("experts", "recurrent", "other")  # kinds whose inputs have no row axis to broadcast over
ERROR = 1e-4  # of one form against another; relative to the largest entry, float32
_PROBED: dict[Any, bool] = {}


def check(form: Any) -> str | None:
    """A form that a person names, or None for the choice of the engine."""
    if form is None or form in FORMS:
        return form
    raise BadOption(
        f"form={form!r}: expected one of {', '.join(FORMS)}, or None for the engine's choice.",
        nearest=nearest(str(form), FORMS),
        next_step='with veneer.rows(model, names, form="bmm"):',
    )


def bucket(tokens: int) -> int:
    """Calls of like length share a program: 1, up to 8, up to 64, more."""
    return sum(tokens > limit for limit in (1, 8, 64))


def choose(
    sp: SitePlan, tensors: Sequence[Tensors], form: str | None, training: bool, table: Any, size: Any
) -> str:
    """The form of one site for the rows of `tensors`' adapters. size: (rows, tokens a row), for the table.

    A form that the site's method cannot have gives way to the next that it can: packed to bmm to vmap to segments.
    """
    own_dense = form is None and _is_dense(sp, tensors)
    if own_dense or form == "segments":
        return "segments"
    if form == "vmap" and maps(sp):
        return "vmap"
    if not (may_broadcast(sp) and broadcasts(sp, tensors)):
        return "vmap" if maps(sp) else "segments"
    packs = not training and not torch.is_grad_enabled() and bool(factors(sp, tensors[0]))
    if form == "packed" and packs:
        return "packed"
    if form in (None, "kernel") and packs and kernels.ready(_device(tensors[0])):
        return "kernel"
    if form is None and table is not None and packs and len(tensors) > 1:
        down, up = sp.method.low_rank(tensors[0])  # type: ignore[attr-defined]
        return table.best(down.shape[1], up.shape[0], down.shape[0], *size, len(tensors))
    return "bmm"


def may_broadcast(sp: SitePlan) -> bool:
    """Whether the functions of one site say that they serve a row axis there."""
    m = sp.method
    if not _has_rows(sp) or not m.broadcasts or "condition" in m.arguments:
        return False
    if sp.site.port == "weight":
        if sp.site.kind in ("linear", "conv1d"):
            return "branch" in m.arguments
        return is_shift(sp)
    return sp.site.port in ("input", "output", "attention") and sp.site.kind != "conv"


def maps(sp: SitePlan) -> bool:
    """Whether the function of one site can be mapped over rows: it reads their vectors, and no other facts of them."""
    m, port = sp.method, sp.site.port
    if not _has_rows(sp) or "condition" in m.arguments or sp.site.kind == "conv" or is_shift(sp):
        return False
    function = "branch" if port == "weight" else port
    if port not in ("weight", "input", "output") or function not in m.arguments:
        return False
    if port == "weight" and sp.site.kind not in ("linear", "conv1d"):
        return False
    return "at" not in m.arguments[function]


def _has_rows(sp: SitePlan) -> bool:
    if sp.site.kind in ONE_BY_ONE or sp.site.experts or sp.part < 0:
        return False
    m = sp.method
    if m.facts.data or getattr(m, "needs_members", False):  # shapes of their own; members of their own
        return False
    return "at" not in m.arguments.get("derive", ())


def is_shift(sp: SitePlan) -> bool:
    """A weight edit of a bias: it shifts the output, whatever the module is."""
    site = sp.site
    return len(site.shape) == 1 and site.parameter in ("bias", site.bias or "bias") and not site.ranges


def _is_dense(sp: SitePlan, tensors: Sequence[Tensors]) -> bool:
    """Tensors as large as the layer: a copy of them for each row costs more than going adapter by adapter."""
    size = 1
    for n in sp.site.shape:
        size *= n
    return len(sp.site.shape) > 1 and any(getattr(tensors[0], n).numel() >= size for n in own_names(tensors))


# -- does a definition broadcast? -----------------------------------------------------------------------------------


def broadcasts(sp: SitePlan, tensors: Sequence[Tensors]) -> bool:
    """Whether a function gives for rows of two adapters what it gives for each alone: tried once on random numbers.

    One that needs more than numbers (facts of a call) is believed to do what its class says.
    """
    found = sp.__dict__.get("_broadcasts")
    if found is None:
        found = sp.__dict__["_broadcasts"] = _tried(sp, tensors)
    return found


@torch.no_grad()
def _tried(sp: SitePlan, tensors: Sequence[Tensors]) -> bool:
    m, site = sp.method, sp.site
    function = "branch" if site.port == "weight" else site.port
    if function == "attention" or is_shift(sp) or function not in m.arguments:
        return True
    shapes = tuple((n, tuple(v.shape)) for n, v in tensors[0].items() if isinstance(v, Tensor))
    key = (type(m), str(m), function, site.kind, site.shape, site.width, shapes)
    if key not in _PROBED:
        _PROBED[key] = _probe(sp, function, tensors)
    return _PROBED[key]


def _probe(sp: SitePlan, function: str, tensors: Sequence[Tensors]) -> bool:
    m, site = sp.method, sp.site
    generator = torch.Generator().manual_seed(0)

    def like(v: Any) -> Any:
        if not isinstance(v, Tensor) or not v.is_floating_point():
            return v.cpu() if isinstance(v, Tensor) else v
        return torch.randn(v.shape, generator=generator, dtype=torch.float64)

    a, b = tensors[0], tensors[-1]
    one = {n: like(v) for n, v in a.items()}
    two = {n: one[n] if getattr(b, n) is v and a is not b else like(getattr(b, n)) for n, v in a.items()}
    pair = [Tensors(one), Tensors(two)]
    wide = site.shape[-2:] if len(site.shape) > 1 else (site.width, site.width)
    width = {
        "x": wide[1] if function == "branch" else site.width,
        "y": wide[0] if function == "branch" else site.width,
    }
    width["residual"] = width["y"]
    have: dict[str, Any] = {
        n: torch.randn(2, 3, w, generator=generator, dtype=torch.float64) for n, w in width.items()
    }
    have["at"] = At(site=site)
    try:
        alone = [
            call(m, function, t, {n: v[i] if isinstance(v, Tensor) else v for n, v in have.items()})
            for i, t in enumerate(pair)
        ]
    except Exception:  # it needs facts that no probe has
        return True
    try:
        together = call(m, function, stacked(pair, torch.arange(2)), have)
        expected = torch.stack(alone)
        scale = expected.abs().max().clamp(min=1e-30)
        return bool(
            together.shape == expected.shape and ((together - expected).abs().max() / scale <= ERROR).item()
        )
    except Exception:  # a definition of one adapter's shapes meets a row axis
        return False


# -- the forms ------------------------------------------------------------------------------------------------------


def own_names(tensors: Sequence[Tensors], shared: Collection[str] | None = None) -> frozenset[str]:
    """The tensors that get a row axis: those that are not the very same for all. shared: names of those that one
    adapter alone would share with others; None: all of one adapter's."""
    first = tensors[0]
    if len(tensors) == 1:
        return frozenset() if shared is None else frozenset(n for n in first if n not in shared)
    return frozenset(n for n in first if any(getattr(t, n) is not getattr(first, n) for t in tensors))


def stacked(
    tensors: Sequence[Tensors], slots: Tensor, own: Collection[str] | None = None, row_axis: bool = True
) -> Tensors:
    """Tensors of several adapters -> tensors with a row axis. slots: (rows,) index into `tensors`.

    own: names of those that get it; default: what is not the very same tensor for all. row_axis=False: as they are
    declared, for `vmap`.
    """
    own = own_names(tensors) if own is None else own
    found = {}
    for name in tensors[0]:
        values = [getattr(t, name) for t in tensors]
        if name not in own:
            found[name] = values[0]
        else:
            taken = _gathered(values, slots)
            found[name] = add_row_axis(taken, values[0].dim()) if row_axis else taken
    return Tensors(found)


def _gathered(values: list[Tensor], slots: Tensor) -> Tensor:
    """(rows, *shape). What is kept over calls has its long axis innermost, as products of few tokens read it: half
    the time of a decoding step's bmm by a tall B (measured, float32 on a CPU)."""
    tall = values[0].dim() == 2 and values[0].shape[0] > values[0].shape[1]
    if tall and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return torch.stack([v.mT for v in values]).index_select(0, slots).mT
    return torch.stack(values).index_select(0, slots)


def over_rows(m: Any, function: str, t: Tensors, mapped: frozenset[str], have: dict[str, Any]) -> Tensor:
    """A function of one adapter, mapped over rows: each has tensors and vectors of its own."""
    shared = {n: v for n, v in t.items() if n not in mapped}
    tensors = {n: v for n, v in t.items() if n in mapped}
    named = {n: v for n, v in have.items() if n in m.arguments[function]}
    vectors = {n: v for n, v in named.items() if isinstance(v, Tensor)}
    rest = {n: v for n, v in named.items() if n not in vectors}

    def one(own: dict[str, Tensor], seen: dict[str, Tensor]) -> Tensor:
        return call(m, function, Tensors({**shared, **own}), {**seen, **rest})

    return torch.vmap(one)(tensors, vectors)


def _device(t: Tensors) -> torch.device:
    return next((v.device for _, v in t.items() if isinstance(v, Tensor)), torch.device("cpu"))
