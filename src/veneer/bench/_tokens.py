"""Greedy decoding of the whole SmolLM2 shape: a prompt of 16, 8 new tokens, another LoRA in every row.

The references are HF PEFT row by row with the row's adapter set, which any library can do, and HF PEFT's batch with one
adapter, which mixes nothing. The same loop drives both sides: one prefill, then a token a step behind the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from veneer.bases.matmul import set_matmul

from . import _bases, _peer
from ._clock import Arm, check_equal, interleaved
from ._report import Expectation, Row
from ._size import Size

PROMPT, NEW = 16, 8
OVER_ONE_BY_ONE = {8: 5.0, 32: 7.0}
OVER_BATCH = {"plain": 1.3, "bf16": 2.0, "int8": 2.2}
LIMIT = "The weights' bytes in decoding; both sides grow the base's own cache, which slots of a fixed size would not."
BATCH = "HF PEFT, one adapter for the batch"
ONE = "HF PEFT row by row"


@torch.no_grad()
def generate(model: Any, ids: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
    """(new tokens (rows, NEW), logits of the first of them), greedily."""
    y = model(input_ids=ids, use_cache=True, logits_to_keep=1, **named)
    first = y.logits[:, -1]
    tokens = [first.argmax(-1)]
    for _ in range(NEW - 1):
        y = model(input_ids=tokens[-1][:, None], past_key_values=y.past_key_values, use_cache=True, **named)
        tokens.append(y.logits[:, -1].argmax(-1))
    return torch.stack(tokens, 1), first


def decode(size: Size) -> list[Row]:
    adapters = 2 if size.toy else 8
    theirs = _peer.adapted(_bases.causal(size.seed, size.toy), _peer.lora(_bases.QUERY_VALUE["smollm2"], 8,
                           init_lora_weights=False), "a0")  # fmt: skip
    names = [f"a{i}" for i in range(adapters)]
    _peer.add(theirs, _peer.lora(_bases.QUERY_VALUE["smollm2"], 8, init_lora_weights=False), names[1:])
    sides: dict[str, Any] = {}
    for form in OVER_BATCH:
        sides[form] = _bases.causal(size.seed, size.toy)
        set_matmul(sides[form], form)
        _peer.copy(theirs, sides[form], names)
    found = []
    for rows in (2, 4) if size.toy else (8, 32):
        found += _rows(rows, names, sides, theirs, size)
    return found


def _rows(rows: int, names: list[str], sides: dict[str, Any], theirs: Any, size: Size) -> list[Row]:
    ids = _bases.batch("smollm2", rows, PROMPT, size.seed, size.toy)["input_ids"]
    named = [names[i % len(names)] for i in range(rows)]

    def one_by_one() -> list[tuple[Tensor, Tensor]]:
        made = []
        for i, name in enumerate(named):
            theirs.set_adapter(name)
            made.append(generate(theirs, ids[i : i + 1]))
        return made

    def batch() -> Any:
        return generate(theirs, ids)

    expected = one_by_one()
    first = torch.cat([f for _, f in expected])
    tokens = torch.cat([t for t, _ in expected])
    got = {form: generate(model, ids, adapters=named) for form, model in sides.items()}
    error = check_equal(f"tokens, {rows} rows", got["plain"][1], first, 1e-4)
    agree = {form: float((made[0] == tokens).float().mean()) for form, made in got.items()}
    theirs.set_adapter(named[0])
    arms = {
        form: Arm(functools.partial(generate, model, ids, adapters=named)) for form, model in sides.items()
    }
    spent = interleaved({**arms, "batch": Arm(batch), "one": Arm(one_by_one, once=True)}, size.repeats)
    setting = f"smollm2 whole, query, value, rank 8, {rows} rows, {PROMPT} + {NEW} tokens"

    def speed(form: str) -> str:
        median = sorted(spent[form])[len(spent[form]) // 2]
        return (
            f"{rows * NEW / median:.0f} tokens/s; greedy tokens equal to HF PEFT's float32: {agree[form]:.3f}"
        )

    made = [
        Row.of("tokens", f"{setting}, plain", spent["plain"], spent["one"], error=error, reference=ONE,
               expected=size.expects(Expectation(OVER_ONE_BY_ONE.get(rows, 1.0), LIMIT)), notes=[speed("plain")])
    ]  # fmt: skip
    for form, least in OVER_BATCH.items():
        limit = LIMIT if form == "plain" else f"{LIMIT} Beside that, the operations that round x."
        made.append(Row.of("tokens", f"{setting}, {form}", spent[form], spent["batch"], error=error, reference=BATCH,
                           expected=size.expects(Expectation(least, limit)), notes=[speed(form)]))  # fmt: skip
    return made
