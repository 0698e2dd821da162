"""Doors: where a call enters a model that carries adapters.

A door stands at the model's forward and at every backbone that can be called by itself (the one at `generate` is in
`_generate`). It decides which adapter each row uses, collects the facts that edits may ask for, and freezes both
before the first block runs.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from ._blocks import without_fast_path
from ._collect import collect, length_of, named_inputs, see_memory, taken, tokens_of, totals
from ._conditions import conditions, penalty_of
from ._flat_calls import through
from ._frame import Frame, Session, current, entered, session_of
from ._generate import generating, saving
from ._host import keep_history
from ._joined import kept
from ._names import UNSET, adapters_of, any_names, session_for
from ._program import PORTS, Program, SiteOps, build_banked
from ._prompts import cut_back, extend_for_cache, put_in, shift_positions, token_ops
from ._swap import HOST, kind


@kind("backbone")
def _backbone(base: type) -> dict[str, Any]:
    plain = base.forward  # type: ignore[attr-defined]
    names = tuple(inspect.signature(plain).parameters)[1:]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        host = self.__dict__[HOST]
        frame = current(host)
        if frame is None:
            if not host.names:
                return plain(self, *args, **kwargs)
            return enter(host, self, functools.partial(forward, self), names, args, kwargs, UNSET)
        return kept(frame, _with_tokens(host, self, plain, names, frame, args, kwargs))

    return {"forward": forward}


def _with_tokens(
    host: Any, module: Any, plain: Any, names: tuple[str, ...], frame: Frame, args: tuple, kwargs: dict
) -> Any:
    """A backbone's forward, with the positions that `tokens` edits add, and its output cut back to what went in."""
    args, kwargs = shift_positions(host, names, frame, args, kwargs)
    if host.anatomy.facts.encoder_decoder:
        see_memory(frame, named_inputs(names, args, kwargs))
    if host.anatomy.facts.encoder_decoder or frame.inserted is not None:
        return through(module, plain, names, frame, args, kwargs)
    stack, ops = token_ops(host, module, frame)
    if not ops:
        y = through(module, plain, names, frame, args, kwargs)
        return cut_back(y, frame.inserted) if frame.inserted is not None else y
    named = named_inputs(names, args, kwargs)
    cache = named.get("past_key_values")
    past = length_of(cache)
    if frame.session is not None and frame.session.inserted is not None:
        return through(module, plain, names, frame, args, kwargs)  # `generate` put them in
    if past > 0:
        named = extend_for_cache(host, module, ops, frame, named, past)
        return through(module, plain, names, frame, (), named)
    named, where = put_in(host, module, stack, ops, frame, named, names)
    frame.inserted = where
    return cut_back(through(module, plain, names, frame, (), named), where)


@kind("door")
def _door(base: type) -> dict[str, Any]:
    plain = base.forward  # type: ignore[attr-defined]

    names = tuple(inspect.signature(plain).parameters)[1:]
    # An encoder layer of torch's that is the whole model is a door, and no block: its fused path is left here.
    run = (
        functools.partial(without_fast_path, plain) if issubclass(base, nn.TransformerEncoderLayer) else plain
    )

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        host = self.__dict__[HOST]
        if current(host) is not None and adapters is UNSET:
            return plain(self, *args, **kwargs)
        return enter(host, self, functools.partial(run, self), names, args, kwargs, adapters)

    made: dict[str, Any] = {"forward": forward}
    if hasattr(base, "generate"):
        made["generate"] = generating(base)
    if issubclass(
        base, nn.Sequential
    ):  # a container runs and counts its children, and the host is none of them
        made["__iter__"] = lambda self: iter(m for n, m in self._modules.items() if n != "veneer")
        made["__len__"] = lambda self: len(self._modules) - ("veneer" in self._modules)
    if hasattr(base, "save_pretrained"):
        made["save_pretrained"] = saving(base)
    return made


def enter(
    host: Any, module: Any, run: Any, names: tuple[str, ...], args: tuple, kwargs: dict, adapters: Any
) -> Any:
    """One call: choose rows, collect facts, run under the frame, add penalties."""
    session = session_of(host)
    if adapters is not UNSET:
        session = session_for(host, adapters, banks=torch.compiler.is_compiling())
    named = named_inputs(names, args, kwargs)
    extra = taken(host, named, kwargs)
    total, stack_totals = totals(host, named)
    if torch.compiler.is_compiling():
        # Names would be guarded one by one; slots are tensors, so one graph serves every switch.
        banks = host.banks if session is None or session.banks is None else session.banks
        rows, program = (), build_banked(host, banks or (), total, module.training)
        return _run(
            host, module, run, names, Frame(host, program, session), named, extra, total, rows, args, kwargs
        )
    with host.lock:  # what the call uses is settled at one moment; adapters may come and go after it
        rows = host.rows_for(session, total)
        if module.training:
            host.project()  # before any view of a leaf is taken
        if session is not None and session.by_stack:
            program = _program_by_stack(host, session, stack_totals, module.training)
        else:
            tokens = tokens_of(named)
            program = host.program(rows, module.training, session, tokens) if any_names(rows) else {}
        frame = Frame(host, program, session, names=rows)
        frame.adapters = adapters_of(host, session, rows)
        used = tuple(frame.adapters)
        host.begin(used)
    try:
        return _run(host, module, run, names, frame, named, extra, total, rows, args, kwargs)
    finally:
        host.end(used)


def _run(
    host: Any, module: Any, run: Any, names: tuple[str, ...], frame: Frame, named: dict, extra: dict, total: int,
    rows: Any, args: tuple, kwargs: dict,
) -> Any:  # fmt: skip
    """The call under its frame, with what methods add to its loss."""
    program = frame.program
    if program:
        collect(host, module, frame, named, extra, total)
    with entered(frame):
        if program:
            conditions(host, module, run, frame, rows, named, extra, total)
            if host.anatomy.facts.encoder_decoder:
                args, kwargs = _encoder_prompts(host, module, names, frame, named, args, kwargs)
        y = run(*args, **kwargs)
        if "pending" in frame.captured:
            keep_history(frame, y)
        if program and module.training and hasattr(y, "keys") and y.get("loss") is not None:
            penalty = penalty_of(host, frame)
            if penalty is not None:
                y["loss"] = y["loss"] + penalty.to(y["loss"].dtype)
    return y


def _program_by_stack(host: Any, session: Session, totals: dict[str, int], training: bool) -> Program:
    """Two towers: names by row of each, each tower's sites from its own."""
    merged: Program = {}
    for stack in session.by_stack or {}:
        rows = host.rows_for(session, totals.get(stack, len(session.by_stack[stack])), stack)  # type: ignore[index]
        for module, ops in host.program(rows, training, session).items():
            for port in PORTS:
                mine = [op for op in getattr(ops, port) if op.site.stack == stack]
                if mine:
                    made = merged.setdefault(module, SiteOps())
                    made.turned = ops.turned
                    getattr(made, port).extend(mine)
            if ops.capture and host.stack_of(module) == stack:
                made = merged.setdefault(module, SiteOps())
                made.capture, made.turned = True, ops.turned
    return merged


def _encoder_prompts(
    host: Any, module: Any, names: tuple[str, ...], frame: Frame, named: dict, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """Prompts of an encoder-decoder go in at the model, since its decoder reads the encoder's mask too."""
    given = named.get("encoder_outputs") is not None or (
        frame.session is not None and frame.session.inserted is not None
    )
    if given or (named.get("input_ids") is None and named.get("inputs_embeds") is None):
        return args, kwargs
    for stack, embedding in host.anatomy.facts.embeddings:
        at = frame.program.get(embedding)
        if at is not None and at.tokens and stack != "decoder" and host.has_token_ids(stack):
            named, where = put_in(host, module, stack, at.tokens, frame, named, names)
            frame.inserted = where
            return (), named
    return args, kwargs
