"""Training while serving: files and jobs as OpenAI's client speaks of them, in the time that requests leave."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch

import veneer
from serving_tools import running, until
from training_tiny import CHATML, WORDS, llama, word_tokenizer
from veneer.errors import BadData
from veneer.serving import Engine, FineTuning, Registry, Wish, check_on
from veneer.serving._jobs_spare import PATIENCE, Guard, Spare
from veneer.serving.app import Keys, Settings, create_app, new_key
from veneer.training import Slice, train

MARKS = ["<|im_start|>", "<|im_end|>", "user", "assistant", "system", ":"]


def tokenizer() -> Any:
    made = word_tokenizer(special=MARKS, pair=False)
    made.chat_template = CHATML
    return made


def model() -> Any:
    """Logits so far apart that the likeliest token is never in doubt."""
    made = llama(len(tokenizer()) + 8)
    for p in made.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(p.numel()))
    return made


def conversations(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": " ".join(WORDS[i % 9 : i % 9 + 3 + i % 4])},
                      {"role": "assistant", "content": f"good {WORDS[8 + i % 5]}"}]}
        for i in range(count)
    ]  # fmt: skip


def lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


@contextlib.contextmanager
def server(root: Path, base: Any = None, **options: Any) -> Iterator[SimpleNamespace]:
    """A whole server on a tiny base: engine, registry, jobs, HTTP, and OpenAI's client for it."""
    base = model() if base is None else base
    with Engine(base, tokenizer(), name="tiny", slots=4) as engine:
        registry = Registry(root, check=check_on(base), base="tiny")
        with FineTuning(engine, registry, **options) as tuning:
            registry.serve(lambda digest, folder: engine.add(digest, folder))
            with running(create_app(engine, registry, tuning=tuning)) as app:
                client = openai.OpenAI(base_url=app.url + "/v1", api_key="none", max_retries=0)
                yield SimpleNamespace(
                    engine=engine, registry=registry, tuning=tuning, client=client, model=base
                )
                client.close()
        registry.close()


def ended(client: Any, job: Any, seconds: float = 40) -> Any:
    assert until(lambda: client.fine_tuning.jobs.retrieve(job.id).finished_at, seconds)
    return client.fine_tuning.jobs.retrieve(job.id)


def base_weights(base: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in base.state_dict().items() if "veneer" not in k}


def test_a_job_of_openais_client_trains_an_adapter_that_answers_under_its_suffix(tmp_path: Path) -> None:
    with server(tmp_path) as there:
        client, before = there.client, base_weights(there.model)
        file = client.files.create(file=("talk.jsonl", lines(conversations())), purpose="fine-tune")
        assert (file.filename, file.status, file.bytes) == (
            "talk.jsonl",
            "processed",
            len(lines(conversations())),
        )
        job = client.fine_tuning.jobs.create(
            model="tiny", training_file=file.id, validation_file=file.id, suffix="talk", seed=3,
            method={"type": "veneer", "veneer": {"method": "dora", "options": {"rank": 2}, "n_epochs": 4,
                                                 "batch_size": 4, "learning_rate": 0.02}},
        )  # fmt: skip
        assert job.status in ("validating_files", "queued", "running")
        job = ended(client, job)
        assert (job.status, job.fine_tuned_model, job.error) == ("succeeded", "talk", None)
        assert job.trained_tokens > 0
        assert there.registry.resolve("talk").method == "dora"

        events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))  # over several pages
        losses = [
            e.data["train_loss"] for e in reversed(events) if e.type == "metrics" and "train_loss" in e.data
        ]
        assert len(losses) == 12
        assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
        assert any("valid_loss" in (e.data or {}) for e in events)

        def answer(name: str) -> str:
            return client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "the film was"}], max_tokens=8, temperature=0
            ).choices[0].message.content  # fmt: skip

        assert answer("talk") != answer("tiny")
        after = {k: v for k, v in there.model.state_dict().items() if k in before}
        assert all(torch.equal(v, after[k]) for k, v in before.items())
        assert [j.id for j in client.fine_tuning.jobs.list()] == [job.id]
        assert client.files.content(file.id).content == lines(conversations())
        client.files.delete(file.id)
        assert list(client.files.list()) == []


def test_answers_do_not_change_while_a_job_trains(tmp_path: Path) -> None:
    asked = [[4 + (i * 7 + k) % 20 for k in range(3 + i % 5)] for i in range(24)]
    base = model()
    with Engine(base, tokenizer()) as engine:
        wanted = [engine.generate(p, max_tokens=12, ignore_eos=True).tokens for p in asked]
    with server(tmp_path, base, between_tokens=10.0) as there:
        before = base_weights(base)
        file = there.tuning.files.add("a.jsonl", lines(conversations(32)))
        job = there.tuning.create(Wish(file.id, epochs=40, batch_size=4, learning_rate=0.05))
        assert until(lambda: there.tuning.spare.slices.total() > 5, 20)
        found, slices = [], there.tuning.spare.slices.total()
        for prompt in asked:
            found.append(there.engine.generate(prompt, max_tokens=12, ignore_eos=True).tokens)
        assert there.tuning.spare.slices.total() > slices + 20, "nothing was trained meanwhile"
        assert there.tuning.job(job.id).state == "running"
        assert found == wanted
        assert all(torch.equal(v, base.state_dict()[k]) for k, v in before.items())
        there.tuning.cancel(job.id)
        assert until(lambda: not there.tuning.spare.wanted)
        assert not veneer.adapters(base)


@pytest.mark.parametrize(
    "method", ["lora", "ia3", "prefix_tuning", "norm_tuning", "loreft", "adalora", "diff_pruning"]
)
def test_a_job_trains_what_train_would_have_trained(method: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with server(tmp_path / "server") as there:
        file = there.tuning.files.add("a.jsonl", lines(conversations()))
        job = there.tuning.create(Wish(file.id, method=method, suffix="it", epochs=2, batch_size=4, seed=5))
        assert until(lambda: there.tuning.job(job.id).state in ("succeeded", "failed"), 40)
        assert there.tuning.job(job.id).state == "succeeded", there.tuning.job(job.id).body
        folder = there.registry.folder(there.registry.resolve("it").digest)
        splits = there.tuning.files.splits(file.id)
        train(
            model=(model(), tokenizer()), data=splits, method=method, output=tmp_path / "alone", epochs=2, batch_size=4,
            accumulate=4, seed=5, evaluate_on=(), max_length=256, progress=False, device="cpu", base_dropout=False,
        )  # fmt: skip
        alone, served = (load_file(f / "adapter.safetensors") for f in (tmp_path / "alone", folder))
        assert alone.keys() == served.keys()
        for key in alone:
            torch.testing.assert_close(served[key], alone[key], rtol=1e-4, atol=1e-5)


def test_a_job_goes_on_after_a_restart_and_comes_to_the_same_adapter(tmp_path: Path) -> None:
    def begin(there: Any) -> Any:
        file = there.tuning.files.add("a.jsonl", lines(conversations()))
        return there.tuning.create(Wish(file.id, suffix="it", epochs=12, batch_size=2, learning_rate=0.01))

    with server(tmp_path / "one") as there:
        job = begin(there)
        assert until(lambda: there.tuning.job(job.id).state == "succeeded", 40)
        whole = there.registry.resolve("it").digest
    with server(tmp_path / "two") as there:
        job = begin(there)
        assert until(lambda: list((tmp_path / "two").glob("fine_tuning/runs/*/checkpoints/step-*")), 20)
        # A copy of the disk at any moment is what a killed process leaves.
        shutil.copytree(tmp_path / "two", tmp_path / "killed", dirs_exist_ok=True)
    with server(tmp_path / "killed") as there:
        assert until(lambda: there.tuning.job(job.id).state == "succeeded", 40)
        said = [e.body["message"] for e in there.tuning.events(job.id)]
        assert any(m.startswith("going on from step") for m in said)
        assert there.registry.resolve("it").digest == whole
    with server(tmp_path / "two") as there:  # the one that was stopped in good order goes on too
        assert until(lambda: there.tuning.job(job.id).state == "succeeded", 40)
        assert there.registry.resolve("it").digest == whole


def test_a_cancelled_job_ends_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with server(tmp_path) as there:
        client = there.client
        file = client.files.create(file=("a.jsonl", lines(conversations())), purpose="fine-tune")
        jobs = [
            client.fine_tuning.jobs.create(
                model="tiny", training_file=file.id, hyperparameters={"n_epochs": 900}
            )
            for _ in range(2)
        ]
        assert until(lambda: client.fine_tuning.jobs.retrieve(jobs[0].id).status == "running")
        for job in reversed(jobs):
            assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        assert until(lambda: not there.tuning.spare.wanted)
        assert until(lambda: not list((tmp_path / "fine_tuning/runs").iterdir()))
        assert not veneer.adapters(there.model)
        with pytest.raises(openai.BadRequestError, match="cancelled already"):
            client.fine_tuning.jobs.cancel(jobs[0].id)
        assert client.models.list().data[1:] == []


def test_what_cannot_be_trained_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    with server(tmp_path, largest_file=5000) as there:
        client = there.client
        for rows, said in (
            ([{"messages": 3}], "line 1"),
            ([{"text": "alone"}], "needs the column 'messages'"),
            ([], ""),
        ):
            with pytest.raises(openai.BadRequestError, match=said) as refused:
                client.files.create(file=("../../bad.jsonl", lines(rows)), purpose="fine-tune")
            assert str(tmp_path) not in str(refused.value)
        with pytest.raises(openai.BadRequestError, match="purpose"):
            client.files.create(file=("a.jsonl", lines(conversations())), purpose="assistants")
        with pytest.raises(openai.BadRequestError, match="more than 5,000"):
            client.files.create(file=("a.jsonl", lines(conversations(99))), purpose="fine-tune")
        assert not list((tmp_path / "fine_tuning/files").iterdir())
        file = client.files.create(file=("a.jsonl", lines(conversations())), purpose="fine-tune").id
        create = client.fine_tuning.jobs.create
        with pytest.raises(openai.BadRequestError, match="there is no file 'file-x'"):
            create(model="tiny", training_file="file-x")
        with pytest.raises(openai.NotFoundError, match="'tiny'"):
            create(model="gpt-4o-mini", training_file=file)
        with pytest.raises(openai.BadRequestError, match="lora"):
            create(model="tiny", training_file=file, method={"type": "veneer", "veneer": {"method": "lorra"}})
        own = {"method": "lora", "options": {"rank": -1}}
        with pytest.raises(openai.BadRequestError, match="rank"):
            create(model="tiny", training_file=file, method={"type": "veneer", "veneer": own})
        with pytest.raises(openai.BadRequestError, match="cannot be used"):
            create(model="tiny", training_file=file, suffix="../up")
        with pytest.raises(openai.NotFoundError, match="there is no job"):
            client.fine_tuning.jobs.retrieve(file)
        assert list(client.fine_tuning.jobs.list()) == []


def test_a_job_that_diverges_fails_and_the_server_goes_on(tmp_path: Path) -> None:
    with server(tmp_path) as there:
        file = there.tuning.files.add("a.jsonl", lines(conversations()))
        job = there.tuning.create(Wish(file.id, learning_rate=1e30, epochs=50, batch_size=4))
        assert until(lambda: there.tuning.job(job.id).state == "failed", 20)
        assert "step" in there.tuning.job(job.id).body["error"]["message"]
        good = there.tuning.create(Wish(file.id, epochs=1, suffix="good"))
        assert until(lambda: there.tuning.job(good.id).state == "succeeded", 20)
        assert there.engine.generate([5, 6, 7], max_tokens=3).tokens


def test_a_file_whose_bytes_are_there_already_is_kept_once(tmp_path: Path) -> None:
    with server(tmp_path) as there:
        files = there.tuning.files
        one, two = (files.add(n, lines(conversations())) for n in ("a.jsonl", "b.jsonl"))
        assert len(list(files.root.iterdir())) == 1
        files.remove(one.id)
        assert files.content(two.id) == lines(conversations())
        with pytest.raises(BadData):
            files.add("c.jsonl", b"\xff\xfe")
        assert len(list(files.root.iterdir())) == 1


def test_the_guard_lets_in_what_is_known_to_fit_and_nothing_else() -> None:
    guard = Guard(between_tokens=0.1)
    small, large = Slice("part", 30), Slice("part", 300)
    assert not guard.allows(small)  # nobody knows how long it takes
    guard.learn(small, 0.02)
    assert guard.allows(Slice("part", 32))
    assert not guard.allows(large)
    assert not guard.allows(Slice("update"))
    guard.saw_step(0.09)
    assert not guard.allows(small)
    for _ in range(16):
        guard.saw_step(0.05)
    assert guard.allows(small)


class Parts:
    """Work of three parts, for two runs that share each."""

    def __init__(self) -> None:
        self.left, self.shared, self.done = 3, 2, []

    def __len__(self) -> int:
        return self.left

    def coming(self) -> Slice | None:
        self.shared = 2
        return Slice("part", 16) if self.left else None

    def smaller(self) -> Slice | None:
        if self.shared == 1:
            return None
        self.shared = 1
        return Slice("part", 8)

    def do(self) -> None:
        self.left -= 1
        self.done.append(self.shared)

    def close(self) -> None: ...


def test_slices_wait_while_rows_speak_and_run_when_nobody_does() -> None:
    work = Parts()
    spare = Spare(Guard(between_tokens=0.0), work)
    for _ in range(5):
        spare.turn(True, 0.01)
    assert work.done == []
    assert spare.put_off == 5
    while spare.wanted:
        spare.turn(False, 0.0)
    assert work.done == [1, 2, 2]  # the first for one run alone: nobody knew how long it would take
    assert spare.slices == {"part": 3}


def test_while_nobody_asks_a_long_part_is_done_for_one_run_so_that_who_comes_waits_less() -> None:
    work = Parts()
    spare = Spare(Guard(between_tokens=0.1), work)
    spare.guard.learn(Slice("part", 16), 3.0)
    spare.guard.learn(Slice("part", 8), 1.6)
    spare.turn(False, 0.0)
    assert work.done == [1]
    for _ in range(8):
        spare.guard.learn(Slice("part", 16), 0.8)
    spare.turn(False, 0.0)
    assert work.done == [1, 2]


def test_a_slice_that_nobody_has_timed_is_tried_under_requests_without_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("veneer.serving._jobs_spare.time.monotonic", lambda: now[0])
    work = Parts()
    spare = Spare(Guard(between_tokens=0.1), work)
    for _ in range(3):
        spare.turn(True, 0.01)
    assert work.done == []
    now[0] = PATIENCE + 1
    spare.turn(True, 0.01)
    assert work.done == [1]  # once, for one run alone
    spare.turn(True, 0.01)
    assert work.done == [1, 2]  # what is known to fit waits no longer
    # One slow moment: it waits, and is tried again, since it was fast before.
    for tokens in (8, 16):
        spare.guard.learn(Slice("part", tokens), 5.0)
    spare.turn(True, 0.01)
    assert work.done == [1, 2]
    now[0] += PATIENCE + 1
    spare.turn(True, 0.01)
    assert work.done == [1, 2, 1]


def test_a_slice_that_is_known_not_to_fit_is_never_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("veneer.serving._jobs_spare.time.monotonic", lambda: now[0])
    for slow in (Slice("part", 8), Slice("part", 4)):
        work = Parts()
        spare = Spare(Guard(between_tokens=0.1), work)
        spare.guard.learn(slow, 0.2)
        for _ in range(5):
            spare.turn(True, 0.01)
            now[0] += PATIENCE + 1
        assert work.done == []


def test_where_a_part_for_all_is_too_long_it_is_done_for_fewer() -> None:
    work = Parts()
    spare = Spare(Guard(between_tokens=0.1), work)
    spare.guard.learn(Slice("part", 16), 0.2)
    spare.guard.learn(Slice("part", 8), 0.05)
    spare.turn(True, 0.01)
    assert (work.done, spare.put_off) == ([1], 0)
    spare.turn(False, 0.01)
    assert work.done == [1, 2]


def test_an_engine_that_is_closed_in_the_midst_of_a_job_gives_the_base_back(tmp_path: Path) -> None:
    base = model()
    engine = Engine(base, tokenizer(), name="tiny")
    registry = Registry(tmp_path)
    tuning = FineTuning(engine, registry)
    tuning.start()
    file = tuning.files.add("a.jsonl", lines(conversations()))
    job = tuning.create(Wish(file.id, epochs=900))
    other = tuning.create(Wish(file.id, epochs=900))
    assert until(lambda: tuning.spare.slices.total() > 5)
    threading.Thread(target=engine.close).start()
    assert until(lambda: not engine.alive)
    tuning.stop()
    registry.close()
    assert "veneer" not in base._modules
    assert tuning.spare.wanted is False
    again = Registry(tmp_path)
    with contextlib.closing(again):
        from veneer.serving import Jobs

        table = Jobs(again.tables)
        assert {table.job(j.id).state for j in (job, other)} <= {"running", "queued", "validating_files"}


def test_with_keys_only_those_that_manage_may_train(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    file = tmp_path / "keys.json"
    use, manage = new_key(file, "use", ["use"]), new_key(file, "manage", ["use", "manage"])
    with (
        Engine(model(), tokenizer(), name="tiny") as engine,
        contextlib.closing(Registry(tmp_path / "r")) as registry,
    ):
        app = create_app(
            engine, registry, Settings(hosts=None), Keys((), file), tuning=FineTuning(engine, registry)
        )
        with TestClient(app) as client:
            for key, status in ((None, 401), (use, 403), (manage, 200)):
                headers = {} if key is None else {"authorization": f"Bearer {key}"}
                for path in ("/v1/files", "/v1/fine_tuning/jobs"):
                    assert client.get(path, headers=headers).status_code == status
                    sent = client.post(path, headers=headers, json={"model": 3})
                    assert sent.status_code == (400 if status == 200 else status)
