"""Cohorts over a network of convolutions that answers with a named tuple, as the builtin picture base does."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from veneer.training._kept import Table
from veneer.training.cohorts.shared_forward import cut


class Output(NamedTuple):
    logits: Tensor
    features: Tensor | None = None


def test_a_named_tuple_is_cut_into_one_of_its_kind():
    whole = Output(torch.arange(12.0).view(4, 3), torch.ones(4, 2))
    mine = cut(whole, (1, 3), 0, 0, 4)
    assert isinstance(mine, Output)
    assert mine.logits.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert mine.features.shape == (2, 2)
    assert cut((whole.logits, 5), (0, 1), 0, 0, 4)[1] == 5


class Recorded:
    """A base whose prefix leaves these states, row by row."""

    def __init__(self, shapes):
        draw = torch.Generator().manual_seed(0)
        self.of = {place: torch.randn(40, *shape, generator=draw) for place, shape in shapes.items()}

    def record(self, model, wanted, inputs):
        from types import SimpleNamespace

        rows = inputs["pixel_values"][:, 0].long()
        return SimpleNamespace(plain={}, states={p: self.of[p][rows] for p in wanted.places})


def table_over(recorded, monkeypatch):
    from types import SimpleNamespace

    from veneer import engine

    monkeypatch.setattr(engine, "record_prefix", recorded.record)

    class Task:
        def collate(self, rows, feeder, model):
            values = torch.tensor([[float(r["row"])] for r in rows])
            batch = SimpleNamespace(inputs={"pixel_values": values}, extra={})
            batch.to = lambda device: batch
            return batch

    rows = [{"row": i, "length": 1} for i in range(40)]
    kept = SimpleNamespace(
        model=nn.Linear(1, 1), stack="", dtype=None, room=lambda tokens, width, dtype: torch.empty(tokens, width),
        accelerator=SimpleNamespace(device="cpu", autocast=torch.no_grad),
    )  # fmt: skip
    task = Task()
    return Table(SimpleNamespace(features=rows), task, None, kept), rows, task


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 2), (3, 2, 4, 5)])
def test_kept_maps_come_back_in_their_shape_row_by_row(shape, monkeypatch):
    from types import SimpleNamespace

    recorded = Recorded({7: shape})
    table, rows, task = table_over(recorded, monkeypatch)
    asked = [31, 2, 17, 3]
    batch = task.collate([rows[i] for i in asked], None, None)
    found = table.states(SimpleNamespace(places=(7,)), [rows[i] for i in asked], batch)
    assert torch.equal(found[7], recorded.of[7][asked])
    assert len(table.filled[7]) > 1


def test_maps_that_shrink_from_place_to_place_are_not_kept(monkeypatch):
    from types import SimpleNamespace

    table, rows, task = table_over(Recorded({1: (3, 8, 8), 2: (5, 4, 4)}), monkeypatch)
    batch = task.collate(rows[:4], None, None)
    assert table.states(SimpleNamespace(places=(1, 2)), rows[:4], batch) is None
    assert table.refused
