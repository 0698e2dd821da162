"""What adapters make of a whole call: conditions before the first block, penalties after the last."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from veneer.edits import At, call

from ._frame import Frame, Session, entered, names_in
from ._program import PORTS, site_tensors
from ._rows import Rows


def conditions(
    host: Any, module: Any, run: Any, frame: Frame, rows: Any, named: dict, extra: dict, total: int
) -> None:
    """What adapters make of the whole input, once a call, before the first block; it stays with a generation."""
    if torch.compiler.is_compiling():  # banked form: every resident adapter sees every row, `live` chooses
        used = {
            op.adapter.name for ops in frame.program.values() for port in PORTS for op in getattr(ops, port)
        }
    else:
        used = names_in(rows)
    adapters = {n: frame.adapters.get(n) or host.adapter(n) for n in used}
    wanted = [n for n in sorted(used) if "condition" in adapters[n].method.arguments]
    if not wanted:
        return
    if frame.session is None:
        frame.session = Session(host)
    for name in wanted:
        if name in frame.session.conditions and frame.session.generating:
            continue
        adapter = adapters[name]
        mine = None if not rows or isinstance(rows[0], str) else [i for i, r in enumerate(rows) if name in r]
        chosen = None if mine is None or len(mine) == total else Rows(mine, total)
        inputs = {
            k: chosen.take(v)
            if chosen is not None and isinstance(v, Tensor) and v.dim() and v.shape[0] == total
            else v
            for k, v in {**named, **extra}.items()
        }
        tables = host.anatomy.facts.token_embeddings
        if tables:
            inputs["embed"] = host.module(tables[0][1])
        merged: dict[str, Tensor] = {}
        for sp, t in zip(adapter.plan.sites, site_tensors(host, adapter, module.training)):
            if "condition" in sp.method.arguments:
                at = (frame.at.get("") or At()).with_(site=sp.site, _bare=functools.partial(_bare, host, run))
                with entered(Frame(host, {})):
                    merged.update(call(sp.method, "condition", t, {"inputs": inputs, "at": at}))
        # For all rows of the call, so that an edit at any place of a stack finds its own.
        frame.session.conditions[name] = {
            k: v if chosen is None else chosen.put(v.new_zeros(total, *v.shape[1:]), v)
            for k, v in merged.items()
        }


def _bare(host: Any, run: Any, **inputs: Any) -> Any:
    with entered(Frame(host, {})):
        return run(**inputs)


def penalty_of(host: Any, frame: Frame) -> Tensor | None:
    """The sum of the methods' penalties over the sites of this call's program."""
    total: Tensor | None = None
    used = {op.adapter for ops in frame.program.values() for port in PORTS for op in getattr(ops, port)}
    if frame.session is not None and frame.session.rows is not None:
        used |= {frame.adapters.get(n) or host.adapter(n) for n in names_in(frame.session.rows)}
    for adapter in sorted(used, key=lambda a: a.name):
        if not any("penalty" in sp.method.arguments for sp in adapter.plan.sites):
            continue
        # Each adapter's own tensors: those of a mixed batch have been gathered by row.
        found = dict(zip([sp.site.name + sp.site.port for sp in adapter.plan.sites],
                         zip(adapter.plan.sites, site_tensors(host, adapter, True))))  # fmt: skip
        values = [
            call(sp.method, "penalty", t, {"at": None})
            for sp, t in found.values() if "penalty" in sp.method.arguments
        ]  # fmt: skip
        own = torch.stack([v.reshape(()) for v in values])
        value = own.mean() if getattr(adapter.method, "penalty_over_sites", "sum") == "mean" else own.sum()
        total = value if total is None else total + value
    return total
