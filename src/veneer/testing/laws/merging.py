"""Law 6: merged equals attached, and unmerging gives every bit back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer import engine
from veneer.errors import Unsupported

from .._law import Broken, NotClaimed, agree, differ, law, same_bits
from .._subject import Subject, bits


@law(6, "merge")
def merge(s: Subject) -> str:
    """Merged equals attached, one adapter and two on the same sites; unmerging gives back each bit."""
    contents = s.base.contents(3)
    model = s.model()
    bare, before = s.evaluated(model, contents), bits(model)
    adapter = s.attach(model, "a", 1)
    reason = engine.why_not(adapter)
    if reason:
        raise NotClaimed(reason)
    attached = s.evaluated(model, contents)
    differ(attached, bare, "the randomised adapter changes nothing")
    worst = _merged(s, model, "a", contents, attached)
    _given_back(s, model, contents, before, attached)
    note = _two(s, model, contents, before, s.method, 2)
    if s.dense is not None:
        engine.detach(model, "b")
        _two(s, model, contents, before, s.dense, 3)
    _report_is_honest(s)
    return f"{worst:.1e}{note}"


def _merged(s: Subject, model: nn.Module, names: Any, contents: Any, attached: Any, of: str = "") -> float:
    report = engine.merge(model, names, probe=s.inputs(contents))
    worst = agree(s.evaluated(model, contents), attached, f"merged {names}{of} against attached")
    if report.max_abs_error is None or report.relative_error is None:
        raise Broken("a merge with a probe reports no error")
    return worst


def _given_back(s: Subject, model: nn.Module, contents: Any, before: dict, attached: Any) -> None:
    engine.unmerge(model)
    after = bits(model)
    for name, value in before.items():
        same_bits(after[name], value, f"'{name}' after unmerge")
    same_bits(s.evaluated(model, contents), attached, "the output after unmerge")


def _two(s: Subject, model: nn.Module, contents: Any, before: dict, other: Any, seed: int) -> str:
    """Two on the same sites: one merged under the other, each way, and both."""
    s.attach(model, "b", seed, method=other)
    engine.activate(model, ["a", "b"])
    attached = s.evaluated(model, contents)
    refused = ""
    for names in ("a", "b", ["a", "b"]):
        try:
            _merged(s, model, names, contents, attached, f" of two, 'b' being {other.key},")
        except Unsupported as e:
            # A scale of outputs acts on what live weight edits add, so the engine may refuse it; a sum it
            # may not.
            if "affine" not in s.method.arguments:
                raise Broken(f"merging {names} of two is refused: {e.what}") from None
            refused = f"; {names} of two refused: {e.what}"
            continue
        engine.unmerge(model)
        after = bits(model)
        for name, value in before.items():
            same_bits(after[name], value, f"'{name}' after unmerging {names} of two")
        engine.activate(model, ["a", "b"])
    return refused


def _report_is_honest(s: Subject) -> None:
    """In bfloat16 the report's error is the error."""
    contents = s.base.contents(3)
    model = s.model(torch.bfloat16)
    s.attach(model, "a", 1)
    attached = torch.cat(s.evaluated(model, contents, dtype=torch.bfloat16))
    probe = s.inputs(contents, torch.bfloat16)
    report = engine.merge(model, "a", probe=probe)
    found = float((torch.cat(s.evaluated(model, contents, dtype=torch.bfloat16)) - attached).abs().max())
    told = report.max_abs_error
    if told is None or not told >= 0.0:
        raise Broken("in bfloat16 the merge reports no error")
    # The report looks at logits, padding included; the law at what it reads, which may hold more than logits.
    if s.base.kind != "encoder" and found > told * 1.01 + 1e-9:
        raise Broken(
            f"in bfloat16 merging changes the output by {found:.3g}, and the report says {told:.3g}", found
        )
    final = s.model()
    s.attach(final, "a", 1)
    expected = s.evaluated(final, contents)
    engine.merge(final, "a", keep=False)
    if "veneer" in dict(final.named_children()):
        raise Broken("after a final merge the model still carries something")
    agree(s.evaluated(final, contents), expected, "after a final merge")
