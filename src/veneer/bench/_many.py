"""What an adapter costs beside a thousand others: attach, load and activate, over the same beside none.

The reference is veneer itself with nothing else attached; HF PEFT's own figures stand in attach, load and activate.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import veneer

from . import _bases
from ._clock import Arm, interleaved
from ._report import Expectation, Row
from ._size import Size

MANY = 1000
ALONE = "beside none"
BUDGETS = {"attach": 1e-3, "load": 1e-3, "activate": 1e-4}  # seconds
OPTIONS = {"rank": 8, "alpha": 16, "sites": "attention.{query,value}"}


def many(size: Size) -> list[Row]:
    present = 5 if size.toy else MANY
    alone = _bases.make("minilm", size.seed, size.toy)
    crowd = _bases.make("minilm", size.seed, size.toy)
    for model, count in ((alone, 1), (crowd, present)):
        for i in range(count):
            veneer.attach(model, "lora", name=f"a{i}", activate=False, **OPTIONS)
    with tempfile.TemporaryDirectory() as work:
        folder = veneer.save(alone, "a0", Path(work) / "one")
        arms = {
            (words, side): _arm(words, model, folder)
            for words in BUDGETS
            for side, model in (("alone", alone), ("crowd", crowd))
        }
        rows = []
        for words, budget in BUDGETS.items():
            spent = interleaved({side: arms[words, side] for side in ("crowd", "alone")}, size.repeats)
            expected = Expectation.at_most(1.2) if words != "activate" else None
            rows.append(Row.of("many", f"{words}, beside {present}", spent["crowd"], spent["alone"], reference=ALONE,
                               expected=size.expects(expected)))  # fmt: skip
            fixed = [budget] * len(spent["crowd"])
            within = size.expects(Expectation.at_most(1.0))
            rows.append(Row.of("many", f"{words}, beside {present}", spent["crowd"], fixed, expected=within,
                               reference=f"{1000 * budget:g} ms"))  # fmt: skip
    return rows


def _arm(words: str, model: object, folder: Path) -> Arm:
    import itertools

    turn = itertools.count()

    def attach() -> None:
        veneer.attach(model, "lora", name="new", activate=False, **OPTIONS)  # type: ignore[arg-type]

    def load() -> None:
        veneer.load(model, folder, name="new", activate=False)  # type: ignore[arg-type]

    def activate() -> None:
        veneer.activate(model, "a0" if next(turn) % 2 else None)  # type: ignore[arg-type]

    if words == "activate":
        return Arm(activate)
    return Arm(attach if words == "attach" else load, lambda: veneer.detach(model, "new"), once=True)  # type: ignore[arg-type]
