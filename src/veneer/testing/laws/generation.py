"""Law 11: a cache changes the time of generation and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer import engine

from .._law import Broken, agree, law
from .._subject import Subject
from .rows import mixed

NEW = 5  # tokens


@law(11, "cache", speaks_of=lambda base: base.generates)
def cache(s: Subject) -> str:
    """With a cache is without, token for token, greedy and with beams, with a name for each sequence."""
    model = s.model()
    names = mixed(s, model)
    contents = s.base.contents(len(names))
    worst = 0.0
    with engine.rows(model, names):
        cached, logits = _generate(s, model, contents, use_cache=True)
        plain, slow_logits = _generate(s, model, contents, use_cache=False)
    _same_tokens(cached, plain, "with a cache against without, a name a sequence", names)
    worst = max(worst, agree(logits, slow_logits, "logits of generation with a cache against without"))
    for i, (n, c) in enumerate(zip(names, contents)):
        with engine.active(model, n):
            alone, own = _generate(s, model, [c], use_cache=True)
        _same_tokens(cached[i : i + 1], alone, "in a mixed batch against alone", [n])
        worst = max(
            worst, agree(logits[:, i], own[:, 0], f"logits of {n} generated in a mixed batch against alone")
        )
    few = names[:4]
    with engine.rows(model, few):
        beams = [_generate(s, model, contents[:4], use_cache=c, num_beams=3)[0] for c in (True, False)]
    _same_tokens(beams[0], beams[1], "three beams with a cache against without", few)
    return f"{worst:.1e}"


@torch.no_grad()
def _generate(s: Subject, model: nn.Module, contents: Sequence[Any], **options: Any) -> tuple[Tensor, Tensor]:
    """(rows, new tokens) and, for greedy search, (new tokens, rows, vocabulary) logits."""
    inputs = s.inputs(contents, side="left" if "left" in s.base.sides else "right")
    for name in ("position_ids", "decoder_input_ids"):
        inputs.pop(name, None)
    made = model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip
    return made.sequences[:, -NEW:], torch.stack(made.logits)


def _same_tokens(found: Tensor, expected: Tensor, what: str, names: Sequence[Any]) -> None:
    for i, n in enumerate(names):
        if not torch.equal(found[i], expected[i]):
            raise Broken(f"{what}: {n} generates {found[i].tolist()}, and {expected[i].tolist()}")
