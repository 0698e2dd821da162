"""Sixteen LoRA adapters trained together on tiny batches of their own, beside sixteen HF PEFT steps.

Each adapter has one or two rows of 16 to 32 tokens. HF PEFT's models share the base's tensors, so that no side is
burdened by memory, and none pays for switching adapters.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import veneer
from veneer.bases.matmul import set_matmul

from . import _bases, _drawn, _peer
from ._clock import Arm, check_equal, interleaved
from ._report import Expectation, Row
from ._size import Size

EXPECTED = {("plain", 1): 0.60, ("plain", 2): 0.75, ("bf16", 1): 0.42, ("bf16", 2): 0.50}
LIMIT = "The same FLOPs as sixteen runs: what is saved is the cost of a call and of small products."
FORM_ERROR = {"plain": 1e-4, "bf16": 5e-2}
LENGTHS = (16, 32)


def cohort(size: Size) -> list[Row]:
    rows = []
    for each in (1, 2):
        batches = _batches(each, size)
        model = _bases.make("minilm", size.seed, size.toy)
        names = list(batches)
        sides = {form: _Side(form, names, size) for form in ("plain", "bf16")}
        with tempfile.TemporaryDirectory() as work:
            theirs = {name: _theirs(sides["plain"].model, name, Path(work) / name, model) for name in names}
        expected = _losses(theirs, batches)
        timed = {form: Arm(functools.partial(side.cohort.step, batches)) for form, side in sides.items()}
        errors = {}
        for form, side in sides.items():
            found = side.cohort.step(batches)
            got = torch.tensor([found[name] for name in names])
            errors[form] = check_equal(f"cohort, {form}", got, expected, FORM_ERROR[form])
        spent = interleaved({**timed, "peft": Arm(_steps(theirs, batches))}, size.repeats)
        for form in sides:
            expects = Expectation.at_most(EXPECTED[form, each], LIMIT)
            rows.append(Row.of(
                "cohort", f"minilm, query, value, rank 8, {len(names)} x {each} rows of 16 to 32, {form}", spent[form],
                spent["peft"], error=errors[form], expected=size.expects(expects),
                notes=[f"the reference is {len(names)} HF PEFT steps in float32"],
            ))  # fmt: skip
    return rows


def _batches(rows: int, size: Size) -> dict[str, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(size.seed)
    least, most = (3, 6) if size.toy else LENGTHS
    found = {}
    for i in range(max(size.adapters)):
        tokens = int(torch.randint(least, most + 1, (1,), generator=draw))
        found[f"a{i}"] = _bases.batch("minilm", rows, tokens, i, size.toy)
    return found


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean square of the last hidden state's distance from a wave: any smooth target serves."""
    y = _bases.hidden(model(**batch))
    return nn.functional.mse_loss(y, torch.linspace(-1, 1, y.shape[-1]).expand_as(y))


class _Side:
    def __init__(self, form: str, names: list[str], size: Size) -> None:
        self.model = _bases.make("minilm", size.seed, size.toy)
        set_matmul(self.model, form)
        members = {name: {"method": "lora:rank=8", "seed": i} for i, name in enumerate(names)}
        self.cohort = veneer.Cohort(
            self.model, members, learning_rate=1e-6, weight_decay=0.0, clip=None, loss=_loss
        )  # the rate is tiny, so that all sides stay at the values that were compared
        for i, name in enumerate(names):
            _drawn.draw(veneer.adapters(self.model)[name], i)


def _theirs(ours: nn.Module, name: str, folder: Path, base: nn.Module) -> Any:
    """HF PEFT's model of the same adapter, over the tensors of one base."""
    veneer.export(ours, name, folder, format="peft")
    made = _bases.make_like(base)
    model = _peer.from_folder(made, folder, "default").train()
    for n, p in model.named_parameters():
        p.requires_grad_("lora_" in n)
    return model


def _losses(models: dict[str, Any], batches: dict[str, dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([_loss(models[name], batch) for name, batch in batches.items()])


def _steps(models: dict[str, Any], batches: dict[str, dict[str, Tensor]]) -> Callable[[], None]:
    optimizers = {
        name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0)
        for name, m in models.items()
    }

    def run() -> None:
        for name, model in models.items():
            _loss(model, batches[name]).backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)

    return run
