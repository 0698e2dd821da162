"""The registry: versions, names, recovery, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from registry_tiny import adapter, base
from veneer.errors import (
    BadFile,
    BadOption,
    ShapeDiffers,
    UnknownAdapter,
    UnknownMethod,
    Unsupported,
    VeneerError,
)
from veneer.serving._registry import Registry
from veneer.serving._registry_check import check_on, shadow
from veneer.serving._registry_jobs import Jobs
from veneer.serving._watch import Watcher


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of adapters: three LoRA versions, one of another method, one in HF PEFT's form."""
    root = tmp_path_factory.mktemp("saved")
    for seed in (1, 2, 3):
        adapter(root / f"lora{seed}", seed=seed)
    adapter(root / "ia3", "ia3")
    adapter(root / "peft", seed=4, format="peft")
    return root


@pytest.fixture
def registry(tmp_path, saved):
    made = Registry(tmp_path / "registry", [saved])
    yield made
    made.close()


def rewritten(source, target, *, record=None, tensors=None, honest=True):
    """A copy of an adapter's folder with other values: record(dict), tensors(dict) change them in place."""
    from veneer.engine._store import _digest_all

    shutil.copytree(source, target)
    found = json.loads((target / "veneer.json").read_text())
    values = load_file(target / "adapter.safetensors")
    if tensors:
        tensors(values)
        if honest:
            found["sha256"] = _digest_all(values)
            found["tensors"] = {k: list(v.shape) for k, v in values.items()}
    if record:
        record(found)
    (target / "veneer.json").write_text(json.dumps(found))
    save_file(values, target / "adapter.safetensors")
    return target


def test_one_content_is_one_version_whatever_it_is_called_and_wherever_it_lies(registry, saved, tmp_path):
    first = registry.register("a", saved / "lora1")
    shutil.copytree(saved / "lora1", saved / "again")
    second = registry.register("b", saved / "again")
    other = registry.register("c", saved / "lora2")
    assert first.digest == second.digest != other.digest
    assert len(registry.all_versions()) == 2
    assert first.method == "lora"
    assert first.bytes > 0
    assert first.base["class"] == "LlamaForCausalLM"


@pytest.mark.parametrize("change", ["value", "option", "base"])
def test_a_version_is_another_when_a_value_an_option_or_the_base_is_another(
    registry, saved, tmp_path, change
):
    def value(t):
        next(iter(t.values())).view(-1)[0] += 1

    def option(r):
        r["options"]["alpha"] = 3.0

    def other_base(r):
        r["base"]["fingerprint"]["values"] = "0" * 32

    changes = {"value": {"tensors": value}, "option": {"record": option}, "base": {"record": other_base}}
    folder = rewritten(saved / "lora1", saved / f"changed-{change}", **changes[change])
    assert registry.register("a", saved / "lora1").digest != registry.register("a", folder).digest


def test_training_dates_and_names_do_not_make_another_version(registry, saved):
    def story(r):
        r["name"], r["versions"], r["training"] = "other", {"torch": "9"}, {"steps": 3}

    folder = rewritten(saved / "lora1", saved / "story", record=story)
    assert registry.register("a", saved / "lora1").digest == registry.register("b", folder).digest


def test_a_name_moves_and_rolls_back_step_by_step(registry, saved):
    one, two, three = (registry.register("mine", saved / f"lora{i}").digest for i in (1, 2, 3))
    assert registry.resolve("mine").digest == three
    assert registry.rollback("mine").digest == two
    assert registry.rollback("mine").digest == one
    with pytest.raises(UnknownAdapter, match="no earlier version"):
        registry.rollback("mine")
    assert registry.move("mine", three[:8]).digest == three
    assert registry.rollback("mine").digest == one
    assert [m.action for m in registry.history("mine")] == ["moved"] * 3 + ["rolled back"] * 2 + [
        "moved",
        "rolled back",
    ]


def test_a_name_is_understood_in_each_of_its_spellings(registry, saved):
    one = registry.register("mine", saved / "lora1").digest
    two = registry.register("mine", saved / "lora2").digest
    for text, digest in [
        ("mine", two), ("builtin:tiny:mine", two), ("base:mine", two), (f"mine@{one[:8]}", one),
        (f"mine@sha256:{one}", one), (f"base:mine@{one[:12]}", one),
    ]:  # fmt: skip
        assert registry.resolve(text).digest == digest, text


@pytest.mark.parametrize(
    "text", ["mime", "base:mime", "mine@", "mine@zz", "mine@0", "", "@", ":", "x" * 5000, "mine@%"]
)
def test_a_name_that_is_not_there_is_refused_with_the_nearest(registry, saved, text):
    registry.register("mine", saved / "lora1")
    if text == "mine@":  # no version was asked for
        assert registry.resolve(text).name == "mine"
        return
    with pytest.raises(UnknownAdapter) as error:
        registry.resolve(text)
    assert len(str(error.value)) < 600
    if "mime" in text:
        assert "mine" in error.value.nearest


@pytest.mark.parametrize(
    "name", ["", ".", "../up", "a/b", "a b", "x" * 129, "-x", "ä", "a\n", "a:b", "a@b", None]
)
def test_names_that_could_be_taken_for_something_else_are_refused(registry, saved, name):
    with pytest.raises(BadOption):
        registry.register(name, saved / "lora1")
    assert registry.all_versions() == []


def test_a_removed_name_drains_what_no_other_name_means_and_comes_back_by_rollback(registry, saved):
    one = registry.register("a", saved / "lora1").digest
    two = registry.register("a", saved / "lora2").digest
    registry.register("b", saved / "lora1")
    drained = registry.remove("a")
    assert [v.digest for v in drained] == [two]
    assert drained[0].state == "draining"
    with pytest.raises(UnknownAdapter):
        registry.resolve("a")
    assert registry.resolve("b").digest == one
    registry.retire(two)
    assert registry.version(two).state == "retired"
    assert registry.rollback("a").digest == two
    assert registry.resolve("a").state == "registered"


def test_a_restart_comes_back_with_the_same_set(tmp_path, saved):
    first = Registry(tmp_path / "r", [saved])
    for i in (1, 2, 3):
        first.register(f"n{i}", saved / f"lora{i}")
    first.register("n1", saved / "ia3")
    first.rollback("n1")
    gone = first.remove("n3")[0]
    first.mark(first.resolve("n2").digest, "device")
    before = first.aliases(), first.history("n1")
    first.close()
    again = Registry(tmp_path / "r", [saved])
    assert {n: v.digest for n, v in again.aliases().items()} == {n: v.digest for n, v in before[0].items()}
    assert again.history("n1") == before[1]
    assert again.version(gone.digest).state == "retired"
    assert again.resolve("n2").state == "verified"
    seen = []
    again.serve(lambda digest, folder: seen.append((digest, folder)))
    assert {d for d, _ in seen} == {v.digest for v in again.all_versions() if v.state != "retired"}
    assert all((f / "veneer.json").is_file() for _, f in seen)
    again.close()


def test_a_version_that_the_engine_refuses_is_marked_and_the_others_are_served(registry, saved):
    bad = registry.register("bad", saved / "lora1").digest
    registry.register("good", saved / "lora2")

    def add(digest, folder):
        if digest == bad:
            raise Unsupported("no room for it.")

    assert [v.digest for v in registry.serve(add)] == [registry.resolve("good").digest]
    with pytest.raises(Unsupported, match="no room for it"):
        registry.resolve("bad")


def test_a_name_moves_only_when_the_engine_has_taken_the_version(registry, saved):
    registry.register("mine", saved / "lora1", ready=lambda digest, folder: None)
    before = registry.resolve("mine").digest
    seen = []

    def ready(digest, folder):
        seen.append((registry.resolve("mine").digest, (folder / "veneer.json").is_file()))
        raise Unsupported("no room.")

    with pytest.raises(Unsupported, match="no room"):
        registry.register("mine", saved / "lora2", ready=ready)
    assert seen == [(before, True)]
    assert registry.resolve("mine").digest == before
    registry.register("mine", saved / "lora2")
    with pytest.raises(Unsupported, match="no room"):
        registry.rollback("mine", ready=ready)
    assert registry.resolve("mine").digest != before


# -- what is checked -----------------------------------------------------------------------------------------------


def refused(registry, name, source, kind, says):
    before = registry.aliases(), registry.all_versions(), sorted(os.listdir(registry.versions_folder))
    with pytest.raises(kind, match=says):
        registry.register(name, source)
    assert (
        registry.aliases(),
        registry.all_versions(),
        sorted(os.listdir(registry.versions_folder)),
    ) == before


def test_an_adapter_with_values_that_are_not_finite_is_refused_and_the_tensor_is_named(registry, saved):
    def spoil(t):
        t[sorted(t)[1]].view(-1)[2] = float("nan")

    folder = rewritten(saved / "lora1", saved / "nan", tensors=spoil)
    name = sorted(load_file(folder / "adapter.safetensors"))[1]
    refused(registry, "a", folder, BadFile, name.replace(".", r"\."))


def test_an_adapter_of_an_unknown_method_is_refused_with_the_nearest(registry, saved):
    folder = rewritten(saved / "lora1", saved / "unknown", record=lambda r: r.update(method="lorra"))
    refused(registry, "a", folder, UnknownMethod, "lora")


def test_tensors_that_are_not_those_of_the_record_are_refused(registry, saved):
    def cut(t):
        name = sorted(t)[0]
        t[name] = t[name][:1].clone()

    refused(
        registry,
        "a",
        rewritten(saved / "lora1", saved / "cut", tensors=cut, honest=False),
        ShapeDiffers,
        "in the file",
    )

    def touch(t):
        t[sorted(t)[0]].view(-1)[0] += 1

    refused(
        registry,
        "a",
        rewritten(saved / "lora1", saved / "touched", tensors=touch, honest=False),
        BadFile,
        "SHA-256",
    )


def test_a_pickle_is_never_read(registry, saved):
    folder = saved / "pickle"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})
    )
    torch.save({"x": torch.ones(1)}, folder / "adapter_model.bin")
    refused(registry, "a", folder, BadFile, "pickle")


@pytest.fixture(scope="module")
def checked(tmp_path_factory, saved):
    made = Registry(tmp_path_factory.mktemp("checked"), [saved], check=check_on(base()), base="tiny")
    yield made
    made.close()


def test_an_adapter_that_fits_the_served_base_is_verified_in_both_forms(checked, saved):
    assert checked.register("own", saved / "lora1").state == "verified"
    found = checked.register("hf", saved / "peft")
    assert (found.state, found.form, found.method) == ("verified", "peft", "lora")


def test_an_adapter_of_another_width_is_refused_and_the_tensor_is_named(checked, saved):
    folder = adapter(saved / "wide", model=base(vocabulary=32, head_dim=8))
    refused(checked, "a", folder, ShapeDiffers, r"attention\.|\.B|\.A")


def test_an_adapter_of_a_base_with_other_weights_is_refused(checked, saved):
    refused(
        checked,
        "a",
        adapter(saved / "elsewhere", model=base(seed=9)),
        ShapeDiffers,
        "weights are not this base's",
    )


def test_what_fitted_another_base_is_checked_again_when_the_registry_serves_this_one(tmp_path, saved):
    folder = adapter(saved / "nine", model=base(seed=9))
    first = Registry(tmp_path / "r", [saved], check=check_on(base(seed=9)), base="nine")
    first.register("nine", folder)
    first.close()
    again = Registry(tmp_path / "r", [saved], check=check_on(base()), base="tiny")
    assert again.version(again.aliases()["nine"].digest).state == "registered"
    with pytest.raises(Unsupported, match="weights are not"):
        again.resolve("nine")
    assert again.aliases()["nine"].state == "failed"
    again.close()
    back = Registry(tmp_path / "r", [saved], check=check_on(base(seed=9)), base="nine")
    assert back.resolve("nine").state == "verified"
    back.close()


def test_the_check_leaves_the_served_model_untouched(saved):
    model = base()
    model.requires_grad_(True)
    check_on(model)
    before = {n: type(m) for n, m in model.named_modules()}
    ids = torch.arange(6)[None]
    y = model(ids).logits
    ghost = shadow(model)
    import veneer

    veneer.load(ghost, saved / "lora1")
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(ids).logits, y)
    assert not torch.equal(ghost(ids).logits, y)
    assert ghost.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_check_works_beside_adapters_that_the_model_carries(tmp_path, saved):
    import veneer

    model = base()
    veneer.load(model, saved / "lora1", "busy")
    made = Registry(tmp_path, [saved], check=check_on(model))
    assert made.register("a", saved / "lora2").state == "verified"
    assert veneer.adapters(model).keys() == {"busy"} if hasattr(veneer.adapters(model), "keys") else True
    made.close()


# -- places ------------------------------------------------------------------------------------------------------------


def test_folders_outside_of_the_allowed_ones_are_refused_like_those_that_are_not_there(
    registry, saved, tmp_path
):
    outside = tmp_path / "outside"
    shutil.copytree(saved / "lora1", outside)
    (saved / "link").symlink_to(outside)
    said = set()
    for path in (
        outside,
        saved / ".." / "outside",
        saved / "link",
        saved / "missing",
        "/etc",
        "..",
        "",
        "\0",
        "~",
    ):
        with pytest.raises(BadFile) as error:
            registry.register("a", path)
        said.add(error.value.what.partition("'")[2].partition("'")[2])
    assert len(said) == 1
    assert registry.register("a", "lora1").name == "a"  # under an allowed folder, by its relative path


def test_a_file_that_is_a_link_to_outside_is_not_read(registry, saved, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text((saved / "lora1" / "veneer.json").read_text())
    folder = saved / "linked"
    shutil.copytree(saved / "lora1", folder)
    (folder / "veneer.json").unlink()
    (folder / "veneer.json").symlink_to(secret)
    refused(registry, "a", folder, BadFile, "link")


def test_a_pipe_in_place_of_a_file_does_not_hold_anybody_up(registry, saved):
    folder = saved / "pipe"
    shutil.copytree(saved / "lora1", folder)
    (folder / "README.md").unlink(missing_ok=True)
    os.mkfifo(folder / "README.md")
    refused(registry, "a", folder, BadFile, "regular file")


# -- killed ------------------------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from veneer.serving._registry import Registry
root, saved = Path(sys.argv[1]), Path(sys.argv[2])
registry = Registry(root, [saved])
print("ready", flush=True)
for i in range(10_000):
    found = registry.register("mine", saved / f"lora{i % 3 + 1}")
    print(found.digest, flush=True)
    if i % 5 == 4:
        registry.rollback("mine")
        print("back", flush=True)
    if i % 7 == 6:
        import shutil
        for other in registry.all_versions():  # so that folders are written again
            if other.digest != registry.resolve("mine").digest:
                with registry.tables.change() as at:
                    at.execute("DELETE FROM seen")
                    at.execute("UPDATE moves SET digest = NULL, action = 'removed' WHERE digest = ?", (other.digest,))
                    at.execute("DELETE FROM versions WHERE digest = ?", (other.digest,))
                shutil.rmtree(registry.folder(other.digest), ignore_errors=True)
"""


def test_a_kill_at_any_moment_leaves_all_of_a_registration_or_nothing(tmp_path, saved):
    draw = random.Random(5)
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    root = tmp_path / "r"
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, str(script), str(root), str(saved)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.02, 0.5))
        child.send_signal(signal.SIGKILL)
        said = child.stdout.read().split()
        child.wait()
        registry = Registry(root, [saved])
        for found in registry.all_versions():
            again = registry.register("again", registry_copy(registry, found, tmp_path))
            assert again.digest == found.digest  # what is visible is whole
        if said and said[-1] != "back":
            assert said[-1] in {m.digest for m in registry.history("mine")} | {None}
            assert "mine" in registry.names()
        if "again" in registry.names():
            registry.remove("again")
        registry.close()


def registry_copy(registry, found, tmp_path):
    """A version's files under the registry's allowed folder."""
    target = registry.allowed[0] / "copied"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(registry.folder(found.digest), target)
    return target


def test_what_a_killed_registration_left_is_taken_up_or_replaced(registry, saved):
    digest = registry.register("a", saved / "lora1").digest
    with registry.tables.change() as at:  # as if the process had been killed before the table was written
        at.execute("DELETE FROM aliases")
        at.execute("DELETE FROM versions")
    assert registry.all_versions() == []
    (registry.folder(digest) / "veneer.json").write_text("{")
    assert registry.register("b", saved / "lora1").digest == digest
    assert json.loads((registry.folder(digest) / "veneer.json").read_text())["method"] == "lora"


def test_many_threads_register_and_resolve_at_once_and_nothing_is_lost(registry, saved):
    failures = []

    def work(i):
        try:
            for round in range(4):
                registry.register(f"n{i}", saved / f"lora{(i + round) % 3 + 1}")
                assert registry.resolve(f"n{i}").name == f"n{i}"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert len(registry.names()) == 6
    assert len(registry.all_versions()) == 3
    assert all(len(registry.history(n)) == 4 for n in registry.names())


# -- the watched folder ------------------------------------------------------------------------------------------------


def test_a_folder_that_is_dropped_in_appears_and_a_half_copied_one_waits(registry, saved, tmp_path):
    place = tmp_path / "adapters"
    place.mkdir()
    ready = []
    watcher = Watcher(registry, place, lambda digest, folder: ready.append(digest))
    whole = (saved / "lora1" / "adapter.safetensors").read_bytes()
    (place / "mine").mkdir()
    shutil.copy(saved / "lora1" / "veneer.json", place / "mine")
    (place / "mine" / "adapter.safetensors").write_bytes(whole[: len(whole) // 2])
    for _ in range(3):
        assert watcher.look() == []
    (place / "mine" / "adapter.safetensors").write_bytes(whole)
    assert watcher.look() == []  # it has just changed
    assert [v.name for v in watcher.look()] == ["mine"]
    assert watcher.look() == []
    assert ready == [registry.resolve("mine").digest]
    assert registry.resolve("mine").method == "lora"


def test_a_name_that_was_moved_by_hand_stays_until_the_files_change(registry, saved, tmp_path):
    place = tmp_path / "adapters"
    first = registry.register("mine", saved / "lora1").digest
    shutil.copytree(saved / "lora2", place / "mine")
    Watcher(registry, place).look(patient=False)
    assert registry.resolve("mine").digest != first
    registry.rollback("mine")
    assert Watcher(registry, place).look(patient=False) == []  # as after a restart
    assert registry.resolve("mine").digest == first
    shutil.rmtree(place / "mine")
    shutil.copytree(saved / "lora3", place / "mine")
    Watcher(registry, place).look(patient=False)
    assert registry.resolve("mine").digest == registry.versions_of("mine")[-1].digest != first


def test_a_broken_folder_is_told_once_and_tried_again_when_it_changes(registry, saved, tmp_path):
    place = tmp_path / "adapters"
    place.mkdir()
    shutil.copytree(saved / "lora1", place / "mine")
    record = json.loads((place / "mine" / "veneer.json").read_text())
    (place / "mine" / "veneer.json").write_text(json.dumps({**record, "method": "nothing"}))
    shutil.copytree(saved / "lora2", place / "bad name")
    watcher = Watcher(registry, place)
    assert watcher.look(patient=False) == []
    assert set(watcher.failures) == {"mine", "bad name"}
    (place / "mine" / "veneer.json").write_text(json.dumps(record))
    assert [v.name for v in watcher.look(patient=False)] == ["mine"]
    assert set(watcher.failures) == {"bad name"}


def test_the_watcher_runs_on_a_thread_of_its_own_and_ends(registry, saved, tmp_path):
    appeared = threading.Event()
    watcher = Watcher(registry, tmp_path, lambda digest, folder: appeared.set(), every=0.02)
    watcher.start()
    shutil.copytree(saved / "lora1", tmp_path / "mine")
    assert appeared.wait(10)
    watcher.stop()
    assert "veneer-watch" not in {t.name for t in threading.enumerate()}


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_jobs_are_kept_claimed_once_and_tell_their_events(registry):
    jobs = Jobs(registry.tables)
    made = [jobs.create("train", {"n": i}) for i in range(3)]
    claimed = []
    threads = [threading.Thread(target=lambda: claimed.append(jobs.claim("train"))) for _ in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(j.id for j in claimed if j) == sorted(j.id for j in made)
    assert jobs.update(made[0].id, state="done", expected="queued") is False
    assert jobs.update(made[0].id, state="done", expected="running", body={"result": 1}) is True
    assert jobs.job(made[0].id).body == {"n": 0, "result": 1}
    assert [j.id for j in jobs.listed("train", "done")] == [made[0].id]
    for i in range(3):
        jobs.note(made[1].id, {"step": i})
    events = jobs.events(made[1].id)
    assert [e.body["step"] for e in events] == [0, 1, 2]
    assert [e.body["step"] for e in jobs.events(made[1].id, after=events[0].number)] == [1, 2]
    with pytest.raises(VeneerError, match="no job"):
        jobs.job("train-0")
