"""Jobs that are queued together train together: with shared parts, and each comes to what it comes to alone."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from serving_tools import until
from test_serving_jobs import base_weights, conversations, lines, model, server, tokenizer
from veneer.serving import Wish
from veneer.serving._jobs import OPEN
from veneer.training import train

# Unlike in everything: method, rows of a step, rate, epochs, seed, dropout.
WISHES: dict[str, dict[str, Any]] = {
    "lora": {
        "method": "lora",
        "options": {"rank": 2, "dropout": 0.2},
        "epochs": 2,
        "batch_size": 4,
        "seed": 5,
    },
    "ia3": {"method": "ia3", "epochs": 3, "batch_size": 2, "learning_rate": 0.02, "seed": 1},
    "prefix": {"method": "prefix_tuning", "options": {"length": 3}, "epochs": 1, "batch_size": 6},
    "reft": {"method": "loreft", "epochs": 2, "batch_size": 3, "seed": 2},
}


def ended(there: Any, *jobs: Any, seconds: float = 60) -> list[str]:
    assert until(lambda: all(there.tuning.job(j.id).state not in OPEN for j in jobs), seconds)
    return [there.tuning.job(j.id).state for j in jobs]


@contextlib.contextmanager
def held(engine: Any) -> Iterator[None]:
    """The thread of the model stands still."""
    go_on = threading.Event()
    engine.do(lambda model: go_on.wait(30))
    try:
        yield
    finally:
        go_on.set()


def tensors(there: Any, name: str) -> dict[str, torch.Tensor]:
    found = there.registry.resolve(name)
    return load_file(there.registry.folder(found.digest) / "adapter.safetensors")


def alone(name: str, splits: Any, place: Path) -> dict[str, torch.Tensor]:
    wish = dict(WISHES[name])
    method, size = wish.pop("method"), wish.pop("batch_size")
    train(
        model=(model(), tokenizer()), data=splits, method=method, method_options=wish.pop("options", None),
        output=place, batch_size=size, accumulate=size, evaluate_on=(), max_length=256, progress=False, device="cpu",
        base_dropout=False, **wish,
    )  # fmt: skip
    return load_file(place / "adapter.safetensors")


def test_jobs_of_different_methods_share_their_parts_and_come_to_what_each_comes_to_alone(
    tmp_path: Path,
) -> None:
    with server(tmp_path / "server") as there:
        before, tuning = base_weights(there.model), there.tuning
        file = tuning.files.add("a.jsonl", lines(conversations()))
        with held(there.engine):  # until all have joined
            jobs = {n: tuning.create(Wish(file.id, suffix=n, **w)) for n, w in WISHES.items()}
            assert until(lambda: len(tuning.cohort) == len(jobs), 20)
        assert ended(there, *jobs.values()) == ["succeeded"] * len(jobs)
        parts = {n: 12 * w["epochs"] for n, w in WISHES.items()}  # a row each
        assert tuning.spare.slices["part"] <= max(parts.values()) + 8 < sum(parts.values()) / 2
        assert {n: tuning.steps[j.id] for n, j in jobs.items()} == {
            "lora": 6,
            "ia3": 18,
            "prefix": 2,
            "reft": 8,
        }
        assert all(tuning.cohort.tokens[j.id] > 0 for j in jobs.values())
        for name in ("lora", "ia3"):
            found, wanted = tensors(there, name), alone(name, tuning.files.splits(file.id), tmp_path / name)
            assert found.keys() == wanted.keys()
            for key in wanted:
                torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-5)
        assert all(there.registry.resolve(n).method == w["method"] for n, w in WISHES.items())
        after = there.model.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items())
        answers = {n: there.engine.generate([5, 6, 7], there.registry.resolve(n).digest, max_tokens=4).tokens
                   for n in WISHES}  # fmt: skip
        assert all(len(a) for a in answers.values())


def test_one_that_is_cancelled_and_one_that_diverges_leave_the_third_as_it_is_alone(tmp_path: Path) -> None:
    with server(tmp_path / "server") as there:
        tuning = there.tuning
        file = tuning.files.add("a.jsonl", lines(conversations()))
        with held(there.engine):
            long = tuning.create(Wish(file.id, method="lora", epochs=900, batch_size=4))
            wild = tuning.create(Wish(file.id, method="lora", learning_rate=1e30, epochs=50, batch_size=4))
            good = tuning.create(Wish(file.id, suffix="ia3", **WISHES["ia3"]))
            assert until(lambda: len(tuning.cohort) == 3, 20)
        assert ended(there, wild, good) == ["failed", "succeeded"]
        assert "is not finite at step" in tuning.job(wild.id).body["error"]["message"]
        assert tuning.job(long.id).state == "running"
        tuning.cancel(long.id)
        assert until(
            lambda: not tuning.spare.wanted and not list((tmp_path / "server/fine_tuning/runs").iterdir())
        )
        found, wanted = tensors(there, "ia3"), alone("ia3", tuning.files.splits(file.id), tmp_path / "alone")
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-5)
        assert there.engine.generate([5, 6, 7], max_tokens=3).tokens
        assert len(veneer.adapters(there.model)) <= 1  # the one that succeeded, if it was asked already


def test_jobs_beyond_the_room_wait_for_their_turn_and_requests_are_answered_meanwhile(tmp_path: Path) -> None:
    with server(tmp_path, together=2, between_tokens=10.0) as there:
        tuning, most = there.tuning, 0
        file = tuning.files.add("a.jsonl", lines(conversations()))
        wanted = there.engine.generate([5, 6, 7], max_tokens=8, ignore_eos=True).tokens
        jobs = [
            tuning.create(Wish(file.id, method=m, epochs=2, batch_size=4)) for m in ("lora", "ia3", "dora")
        ]
        while any(tuning.job(j.id).state != "succeeded" for j in jobs):
            most = max(most, len(tuning.cohort))
            assert there.engine.generate([5, 6, 7], max_tokens=8, ignore_eos=True).tokens == wanted
        assert most == 2


@pytest.mark.slow
def test_several_jobs_go_on_after_a_kill(tmp_path: Path) -> None:
    with server(tmp_path / "one") as there:
        file = there.tuning.files.add("a.jsonl", lines(conversations()))
        more = {"epochs": 14, "batch_size": 2, "learning_rate": 0.01}
        with held(there.engine):
            jobs = [there.tuning.create(Wish(file.id, method=m, suffix=m, **more)) for m in ("lora", "ia3")]
            assert until(lambda: len(there.tuning.cohort) == 2, 20)
        runs = [tmp_path / "one/fine_tuning/runs" / j.id / "checkpoints" for j in jobs]
        assert until(lambda: all(list(r.glob("step-*")) for r in runs), 20)
        shutil.copytree(tmp_path / "one", tmp_path / "killed", dirs_exist_ok=True)
        assert ended(there, *jobs) == ["succeeded"] * 2
        wanted = {m: tensors(there, m) for m in ("lora", "ia3")}
    with server(tmp_path / "killed") as there:
        assert ended(there, *jobs) == ["succeeded"] * 2
        for job in jobs:
            said = [e.body["message"] for e in there.tuning.events(job.id)]
            assert any(m.startswith("going on from step") for m in said)
        for name, values in wanted.items():
            for key, value in tensors(there, name).items():
                torch.testing.assert_close(value, values[key], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("suffix", ["same", None])
def test_two_jobs_under_one_name_are_two_versions_of_it(tmp_path: Path, suffix: str | None) -> None:
    with server(tmp_path) as there:
        file = there.tuning.files.add("a.jsonl", lines(conversations(6)))
        jobs = [there.tuning.create(Wish(file.id, suffix=suffix, epochs=1, seed=i)) for i in range(2)]
        assert ended(there, *jobs) == ["succeeded"] * 2
        names = {there.tuning.job(j.id).body["model"] for j in jobs}
        assert len(names) == (1 if suffix else 2)
        digests = {there.tuning.job(j.id).body["version"] for j in jobs}
        assert len(digests) == 2
        assert {there.registry.resolve(n).digest for n in names} <= digests
