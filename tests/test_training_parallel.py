"""Adapters under torch's DistributedDataParallel, whose reducer waits for every parameter that it was given: two steps
without find_unused_parameters, with the gradients of the plain model. One process is enough for its reducer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import veneer
from engine_tools import base, inputs

torch.set_num_threads(1)
METHODS = {
    "lora": {}, "dora": {}, "vera": {}, "ia3": {}, "oft": {"block_size": 4}, "serial_adapter": {}, "loreft": {},
    "prompt_tuning": {"length": 2}, "prefix_tuning": {"length": 2}, "bitfit": {}, "norm_tuning": {}, "full": {},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted(key: str, **options: object) -> tuple[torch.nn.Module, veneer.Adapter]:
    model = base("bert")
    adapter = veneer.attach(model, key, "a", seed=1, **METHODS.get(key, {}) | options)
    with torch.no_grad():
        for i, view in enumerate(veneer.trainable(model).values()):
            view.add_(torch.randn(view.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    return model.eval(), adapter


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", [*METHODS, "head"])
def test_every_trained_parameter_is_reduced_at_every_step(key):
    given = inputs("bert", 3)
    options = {"modules_to_save": ["classifier"]} if key == "head" else {}
    plain, alone = adapted("lora" if key == "head" else key, **options)
    model, mine = adapted("lora" if key == "head" else key, **options)
    parallel = DistributedDataParallel(model)
    for _ in range(2):  # at the second step the reducer tells of what the first one left out
        for m in (plain, parallel):
            m.zero_grad()
            m(**given).logits.square().sum().backward()
    wanted, found = alone.gradients(), mine.gradients()
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)
    assert any(bool(g.any()) for g in found.values())


def test_the_reducer_tells_of_a_parameter_that_no_step_reaches():
    """What the test above would see if an idle adapter were left to train."""
    given = inputs("bert", 2)
    model, _ = adapted("lora")
    veneer.attach(model, "lora", "idle", activate=False)
    for leaf in model.veneer.adapter("idle").leaves():
        leaf.requires_grad_()
    parallel = DistributedDataParallel(model)

    def step() -> None:
        parallel(**given).logits.sum().backward()

    step()
    with pytest.raises(RuntimeError, match="finished reduction"):
        step()
