"""Doors: where a call enters a model that carries adapters.

A door stands at the model's forward, at every backbone that can be called by itself, and at `generate`. It decides
which adapter each row uses, collects the facts that edits may ask for, and freezes both before the first block runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.edits import At, call
from veneer.errors import BadOption, Unsupported

from ._frame import Frame, Names, Session, current, entered, local, opened, session_of
from ._program import PORTS, Program, SiteOps, banks_of, build_banked, site_tensors
from ._rows import Rows
from ._site import first, frame_of, leave, with_first
from ._swap import HOST, NAME, kind, twin
from ._tokens import extend_facts, extend_mask, extend_positions, forget_rows, insert, position_offset

_UNSET: Any = object()


# -- blocks: they carry the frame through checkpointing, and leave taps ------------------------------------------


@kind("block")
def _block(base: type) -> dict[str, Any]:
    plain, plain_call = base.forward, base.__call__  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, _veneer_frame: Frame | None = None, **kwargs: Any) -> Any:
        if _veneer_frame is None or local.frame is _veneer_frame:
            return plain(self, *args, **kwargs)
        with entered(_veneer_frame):  # recomputation, maybe on another thread
            return plain(self, *args, **kwargs)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = current(self.__dict__[HOST])
        if frame is None:
            return plain_call(self, *args, **kwargs)
        if self.training and torch.is_grad_enabled():
            kwargs["_veneer_frame"] = frame
        if frame.taps is None:
            return _slowly(self, plain_call, args, kwargs)
        stack, block = _block_number(self)
        taps = frame.taps.setdefault(stack, {})
        if block == 0:
            entering = args[0] if args else kwargs.get("hidden_states")
            if isinstance(entering, Tensor):
                taps[-1] = entering.detach()
        y = _slowly(self, plain_call, args, kwargs)
        taps[block] = first(y).detach()  # outside of the checkpoint, so that recomputation leaves it alone
        ops = frame.program.get(self.__dict__[NAME])
        for op in ops.exit if ops is not None else ():
            y = with_first(y, leave(op, frame, first(y)))
        return y

    return {"forward": forward, "__call__": __call__}


def _block_number(module: nn.Module) -> tuple[str, int]:
    host = module.__dict__[HOST]
    found = host.__dict__.get("_block_numbers")
    if found is None:
        found = {b: (s, i) for s, blocks in host.anatomy.facts.blocks for i, b in enumerate(blocks)}
        host.__dict__["_block_numbers"] = found
    return found[module.__dict__[NAME]]


def _slowly(module: nn.Module, plain_call: Any, args: tuple, kwargs: dict) -> Any:
    """torch's own encoder layer has a fused path that never calls its children; edits inside need the other one."""
    if not isinstance(module, nn.TransformerEncoderLayer) or module.training:
        return plain_call(module, *args, **kwargs)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return plain_call(module, *args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@kind("statistics")
def _statistics(base: type) -> dict[str, Any]:
    """Normalisation over the batch keeps the base's running statistics: they are part of the frozen base."""
    plain = base.forward  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training or self.__dict__[HOST].update_statistics or not self.track_running_stats:
            return plain(self, *args, **kwargs)
        return plain(twin(self, {}, training=False), *args, **kwargs)

    return {"forward": forward}


# -- backbones: where tokens are put in --------------------------------------------------------------------------


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
            return enter(host, self, functools.partial(forward, self), names, args, kwargs, _UNSET)
        return _with_tokens(host, self, plain, names, frame, args, kwargs)

    return {"forward": forward}


def _with_tokens(
    host: Any, module: Any, plain: Any, names: tuple[str, ...], frame: Frame, args: tuple, kwargs: dict
) -> Any:
    """A backbone's forward, with the positions that `tokens` edits add, and its output cut back to what went in."""
    args, kwargs = _shift_positions(host, names, frame, args, kwargs)
    if host.anatomy.facts.encoder_decoder or frame.inserted is not None:
        return plain(module, *args, **kwargs)
    stack, ops = _token_ops(host, module, frame)
    if not ops:
        y = plain(module, *args, **kwargs)
        return _cut_back(y, frame.inserted) if frame.inserted is not None else y
    named = _named(names, args, kwargs)
    cache = named.get("past_key_values")
    past = _length_of(cache)
    if frame.session is not None and frame.session.inserted is not None:
        return plain(module, *args, **kwargs)  # `generate` put them in
    if past > 0:
        named = _extend_for_cache(host, module, ops, frame, named, past)
        return plain(module, **named)
    named, where = put_in(host, module, stack, ops, frame, named, names)
    frame.inserted = where
    return _cut_back(plain(module, **named), where)


def _shift_positions(
    host: Any, names: tuple[str, ...], frame: Frame, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """Positions that start behind a prefix, where an attention edit says so (prefixes that were served as a cache)."""
    if "position_ids" not in names or frame.captured.get("shifted") is not None:
        return args, kwargs
    offsets: dict[Any, tuple[Any, int]] = {}
    for ops in frame.program.values():
        for op in ops.attention:
            offset = getattr(op.method, "position_offset", 0)
            if offset:
                offsets[(id(op.adapter), id(op.rows))] = (op, offset)
    if not offsets:
        return args, kwargs
    frame.captured["shifted"] = True
    named = _named(names, args, kwargs)
    given, source = named.get("position_ids"), named.get("input_ids")
    source = named.get("inputs_embeds") if source is None else source
    rows, tokens = source.shape[:2]  # type: ignore[union-attr]
    if given is None:
        past = _length_of(named.get("past_key_values"))
        given = torch.arange(past, past + tokens, device=source.device)[None]  # type: ignore[union-attr]
    shift = torch.zeros(rows, 1, dtype=given.dtype, device=given.device)
    for op, offset in offsets.values():
        if op.rows is None:
            shift = shift + (offset if op.live is None else offset * op.live.long()[:, None])
        else:
            shift = op.rows.add(shift, torch.full_like(op.rows.take(shift), offset))
    return (), {**named, "position_ids": given.expand(rows, -1) + shift}


def _token_ops(host: Any, module: nn.Module, frame: Frame) -> tuple[str, list[Any]]:
    """The token edits of the stack that `module` owns."""
    own = module.__dict__[NAME]
    for stack, embedding in host.anatomy.facts.embeddings:
        inside = embedding == own or not own or embedding.startswith(own + ".")
        at = frame.program.get(embedding)
        if inside and at is not None and at.tokens and host.has_token_ids(stack):
            return stack, at.tokens
    return "", []


def put_in(
    host: Any, module: Any, stack: str, ops: list[Any], frame: Frame, named: dict, accepts: tuple[str, ...]
) -> tuple[dict, Any]:
    """The named arguments of a forward with prompts in front: embeddings, mask, positions and types extended."""
    named = dict(named)
    ids, embeds = named.pop("input_ids", None), named.pop("inputs_embeds", None)
    if embeds is None:
        embeds = host.module(dict(host.anatomy.facts.token_embeddings)[stack])(ids)
    rows, tokens = embeds.shape[:2]
    mask = named.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise Unsupported(
            f"prompts need an attention mask of shape (rows, tokens); this one is {tuple(mask.shape)}."
        )
    at = frame.at.get(stack) or frame.at.get("") or At()
    frame.at[stack] = at.with_(ids=ids) if ids is not None else at
    embeds, where = insert(ops, frame, embeds, mask)
    longer = extend_mask(mask, where, rows, tokens, embeds.device)
    named["inputs_embeds"], named["attention_mask"] = embeds, longer
    if named.get("token_type_ids") is not None:
        named["token_type_ids"] = where.extend(named["token_type_ids"], fill=0, at_added=0)
    if "position_ids" in accepts and host.anatomy.facts.positions in ("absolute", "rotary"):
        named["position_ids"] = extend_positions(
            named.get("position_ids"), longer, where, position_offset(module)
        )
    named.pop("cache_position", None)
    frame.at[stack] = extend_facts(frame.at[stack], where, longer.bool())
    forget_rows(frame)
    return named, where


def _extend_for_cache(host: Any, module: Any, ops: list[Any], frame: Frame, named: dict, past: int) -> dict:
    """A later step of somebody's own decoding loop: the cache is longer than the mask that they keep."""
    mask = named.get("attention_mask")
    if mask is None:
        return named
    new = named.get("input_ids")
    new = named["inputs_embeds"] if new is None else new
    empty = torch.zeros(mask.shape[0], mask.shape[1], 1, dtype=host.dtype, device=mask.device)
    width = host.anatomy.facts.width
    _, where = insert(ops, frame, empty.expand(-1, -1, width), mask)
    longer = extend_mask(mask, where, mask.shape[0], mask.shape[1], mask.device)
    named = {**named, "attention_mask": longer}
    if named.get("position_ids") is not None:
        named["position_ids"] = named["position_ids"] + where.counts[:, None]
    return named


def _cut_back(y: Any, where: Any) -> Any:
    y = with_first(y, where.cut_back(first(y)))
    if hasattr(y, "keys") and y.get("hidden_states") is not None and isinstance(y["hidden_states"], tuple):
        y["hidden_states"] = tuple(where.cut_back(h) for h in y["hidden_states"])
    return y


# -- the model ---------------------------------------------------------------------------------------------------


@kind("door")
def _door(base: type) -> dict[str, Any]:
    plain = base.forward  # type: ignore[attr-defined]

    names = tuple(inspect.signature(plain).parameters)[1:]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, adapters: Any = _UNSET, **kwargs: Any) -> Any:
        host = self.__dict__[HOST]
        if current(host) is not None and adapters is _UNSET:
            return plain(self, *args, **kwargs)
        return enter(host, self, functools.partial(plain, self), names, args, kwargs, adapters)

    made: dict[str, Any] = {"forward": forward}
    if hasattr(base, "generate"):
        made["generate"] = _generating(base)
    if issubclass(
        base, nn.Sequential
    ):  # a container runs and counts its children, and the host is none of them
        made["__iter__"] = lambda self: iter(m for n, m in self._modules.items() if n != "veneer")
        made["__len__"] = lambda self: len(self._modules) - ("veneer" in self._modules)
    if hasattr(base, "save_pretrained"):
        made["save_pretrained"] = _saving(base)
    return made


def enter(
    host: Any, module: Any, run: Any, names: tuple[str, ...], args: tuple, kwargs: dict, adapters: Any
) -> Any:
    """One call: choose rows, collect facts, run under the frame, add penalties."""
    session = session_of(host)
    if adapters is not _UNSET:
        session = session_for(host, adapters)
    named = _named(names, args, kwargs)
    extra = _taken(host, named, kwargs)
    total, stack_totals = _totals(host, named)
    if torch.compiler.is_compiling():
        # Names would be guarded one by one; slots are tensors, so one graph serves every switch.
        banks = host.banks if session is None or session.banks is None else session.banks
        rows, program = (), build_banked(host, banks or (), total, module.training)
        return _run(
            host, module, run, names, Frame(host, program, session), named, extra, total, rows, args, kwargs
        )
    rows = host.rows_for(session, total)
    if module.training:
        host.project()  # before any view of a leaf is taken
    if session is not None and session.by_stack:
        program = _program_by_stack(host, session, stack_totals, module.training)
    else:
        program = host.program(rows, module.training) if _any(rows) else {}
    frame = Frame(host, program, session, names=rows)
    return _run(host, module, run, names, frame, named, extra, total, rows, args, kwargs)


def _run(
    host: Any, module: Any, run: Any, names: tuple[str, ...], frame: Frame, named: dict, extra: dict, total: int,
    rows: Any, args: tuple, kwargs: dict,
) -> Any:  # fmt: skip
    """The call under its frame, with what methods add to its loss."""
    program = frame.program
    if program:
        _collect(host, module, frame, named, extra, total)
    with entered(frame):
        if program:
            _conditions(host, module, run, frame, rows, named, extra, total)
            if host.anatomy.facts.encoder_decoder:
                args, kwargs = _encoder_prompts(host, module, names, frame, named, args, kwargs)
        y = run(*args, **kwargs)
        if program and module.training and hasattr(y, "keys") and y.get("loss") is not None:
            penalty = penalty_of(host, frame)
            if penalty is not None:
                y["loss"] = y["loss"] + penalty.to(y["loss"].dtype)
    return y


def _any(rows: Any) -> bool:
    return any(bool(r) for r in rows)


def _program_by_stack(host: Any, session: Session, totals: dict[str, int], training: bool) -> Program:
    """Two towers: names by row of each, each tower's sites from its own."""
    merged: Program = {}
    for stack in session.by_stack or {}:
        rows = host.rows_for(session, totals.get(stack, len(session.by_stack[stack])), stack)  # type: ignore[index]
        for module, ops in host.program(rows, training).items():
            for port in PORTS:
                mine = [op for op in getattr(ops, port) if op.site.stack == stack]
                if mine:
                    getattr(merged.setdefault(module, SiteOps()), port).extend(mine)
            if ops.capture and host.stack_of(module) == stack:
                merged.setdefault(module, SiteOps()).capture = True
    return merged


def session_for(host: Any, names: Any, base: Session | None = None) -> Session:
    """A session from what a person gives: a name, None, a list of names by row, or {stack: names by row}."""
    if isinstance(names, Mapping):
        return Session(host, by_stack={s: _row_names(host, n) for s, n in names.items()})
    if names is None or isinstance(names, str):
        chosen = () if names is None else (names,)
        _known(host, chosen)
        return Session(host, names=chosen, banks=banks_of(host, chosen))
    rows = _row_names(host, names)
    return Session(host, rows=rows, banks=banks_of(host, rows))


def _row_names(host: Any, names: Sequence[Any]) -> list[Names]:
    rows: list[Names] = []
    for n in names:
        row = () if n is None else (n,) if isinstance(n, str) else tuple(n)
        _known(host, row)
        rows.append(row)
    if not rows:
        raise BadOption(
            "names for the rows of a batch: the list is empty.", next_step='for example ["a", None, "b"]'
        )
    return rows


def _known(host: Any, names: Sequence[str]) -> None:
    for n in names:
        host.adapter(n)
        if n in host.merged:
            raise Unsupported(f"adapter '{n}' is merged into the base, so every row has it.",
                              next_step="veneer.unmerge(model) takes it out again")  # fmt: skip


def _named(names: tuple[str, ...], args: tuple, kwargs: dict) -> dict[str, Any]:
    return {**dict(zip(names, args)), **kwargs}


def _taken(host: Any, named: dict, kwargs: dict) -> dict[str, Any]:
    """Inputs that are for adapters, not for the base."""
    wanted = {"tasks", "prompt_mask"}
    for adapter in host.adapters().values():
        wanted.update(getattr(adapter.method, "inputs", ()))
    taken = {}
    for name in wanted:
        if name in kwargs:
            taken[name] = kwargs.pop(name)
            named.pop(name, None)
    return taken


def _totals(host: Any, named: dict) -> tuple[int, dict[str, int]]:
    """Rows of the call, and of each stack where a base has several."""
    by_input = {
        n: v.shape[0] for n, v in named.items()
        if isinstance(v, Tensor) and v.dim() and n not in ("labels", "return_loss")
    }  # fmt: skip
    total = next(iter(by_input.values()), 0)
    for n in (
        "input_ids",
        "inputs_embeds",
        "pixel_values",
        "input_features",
        "decoder_input_ids",
        "x",
        "input",
    ):
        if n in by_input:
            total = by_input[n]
            break
    else:
        encoded = named.get("encoder_outputs")
        if encoded is not None:
            total = first(encoded).shape[0]
    stacks = {"text": by_input.get("input_ids", total), "image": by_input.get("pixel_values", total)}
    return total, stacks


def _length_of(cache: Any) -> int:
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    try:
        return int(cache[0][0].shape[-2])
    except (TypeError, IndexError, AttributeError):
        return 0


def _collect(host: Any, module: nn.Module, frame: Frame, named: dict, extra: dict, total: int) -> None:
    """The facts of the rows, for each stack."""
    facts = host.anatomy.facts
    session = frame.session
    cache = named.get("past_key_values")
    past = _length_of(cache)
    frame.captured["cache"], frame.captured["total"] = cache, total
    ids = named.get("input_ids")
    mask = named.get("attention_mask")
    mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    tokens = _length(named, ("input_ids", "inputs_embeds"))
    now = mask[:, -tokens:] if mask is not None and tokens else mask
    prompt = extra.get("prompt_mask")
    if prompt is None:
        prompt = _prompt(facts, session, named, now, past, total, tokens)
    at = At(
        training=module.training, past=past, mask=now, mask_all=mask,
        prompt=prompt, tasks=extra.get("tasks"), ids=ids if isinstance(ids, Tensor) else None, inputs=extra,
        added=_added(session, total) if past == 0 else None,
        step=host.__dict__.get("step", 0),
    )  # fmt: skip
    frame.at[""] = at
    if facts.encoder_decoder:
        frame.at["encoder"] = at.with_(past=0)
        dmask = named.get("decoder_attention_mask")
        dmask = dmask.bool() if isinstance(dmask, Tensor) and dmask.dim() == 2 else None
        dtokens = _length(named, ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
        start = None
        if past == 0 and dtokens:
            start = torch.zeros(total, dtokens, dtype=torch.bool, device=host.device)
            start[:, 0] = True
        dnow = dmask[:, -dtokens:] if dmask is not None and dtokens else dmask
        frame.at["decoder"] = at.with_(
            mask=dnow, mask_all=dmask, prompt=start, ids=named.get("decoder_input_ids")
        )
    if any(ops.exit for ops in frame.program.values()):
        frame.taps = {}


def _added(session: Session | None, total: int) -> Tensor | None:
    """Positions that `generate` put in, for every beam."""
    if session is None or session.inserted is None:
        return None
    added = session.inserted.added
    return added.repeat_interleave(total // added.shape[0], 0)


def _length(named: dict, names: Sequence[str]) -> int:
    for n in names:
        v = named.get(n)
        if isinstance(v, Tensor) and v.dim() >= 2:
            return v.shape[1]
    return 0


def _prompt(
    facts: Any, session: Session | None, named: dict, mask: Tensor | None, past: int, total: int, tokens: int
) -> Tensor | None:
    """(rows, tokens) bool: which tokens of this call belong to the prompt."""
    if not tokens:
        return None
    device = _device(named)
    if session is not None and session.prompt is not None:
        prompt = session.prompt
        if prompt.shape[0] != total:
            prompt = prompt.repeat_interleave(total // prompt.shape[0], 0)
        if past > 0:
            return torch.zeros(total, tokens, dtype=torch.bool, device=device)
        if prompt.shape[1] < tokens:  # without a cache the prompt must not grow with what was generated
            more = torch.zeros(total, tokens - prompt.shape[1], dtype=torch.bool, device=device)
            prompt = torch.cat([prompt, more], 1)
        return prompt
    if past > 0:
        return torch.zeros(total, tokens, dtype=torch.bool, device=device)
    real = torch.ones(total, tokens, dtype=torch.bool, device=device) if mask is None else mask
    labels = named.get("labels")
    if (
        facts.causal
        and not facts.encoder_decoder
        and isinstance(labels, Tensor)
        and labels.shape == real.shape
    ):
        answered = (labels != -100).long().cumsum(1) > 0
        return real & ~answered
    return real


def _device(named: dict) -> Any:
    return next(v.device for v in named.values() if isinstance(v, Tensor))


# -- conditions, penalties -----------------------------------------------------------------------------------------


def _conditions(
    host: Any, module: Any, run: Any, frame: Frame, rows: Any, named: dict, extra: dict, total: int
) -> None:
    """What adapters make of the whole input, once a call, before the first block; it stays with a generation."""
    used = {n for names in ([rows] if rows and isinstance(rows[0], str) else rows) for n in names}
    wanted = [n for n in sorted(used) if "condition" in host.adapter(n).method.arguments]
    if not wanted:
        return
    if frame.session is None:
        frame.session = Session(host)
    for name in wanted:
        if name in frame.session.conditions and frame.session.generating:
            continue
        adapter = host.adapter(name)
        mine = None if rows and isinstance(rows[0], str) else [i for i, r in enumerate(rows) if name in r]
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
        frame.session.conditions[name] = merged


def _bare(host: Any, run: Any, **inputs: Any) -> Any:
    with entered(Frame(host, {})):
        return run(**inputs)


def penalty_of(host: Any, frame: Frame) -> Tensor | None:
    """The sum of the methods' penalties over the sites of this call's program."""
    total: Tensor | None = None
    used = {op.adapter for ops in frame.program.values() for port in PORTS for op in getattr(ops, port)}
    if frame.session is not None and frame.session.rows is not None:
        used |= {host.adapter(n) for names in frame.session.rows for n in names}
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


# -- encoder-decoders and generation -------------------------------------------------------------------------------


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


def _generating(base: type) -> Any:
    plain = base.generate  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def generate(self: Any, *args: Any, adapters: Any = _UNSET, **kwargs: Any) -> Any:
        host = self.__dict__[HOST]
        outer = session_of(host)
        if adapters is not _UNSET:
            session = session_for(host, adapters)
        elif outer is not None:
            session = Session(host, outer.rows, outer.by_stack, outer.names)
        else:
            session = Session(host, names=host.active)
        session.generating = True
        if args:
            kwargs = {"inputs": args[0], **dict(zip(("generation_config",), args[1:])), **kwargs}
        kwargs = _open_generation(host, self, session, kwargs)
        with opened(session):
            return plain(self, **kwargs)

    return generate


def _saving(base: type) -> Any:
    plain = base.save_pretrained  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """The base under its own keys, and each adapter in a folder of its own under `veneer/`."""
        from ._store import save

        host = self.__dict__[HOST]
        own = kwargs.pop("state_dict", None)
        own = self.state_dict() if own is None else own
        kwargs["state_dict"] = {k: v for k, v in own.items() if not k.startswith("veneer.")}
        result = plain(self, save_directory, *args, **kwargs)
        for name in host.names:
            if host.adapter(name).prepared:
                save(self, name, Path(save_directory) / "veneer" / name)
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
    extra = _taken(host, named, named)
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
    if not _any(names):
        return named
    frame = Frame(host, host.program(names, model.training), session, names=names)
    _collect(host, model, frame, {**named, "input_ids": ids}, extra, rows)
    with entered(frame):
        _conditions(
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


__all__ = ["enter", "frame_of", "inspect", "penalty_of", "session_for"]
