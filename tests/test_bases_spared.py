"""Weights beside which a form keeps its copies can lie in a mapped file: no memory, the same numbers."""

import copy

import pytest
import torch
from torch import nn

import veneer
from veneer.bases import _spared
from veneer.bases.matmul import matmul_of, set_matmul
from veneer.errors import BadOption

WIDE = 1024


def resident_of(tensor):
    """Bytes of a tensor's pages that are in this process's memory, from the kernel's own table."""
    start, found, inside = tensor.data_ptr(), 0, False
    with open("/proc/self/smaps", encoding="utf-8") as file:
        for line in file:
            head = line.split(maxsplit=1)[0]
            if "-" in head and ":" not in head:
                low, high = (int(part, 16) for part in head.split("-"))
                inside = low <= start < high
            elif inside and head == "Rss:":
                found = int(line.split()[1]) * 1024
    return found


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, WIDE)).requires_grad_(False)


@pytest.mark.parametrize("form", ["packed", "int8"])
def test_memory_holds_the_copies_alone_and_the_output_is_the_same(form):
    x = torch.randn(4, WIDE)
    usual, spared = model(), model()
    set_matmul(usual, form)
    said = set_matmul(spared, form, weights="disk")
    if said.reason:
        pytest.skip(said.reason)
    assert said.on_disk == 2 * 4 * WIDE * WIDE
    assert torch.equal(spared(x), usual(x))
    assert resident_of(spared[0].weight) < 4 * WIDE * WIDE / 10
    assert resident_of(usual[0].weight) >= 4 * WIDE * WIDE * 0.9
    assert torch.equal(spared[0].weight, usual[0].weight)  # who asks gets it


def test_it_trains_with_the_same_gradients_and_lets_go_again():
    x = torch.randn(4, WIDE)
    found = []
    for weights in ("memory", "disk"):
        base = model()
        set_matmul(base, "packed", weights=weights)
        adapter = veneer.attach(base, "lora", name="mine", rank=4, sites="linear", seed=1)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.1)
        base(x).pow(2).sum().backward()
        found.append([p.grad for p in adapter.parameters() if p.grad is not None])
    assert found[0]
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert resident_of(base[2].weight) < 4 * WIDE * WIDE / 10


def test_merging_writes_into_the_file_and_detaching_gives_the_base_back():
    base, x = model(), torch.randn(4, WIDE)
    set_matmul(base, "packed", weights="disk")
    before = base[0].weight.clone()
    adapter = veneer.attach(base, "lora", name="mine", rank=4, sites="linear", seed=1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    expected = base(x)
    veneer.merge(base, "mine")
    _spared.let_go(base[0].weight)
    assert not torch.equal(base[0].weight, before)  # what was written is what is read
    torch.testing.assert_close(base(x), expected, rtol=1e-4, atol=1e-3)
    veneer.unmerge(base)
    assert torch.equal(base[0].weight, before)


def test_weights_come_back_and_copies_of_a_model_lie_in_memory():
    base = model()
    expected = base[0].weight.clone()
    set_matmul(base, "packed", weights="disk")
    twin = copy.deepcopy(base)
    _spared.let_go(twin[0].weight)  # no page of a copy is dropped: they are the only ones
    assert torch.equal(twin[0].weight, expected)
    assert set_matmul(base, "plain").on_disk == 0
    assert matmul_of(base).on_disk == 0
    _spared.let_go(base[0].weight)
    assert torch.equal(base[0].weight, expected)


def test_another_place_is_refused():
    with pytest.raises(BadOption, match="weights='gpu' is no place"):
        set_matmul(model(), "packed", weights="gpu")
