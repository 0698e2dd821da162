"""Doors at `generate`, where prompts go in once, and at `save_pretrained`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._collect import collect, taken
from ._conditions import conditions
from ._frame import Frame, Session, entered, opened, session_of
from ._host import child_name
from ._names import UNSET, adapters_of, any_names, session_for
from ._prompts import put_in
from ._store import save
from ._swap import HOST


def generating(base: type) -> Any:
    plain = base.generate  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def generate(self: Any, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        host = self.__dict__[HOST]
        outer = session_of(host)
        if adapters is not UNSET:
            session = session_for(host, adapters)
        elif outer is not None:
            session = Session(host, outer.rows, outer.by_stack, outer.names, form=outer.form)
        else:
            session = Session(host, names=host.active)
        session.generating = True
        with host.lock:  # from the first token to the last, whatever comes and goes meanwhile
            session.adapters = adapters_of(host, session, host.active)
            used = tuple(session.adapters)
            host.begin(used)
        if args:
            kwargs = {"inputs": args[0], **dict(zip(("generation_config",), args[1:])), **kwargs}
        try:
            kwargs = _open_generation(host, self, session, kwargs)
            with opened(session):
                return plain(self, **kwargs)
        finally:
            host.end(used)

    return generate


def saving(base: type) -> Any:
    plain = base.save_pretrained  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """The base under its own keys, and each adapter in a folder of its own under `veneer/`."""

        host = self.__dict__[HOST]
        own = kwargs.pop("state_dict", None)
        own = self.state_dict() if own is None else own
        kwargs["state_dict"] = {k: v for k, v in own.items() if not k.startswith("veneer.")}
        result = plain(self, save_directory, *args, **kwargs)
        for name in host.names:
            if host.adapter(name).prepared:
                save(self, name, Path(save_directory) / "veneer" / child_name(name))
        return result

    return save_pretrained


@torch.no_grad()
def _open_generation(host: Any, model: Any, session: Session, kwargs: dict) -> dict:
    """Where the prompt is; prompts put on once, not at each step; conditions made once."""
    facts = host.anatomy.facts
    named = dict(kwargs)
    if "inputs" in named and isinstance(named["inputs"], Tensor):
        inputs = named.pop("inputs")
        named["input_ids" if not inputs.is_floating_point() else model.main_input_name] = inputs
    ids, embeds = named.get("input_ids"), named.get("inputs_embeds")
    source = embeds if embeds is not None else ids
    extra = taken(host, named, named)
    session.extra = extra
    if source is None:
        return named
    rows, tokens = source.shape[:2]
    mask = named.get("attention_mask")
    real = (
        mask.bool()
        if isinstance(mask, Tensor)
        else torch.ones(rows, tokens, dtype=torch.bool, device=source.device)
    )
    session.prompt = None if facts.encoder_decoder else real
    names = host.rows_for(session, rows)
    if not any_names(names):
        return named
    frame = Frame(host, host.program(names, model.training, session, tokens), session, names=names)
    frame.adapters = dict(session.adapters or {})
    collect(host, model, frame, {**named, "input_ids": ids}, extra, rows)
    with entered(frame):
        conditions(
            host, model, functools.partial(type(model).forward, model), frame, names, named, extra, rows
        )
        for stack, embedding in facts.embeddings:
            at = frame.program.get(embedding)
            if at is not None and at.tokens and stack != "decoder" and host.has_token_ids(stack):
                longer, where = put_in(host, model, stack, at.tokens, frame, named, ())
                session.inserted = where
                if session.prompt is not None:
                    session.prompt = where.extend(session.prompt, fill=False)
                named = {**longer, **({} if ids is None or facts.encoder_decoder else {"input_ids": ids})}
                named.pop("position_ids", None)
    return named
