"""Training that is killed and begun again is the training that was not: the same bytes at the end.

A forked child trains a tiny BERT and is killed: before each file operation of a save, at a moment of the system's
choosing, or several times over. What is compared are the bytes of the adapter and the predictions.
"""

import json
import os
import random
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import training_tiny as tiny
import veneer
from veneer.errors import VeneerError
from veneer.training import Hooks

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
ROWS = {"train": tiny.sentences(32, 1), "validation": tiny.sentences(12, 2), "test": tiny.sentences(8, 3)}
OPERATIONS = (
    "open",
    "os.rename",
    "os.mkdir",
    "os.chmod",
    "os.remove",
    "os.rmdir",
    "shutil.rmtree",
    "tempfile.mkdtemp",
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.saved_bert(tmp_path_factory.mktemp("bert"))


def distinct():
    """The rows without copies between splits."""
    seen, parts = set(), {}
    for split in ("test", "validation", "train"):
        parts[split] = [r for r in ROWS[split] if not (r["text"] in seen or seen.add(r["text"]))]
    return parts


def run(bert, output, **options):
    given = {
        "method": "lora:rank=2", "batch_size": 8, "epochs": 2, "save_every": 1, "learning_rate": 1e-2,
        "progress": False, "device": "cpu", **options,
    }  # fmt: skip
    return veneer.train(model=bert, data=distinct(), output=output, **given)


class Pause(Hooks):
    """Longer steps, so that a kill meets all parts of them."""

    def between_steps(self, run, step):
        time.sleep(0.01)


def forked(work):
    """A child that does `work` and says nothing; (its id, a wait for it)."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1), os.dup2(silence, 2)
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid):
    """Whether the child came to its end; False if it was killed. Anything else is an error of its own."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return True


def die_before(count, place):
    """Kill this process before its `count`-th operation on files in `place`; nothing is cleaned up."""
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event in OPERATIONS and arguments and str(arguments[0]).startswith(place):
            writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            seen += bool(writes)
            if writes and seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def outcome(folder):
    """What two runs have to agree on, bit for bit."""
    return (folder / "adapter.safetensors").read_bytes()


def settled(folder):
    """What may lie in the folder of a finished run."""
    left = [p.name for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    return left == [] and not (folder / "checkpoints").exists()


def step_of(folder):
    steps = sorted((folder / "checkpoints").glob("step-*")) if (folder / "checkpoints").is_dir() else []
    return int(steps[-1].name.removeprefix("step-")) if steps else 0


@pytest.fixture(scope="module")
def whole(bert, tmp_path_factory):
    """The folder and the result of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(bert, folder)


def check_same(folder, result, whole):
    place, wanted = whole
    one, two = load_file(folder / "adapter.safetensors"), load_file(place / "adapter.safetensors")
    assert one.keys() == two.keys()
    assert [k for k in one if not torch.equal(one[k], two[k])] == []
    assert outcome(folder) == outcome(place)
    assert result.predictions == wanted.predictions
    assert result.history == wanted.history
    assert (result.steps, result.trained_tokens, result.metrics) == (
        wanted.steps, wanted.trained_tokens, wanted.metrics,
    )  # fmt: skip
    again = veneer.load(
        veneer.open_base(str(result_base(folder)), task="classify", num_labels=2).model, folder
    )
    assert all(torch.equal(v, two[k]) for k, v in again.named().items())


def result_base(folder):
    return json.loads((folder / "veneer.json").read_text())["base"]["spec"]


def test_kills_at_random_moments_leave_a_run_that_goes_on_to_the_same_bytes(bert, whole, tmp_path):
    draw, folder = random.Random(1), tmp_path / "run"
    kills, reached = 0, []
    for _ in range(60):
        pid = forked(lambda: run(bert, folder, hooks=[Pause()]))
        time.sleep(draw.uniform(0.05, 0.25))
        os.kill(pid, signal.SIGKILL)
        if ended(pid):
            break
        kills += 1
        reached.append(step_of(folder))
        if (folder / "result.json").exists():
            break
    assert kills >= 1, "the run was not interrupted"
    assert reached == sorted(reached) or (folder / "adapter.safetensors").exists(), "a checkpoint was lost"
    check_same(folder, run(bert, folder), whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {}, {"method": "dora:rank=2", "accumulate": 2, "schedule": "cosine"}, {"method": "loreft:rank=2"},
        {"method": "adalora:rank=4,target_rank=2"}, {"method": "lora:rank=2+lora_plus"},
        {"method": "lora:rank=2,dropout=0.2"}, {"early_stopping": 3, "evaluate_every": 2},
    ],
    ids=["lora", "dora", "loreft", "adalora", "lora_plus", "dropout", "early stopping"],
)  # fmt: skip
def test_kills_over_and_over_change_no_byte_of_any_kind_of_run(seed, options, bert, tmp_path):
    options = {"epochs": 4, **options}
    wanted = tmp_path / "whole", run(bert, tmp_path / "whole", **options)
    draw, folder, kills = random.Random(seed), tmp_path / "run", 0
    for _ in range(200):
        pid = forked(lambda: run(bert, folder, hooks=[Pause()], **options))
        time.sleep(draw.uniform(0.05, 0.25))
        os.kill(pid, signal.SIGKILL)
        if ended(pid):
            break
        kills += 1
    assert kills >= 1, "the run was not interrupted"
    check_same(folder, run(bert, folder, **options), wanted)


def kill_before(count, bert, folder, **options):
    """Train in a child that dies before its `count`-th file operation; True if it came to its end before."""

    def work():
        die_before(count, str(folder))
        run(bert, folder, **options)

    return ended(forked(work))


def operations(bert, folder, **options):
    """How many file operations a whole run makes."""
    reader, writer = os.pipe()

    def work():
        count = 0

        def watch(event, arguments):
            nonlocal count
            if event in OPERATIONS and arguments and str(arguments[0]).startswith(str(folder)):
                count += bool(event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

        sys.addaudithook(watch)
        run(bert, folder, **options)
        os.write(writer, str(count).encode())

    assert ended(forked(work))
    os.close(writer)
    try:
        return int(os.read(reader, 20))
    finally:
        os.close(reader)


SHORT = {"epochs": 1, "max_steps": 2}


@pytest.mark.parametrize("part", ["the first checkpoint", "the last operations"])
def test_a_kill_in_the_middle_of_a_save_costs_nothing_but_time(part, bert, tmp_path):
    wanted = tmp_path / "whole", run(bert, tmp_path / "whole", **SHORT)
    total = operations(bert, tmp_path / "counted", **SHORT)
    assert total > 20
    counts = range(3, 8) if part == "the first checkpoint" else range(total - 4, total + 1)
    for count in counts:
        folder = tmp_path / f"before-{count}"
        assert not kill_before(count, bert, folder, **SHORT)
        check_same(folder, run(bert, folder, **SHORT), wanted)
        assert settled(folder), f"killed before operation {count} of {total}: {sorted(os.listdir(folder))}"


@pytest.mark.slow
def test_a_kill_before_every_single_file_operation_of_a_run_costs_nothing_but_time(bert, tmp_path):
    wanted = tmp_path / "whole", run(bert, tmp_path / "whole", **SHORT)
    total = operations(bert, tmp_path / "counted", **SHORT)
    for count in range(1, total + 1):
        folder = tmp_path / f"before-{count}"
        assert not kill_before(count, bert, folder, **SHORT)
        check_same(folder, run(bert, folder, **SHORT), wanted)
        assert settled(folder), f"killed before operation {count} of {total}: {sorted(os.listdir(folder))}"


def test_a_killed_run_is_no_finished_one_for_those_who_would_use_it(bert, tmp_path):
    folder = tmp_path / "run"
    pid = forked(lambda: run(bert, folder, epochs=50, hooks=[Pause()]))
    deadline = time.monotonic() + 60
    while step_of(folder) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert not ended(pid)
    with pytest.raises(VeneerError):
        veneer.predict(folder, ["good film"])
    with pytest.raises(VeneerError, match="another output"):
        run(bert, folder, epochs=3)  # other settings would not give what was begun


def test_the_lock_of_a_killed_run_is_no_lock(bert, whole, tmp_path):
    folder = tmp_path / "run"
    pid = forked(lambda: run(bert, folder, hooks=[Pause()]))
    deadline = time.monotonic() + 60
    while step_of(folder) < 1 and time.monotonic() < deadline:
        time.sleep(0.005)
    with pytest.raises(VeneerError, match=f"process {pid}"):
        run(bert, folder)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    check_same(folder, run(bert, folder), whole)
