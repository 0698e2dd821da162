"""Collecting the facts of a call: which inputs there are, how many rows, where the prompt and the padding lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.edits import At

from ._frame import Frame, Session, local
from ._outputs import first
from ._tokens import forget_rows
from ._watch import watched


def named_inputs(names: tuple[str, ...], args: tuple, kwargs: dict) -> dict[str, Any]:
    return {**dict(zip(names, args)), **kwargs}


def taken(host: Any, named: dict, kwargs: dict) -> dict[str, Any]:
    """Inputs that are for adapters, not for the base."""
    wanted = {"tasks", "prompt_mask"}
    for bank in host.members.values():  # one adapter of each shape tells: the thousandth costs nothing
        if bank:
            wanted.update(getattr(host.adapter(next(iter(bank))).method, "inputs", ()))
    taken = {}
    for name in wanted:
        if name in kwargs:
            taken[name] = kwargs.pop(name)
            named.pop(name, None)
    return taken


def totals(host: Any, named: dict) -> tuple[int, dict[str, int]]:
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


def tokens_of(named: dict) -> int:
    """Tokens of a row of this call, as far as its inputs tell."""
    for n in ("input_ids", "inputs_embeds", "decoder_input_ids", "x", "input"):
        value = named.get(n)
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.shape[1]
    return 1


def length_of(cache: Any) -> int:
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    try:
        return int(cache[0][0].shape[-2])
    except (TypeError, IndexError, AttributeError):
        return 0


def collect(host: Any, module: nn.Module, frame: Frame, named: dict, extra: dict, total: int) -> None:
    """The facts of the rows, for each stack."""
    facts = host.anatomy.facts
    session = frame.session
    cache = named.get("past_key_values")
    past = length_of(cache)
    frame.captured["cache"], frame.captured["total"] = cache, total
    ids = named.get("input_ids")
    mask = named.get("attention_mask")
    mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if mask is None and session is not None:
        mask = session.mask
    tokens = _length(named, ("input_ids", "inputs_embeds"))
    now = mask[:, -tokens:] if mask is not None and tokens else mask
    prompt = extra.get("prompt_mask")
    if prompt is None:
        prompt = _prompt(facts, session, named, now, past, total, tokens)
    at = (At if local.read is None else watched(local.read))(
        training=module.training, past=past, mask=now, mask_all=mask,
        prompt=prompt, tasks=_tasks(extra, session, total), ids=ids if isinstance(ids, Tensor) else None, inputs=extra,
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


def see_memory(frame: Frame, named: dict) -> None:
    """What a decoder is given of its encoder, as a fact of its rows."""
    states, mask = named.get("encoder_hidden_states"), named.get("encoder_attention_mask")
    if not isinstance(states, Tensor):
        states, mask = named.get("memory"), named.get("memory_key_padding_mask")  # torch's own names
        mask = None if mask is None else ~mask.bool()
    if not isinstance(states, Tensor):
        return
    mask = mask.bool() if isinstance(mask, Tensor) and mask.shape == states.shape[:2] else None
    at = frame.at.get("decoder") or frame.at.get("") or At()
    # Detached, as the states of blocks are: a choice of rows would save a tensor that a recomputed block does not.
    frame.at["decoder"] = at.with_(memory=states.detach(), memory_mask=mask)
    forget_rows(frame)


def _tasks(extra: dict, session: Session | None, total: int) -> Tensor | None:
    """The task of each row: of this call, or of when generation began, for every beam."""
    tasks = extra.get("tasks")
    if tasks is None and session is not None:
        tasks = session.extra.get("tasks")
    if isinstance(tasks, Tensor) and tasks.dim() and tasks.shape[0] and total > tasks.shape[0]:
        tasks = tasks.repeat_interleave(total // tasks.shape[0], 0)
    return tasks


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
