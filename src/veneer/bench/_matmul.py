"""The training step of LoRA over each form of the frozen matmul, beside HF PEFT in float32 and under autocast.

All sides run in turn within each repeat, on the same values and the same batch. The error of a form, of the output and
of the adapter's gradient against plain float32, stands beside its time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import veneer
from veneer.bases.matmul import FORMS, matmul_errors, matmul_of, set_matmul
from veneer.errors import VeneerError

from . import _bases, _peer
from ._clock import Arm, check_moved, interleaved
from ._report import Expectation, Row
from ._size import Size
from ._training import Setting, Sides

EXPECTED = {"plain": None, "packed": 0.95, "bf16": 0.62, "int8": 0.55}
LIMIT = "Attention and elementwise work stay float32, and the adapter's own products and sums are separate operations."
AUTOCAST = "HF PEFT under bf16 autocast"
WRONG = 0.2  # relative error of an output that no rounding explains


def training(size: Size) -> list[Row]:
    rows = []
    for shape, which in (
        ("minilm", "query, value, rank 8"),
        ("minilm", "all linears, rank 16"),
        ("smollm2", "all linears, rank 16"),
    ):
        rows += _step(Setting("lora", shape, which, size.rows // 2, 6 if size.toy else 64), size)
    return rows


def _step(setting: Setting, size: Size) -> list[Row]:
    sides = Sides(setting, size)
    sides.check()
    arms = sides.arms()
    timed = {"peft": arms["peft"], "autocast": Arm(_autocast(sides))}
    found: dict[str, Any] = {}
    for form in FORMS:
        model: Any = _bases.make(setting.shape, size.seed, size.toy)
        set_matmul(model, form)
        _peer.copy(sides.theirs, model, ["default"])
        model.train()
        found[form] = _errors(model, sides, form)
        optimizer = torch.optim.AdamW(veneer.parameters(model, lr=1e-4), lr=1e-4, weight_decay=0.0)
        timed[form] = Arm(sides.step(model, optimizer))
    spent = interleaved(timed, size.repeats)
    rows = []
    for form in FORMS:
        errors, notes = found[form]
        wanted = EXPECTED[form]
        expected = None if wanted is None else Expectation.at_most(wanted, LIMIT)
        rows.append(Row.of("matmul", f"{setting.words}, {form}", spent[form], spent["peft"], error=errors.output,
                           expected=size.expects(expected), notes=notes))  # fmt: skip
        if form in ("bf16", "int8"):
            rows.append(Row.of("matmul", f"{setting.words}, {form}", spent[form], spent["autocast"],
                               error=errors.output, reference=AUTOCAST))  # fmt: skip
    rows.append(Row.of("matmul", f"{setting.words}, its own autocast", spent["autocast"], spent["peft"],
                       notes=["both sides are HF PEFT here"]))  # fmt: skip
    return rows


def _errors(model: Any, sides: Sides, form: str) -> tuple[Any, list[str]]:
    """Against plain float32, and what to say of it; an error where the output is another one."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        check_moved(f"matmul, {form}", _bases.hidden(model(**sides.inputs)), sides.bare)
        shown = matmul_errors(model, lambda: _bases.hidden(model(**sides.inputs)))
    slopes = matmul_errors(model, lambda: sides.loss(model), trained)
    shown.gradient = slopes.gradient
    if not shown.output < WRONG:
        raise VeneerError(
            f"matmul={form}: the output differs from plain float32 by {shown.output:.1e}; nothing was timed.",
            next_step="a speed of wrong results is no speed: look at the equations first",
        )
    said = [] if form == "plain" else [f"error: output {shown.output:.1e}, gradient {slopes.gradient:.1e}"]
    runs = matmul_of(model)
    return shown, said + ([f"falls back: {runs.reason}"] if runs.reason else [])


def _autocast(sides: Sides) -> Callable[[], None]:
    trained = [p for p in sides.theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = sides.loss(sides.theirs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run
