"""Training for a given time: it ends when the time does, the schedule with it, and a kill does not add to it."""

from __future__ import annotations

import time

import pytest
import torch

from training_tiny import bert_base, opened
from veneer.errors import BadOption
from veneer.training import Hooks, Phase, train

torch.set_num_threads(1)


class Slow(Hooks):
    """Makes every step take at least `seconds`, so that the machine's own pace does not matter."""

    def __init__(self, seconds, stop_at=None):
        self.seconds, self.stop_at, self.rates, self.spent = seconds, stop_at, [], []

    def on_gradients(self, run, step):
        time.sleep(self.seconds)
        self.spent.append(run.seconds)
        self.rates.append(run.optimizer.param_groups[0]["lr"])

    def between_steps(self, run, step):
        if step == self.stop_at:
            raise KeyboardInterrupt


def run(limit, slow, output=None, **options):
    return train(
        model=bert_base(), data=opened(), method="lora:rank=2", output=output, max_seconds=limit, batch_size=8,
        learning_rate=1e-2, hooks=[slow], progress=False, device="cpu", evaluate_on=("validation",), **options,
    )  # fmt: skip


def test_training_ends_with_the_time_and_the_schedule_with_it():
    slow = Slow(0.1)
    found = run(2.0, slow)
    assert 2.0 <= found.train_seconds < 3.0
    assert (
        found.steps < 20
    )  # a pass is 8 steps: it went on behind the third, or ended before, as the time said
    assert slow.rates[-1] < 0.35 * max(slow.rates)
    assert slow.rates[-1] == min(slow.rates[3:])


def test_a_pass_is_no_end_where_time_is_left():
    found = run(2.5, Slow(0.0), epochs=0.2)
    assert found.steps > 2
    assert found.train_seconds >= 2.5


def test_a_stopped_run_has_only_the_rest_of_its_time(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(2.0, Slow(0.1, stop_at=8), tmp_path, save_every=1)
    slow = Slow(0.1)
    found = run(2.0, slow, tmp_path, save_every=1)
    assert slow.spent[-1] < 2.0 <= found.train_seconds
    assert len(slow.rates) < found.steps
    assert len(slow.rates) <= 14


def test_phases_share_the_time():
    class Two(Hooks):
        entered = ()

        def phases(self, run):
            enter = lambda run: setattr(self, "entered", (*self.entered, run.seconds))  # noqa: E731
            return [Phase("one", 0.5, enter=enter), Phase("two", 0.5, enter=enter)]

    two = Two()
    train(
        model=bert_base(), data=opened(), method="lora:rank=2", max_seconds=2.0, batch_size=8, learning_rate=1e-2,
        hooks=[Slow(0.1), two], progress=False, device="cpu", evaluate_on=(),
    )  # fmt: skip
    assert two.entered[0] == 0
    assert 0.3 < two.entered[1] < 2.0


def test_one_end_is_enough():
    with pytest.raises(BadOption, match="max_steps and max_seconds are both given"):
        run(2.0, Slow(0), max_steps=3)
    with pytest.raises(BadOption, match="max_seconds"):
        run(0, Slow(0))
