"""Optimiser state that lies elsewhere between steps: the same run, bit for bit, and resumed."""

import pytest
import torch

from training_tiny import bert_base, opened
from veneer.errors import BadOption, UnknownName
from veneer.training import Hooks, _offload, train


class Look(Hooks):
    """What the optimiser's state is behind each step; stops before `stop`."""

    def __init__(self, stop=None):
        self.stop, self.seen = stop, []

    def between_steps(self, run, step):
        if step:
            self.seen.append(
                {id(v) for s in run.optimizer.state.values() for v in s.values() if v.numel() >= 1024}
            )
            self.ours = set() if run._offloaded is None else {id(b) for b in run._offloaded.buffers.values()}
        if step == self.stop:
            raise KeyboardInterrupt


def run(where, output=None, stop=None, **more):
    look = Look(stop)
    found = train(
        model=bert_base(), data=opened(), method="lora:rank=8,sites=linear", learning_rate=1e-2, batch_size=8,
        progress=False, device="cpu", max_steps=6, save_every=2, offload_optimizer=where, output=output, hooks=[look],
        **more,
    )  # fmt: skip
    return found, look


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_run_whose_state_lies_elsewhere_is_the_run_whose_state_does_not(where):
    plain, none = run("off")
    ours, look = run(where)
    assert [h["loss"] for h in ours.history] == [h["loss"] for h in plain.history]
    assert ours.predictions == plain.predictions
    assert none.ours == set()
    assert look.seen[-1]
    assert look.seen[-1] == look.ours  # every large tensor is in a buffer
    assert look.seen[0] == look.seen[-1]  # and in the same one at each step


@pytest.mark.parametrize("recipe", ["lora_plus", "galore:rank=4"])
def test_recipes_with_optimisers_of_their_own_take_it(recipe):
    method = "full" if "galore" in recipe else "lora:rank=8"
    given = {"model": bert_base(), "data": opened(), "learning_rate": 1e-3, "batch_size": 8, "progress": False,
             "device": "cpu", "max_steps": 3, "method": f"{method}+{recipe}"}  # fmt: skip
    plain = train(**given)
    given["model"] = bert_base()
    assert train(**given, offload_optimizer="disk").predictions == plain.predictions


def test_a_stopped_run_goes_on_from_its_file_with_its_state_put_away_again(tmp_path):
    whole, _ = run("off", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run("disk", tmp_path / "parts", stop=5)
    parts, look = run("disk", tmp_path / "parts")
    assert parts.predictions == whole.predictions
    assert len(look.seen) == 2  # steps 5 and 6
    assert look.seen[0] == look.seen[-1] == look.ours


def test_state_on_another_device_is_brought_for_the_step_and_put_away_behind_it():
    """A parameter on the meta device stands for one on an accelerator."""
    parameter = torch.nn.Parameter(torch.empty(2048, device="meta"))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    made = _offload.offload(optimizer, "disk")
    optimizer.state[parameter]["momentum"] = torch.ones(2048)
    made.bring()
    assert optimizer.state[parameter]["momentum"].device.type == "meta"


def test_a_mapped_buffer_is_of_a_file():
    kept = _offload.mapped(4096, torch.float32)
    kept.fill_(3)
    assert float(kept.sum()) == 3 * 4096
    with open("/proc/self/maps", encoding="utf-8") as maps:
        ranges = [(*(int(x, 16) for x in line.split()[0].split("-")), line) for line in maps]
    assert [line for low, high, line in ranges if low <= kept.data_ptr() < high and "/veneer-" in line]


def test_other_places_and_other_optimisers_are_refused():
    with pytest.raises(UnknownName, match="offload_optimizer='gpu'"):
        run("gpu")
    with pytest.raises(BadOption, match=r"no torch\.optim\.Optimizer"):
        _offload.offload(object(), "cpu")
