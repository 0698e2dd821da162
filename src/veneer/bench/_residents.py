"""Attach, load, activate: what the first adapter costs, and what the 200th costs.

LoRA of rank 8 on query and value of the encoder. "The first" is on a base without adapters (an untimed step takes it
off again), "the 200th" on a base that carries 199. Attaching includes the first forward through the new adapter.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch

import veneer

from . import _bases, _peer
from ._clock import Arm, check_equal, check_moved, interleaved
from ._report import Expectation, Row
from ._size import Size

OPTIONS: dict[str, Any] = {"rank": 8, "alpha": 16, "sites": "attention.{query,value}"}
MANY = Expectation(20, "Most of it is the base's own forward, which both sides pay.")
_WORLDS: dict[Any, World] = {}


class World:
    """Two bases of the same weights, each with the same number of resident adapters, and folders to load from."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.ours = _bases.make("minilm", size.seed, size.toy)
        self.inputs = _bases.batch("minilm", 1, 8, size.seed, size.toy)
        self.config = _peer.lora(_bases.QUERY_VALUE["minilm"], 8)
        drawn = _peer.lora(_bases.QUERY_VALUE["minilm"], 8, init_lora_weights=False)
        base = _bases.make("minilm", size.seed, size.toy)
        bare = self.forward(base)
        self.theirs = _peer.adapted(base, drawn, "drawn")
        self.work = tempfile.TemporaryDirectory()
        self.theirs.save_pretrained(self.work.name)
        self.peft_folder = Path(self.work.name) / "drawn"
        veneer.load(self.ours, self.peft_folder, name="drawn")
        self.folder = veneer.save(self.ours, "drawn", Path(self.work.name) / "ours")
        self.error = self.same()
        check_moved("attach", self.forward(self.ours), bare)

    def forward(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            return _bases.hidden(model(**self.inputs))

    def same(self) -> float:
        """Outputs through the drawn adapter, compared."""
        return check_equal("attach, load", self.forward(self.ours), self.forward(self.theirs))

    def fill(self, count: int) -> None:
        """Adapters until each side carries `count`."""
        present = list(veneer.adapters(self.ours))
        names = [f"resident {i}" for i in range(count - len(present))]
        for name in names:
            veneer.attach(self.ours, "lora", name=name, activate=False, **OPTIONS)
        _peer.add(self.theirs, self.config, [n.replace(" ", "_") for n in names])
        veneer.activate(self.ours, "drawn")
        self.theirs.set_adapter("drawn")
        self.error = max(self.error, self.same())


def world(size: Size) -> World:
    """The bases that carry one adapter less than "the 200th", made once a process: they take long to fill."""
    if size not in _WORLDS:
        _WORLDS[size] = World(size)
        _WORLDS[size].fill(size.residents - 1)
    return _WORLDS[size]


def attach(size: Size) -> list[Row]:
    w = world(size)
    bare, base = (_bases.make("minilm", size.seed, size.toy) for _ in range(2))
    wrapped: list[Any] = []

    def ours_first() -> None:
        veneer.attach(bare, "lora", name="new", **OPTIONS)
        w.forward(bare)

    def theirs_first() -> None:
        wrapped.append(_peer.adapted(base, w.config, "new"))
        w.forward(wrapped[-1])

    first = {
        "veneer": Arm(ours_first, lambda: veneer.detach(bare, "new"), once=True),
        "peft": Arm(theirs_first, lambda: wrapped.pop().unload(), once=True),
    }

    def ours() -> None:
        veneer.attach(w.ours, "lora", name="new", **OPTIONS)
        w.forward(w.ours)

    def theirs() -> None:
        _peer.add(w.theirs, w.config, ["new"])
        w.theirs.set_adapter("new")
        w.forward(w.theirs)

    def theirs_only() -> None:
        _peer.add(w.theirs, w.config, ["new"])
        w.theirs.set_adapter("new")

    many = {
        "veneer": Arm(ours, lambda: veneer.detach(w.ours, "new"), once=True),
        "peft": Arm(theirs, lambda: _gone(w.theirs), once=True),
    }
    alone = {
        "veneer": Arm(
            lambda: veneer.attach(w.ours, "lora", name="new", **OPTIONS),
            lambda: veneer.detach(w.ours, "new"),
            once=True,
        ),
        "peft": Arm(theirs_only, lambda: _gone(w.theirs), once=True),
    }
    return [
        _row("attach", "the 1st, with its first forward", first, size, w),
        _row("attach", f"{_th(size)}, with its first forward", many, size, w, MANY),
        _row("attach", f"{_th(size)}, without a forward", alone, size, w),
    ]


def load(size: Size) -> list[Row]:
    w = world(size)
    bare, base = (_bases.make("minilm", size.seed, size.toy) for _ in range(2))
    wrapped: list[Any] = []
    first = {
        "veneer": Arm(
            lambda: veneer.load(bare, w.folder, name="new"), lambda: veneer.detach(bare, "new"), once=True
        ),
        "peft": Arm(
            lambda: wrapped.append(_peer.from_folder(base, w.peft_folder, "new")),
            lambda: wrapped.pop().unload(),
            once=True,
        ),
    }

    def many(folder: Path) -> dict[str, Arm]:
        return {
            "veneer": Arm(
                lambda: veneer.load(w.ours, folder, name="new"),
                lambda: veneer.detach(w.ours, "new"),
                once=True,
            ),
            "peft": Arm(
                lambda: _peer.load(w.theirs, w.peft_folder, "new"), lambda: _gone(w.theirs), once=True
            ),
        }

    return [
        _row("load", "the 1st, each its own folder", first, size, w),
        _row("load", f"{_th(size)}, each its own folder", many(w.folder), size, w, Expectation(20)),
        _row("load", f"{_th(size)}, both HF PEFT's folder", many(w.peft_folder), size, w, Expectation(20)),
    ]


def activate(size: Size) -> list[Row]:
    w = world(size)
    few = World(size)
    few.fill(2)
    return [
        _row("activate", f"one of {count}", _switching(x), size, x)
        for x, count in ((few, 2), (w, size.residents - 1))
    ]


def _switching(w: World) -> dict[str, Arm]:
    """Turns between two adapters of the residents."""
    ours, theirs = itertools.cycle(["resident 0", "drawn"]), itertools.cycle(["resident_0", "drawn"])
    return {
        "veneer": Arm(lambda: veneer.activate(w.ours, next(ours))),
        "peft": Arm(lambda: w.theirs.set_adapter(next(theirs))),
    }


def _gone(model: Any) -> None:
    model.delete_adapter("new")
    model.set_adapter("drawn")


def _th(size: Size) -> str:
    return f"the {size.residents}th"


def _row(
    case: str, setting: str, arms: dict[str, Arm], size: Size, w: World, expected: Expectation | None = None
) -> Row:
    found = interleaved(arms, size.repeats)
    return Row.of(
        case, setting, found["veneer"], found["peft"], error=w.error, expected=size.expects(expected)
    )
