"""The store: what is saved comes back bit for bit, what is damaged is refused whole, and a kill tears nothing.

Damage is drawn by hypothesis. Kills are made in a forked child: before each file operation of a save in turn,
and at random moments.
"""

import copy
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import veneer
from engine_tools import SMALL
from veneer import engine
from veneer.errors import BadFile, ShapeDiffers, VeneerError
from veneer.testing import Subject, bases, randomise

torch.set_num_threads(1)
RECORD, TENSORS = "veneer.json", "adapter.safetensors"
SMALLEST = ("mlp", "bert", "llama", "vit")
KEYS = sorted(info.key for info in veneer.methods())
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def subject_of(key):
    """The method on the smallest base where it has a place."""
    for name in SMALLEST:
        found = Subject(key, bases.get(name), SMALL.get(key))
        if not found.reason:
            return found
    raise AssertionError(f"{key} has no place on {SMALLEST}")


def held(adapter, model):
    """All tensors of an adapter: trained, its own frozen ones, and those that it shares."""
    return {**adapter.named(), **adapter.frozen(model.veneer.shared)}


def same(a, b):
    equal = (v.dtype == b[k].dtype and torch.equal(v, b[k]) for k, v in a.items() if k in b)
    return a.keys() == b.keys() and all(equal)


# -- the round trip --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("key", KEYS)
def test_every_method_comes_back_bit_for_bit(key, dtype, tmp_path):
    subject = subject_of(key)
    model, other = subject.model(dtype), subject.model(dtype)
    made = subject.attach(model, "mine", seed=3)
    contents = subject.base.contents(3, seed=1)
    looks = functools.partial(subject.evaluated, contents=contents, dtype=dtype)
    y, bare = looks(model), looks(subject.model(dtype))
    assert any(not torch.equal(a, b) for a, b in zip(y, bare)), "the randomised adapter changes nothing"
    for member in (*made.of, "mine"):
        veneer.save(model, member, tmp_path / member)
        again = veneer.load(other, tmp_path / member)
    assert same(held(made, model), held(again, other))
    assert (again.name, again.method, again.seed, again.of) == ("mine", made.method, made.seed, made.of)
    assert all(torch.equal(a, b) for a, b in zip(looks(other), y))
    veneer.save(other, "mine", tmp_path / "again")
    for file in (RECORD, TENSORS):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "mine" / file).read_bytes()


@pytest.mark.parametrize("key", KEYS)
def test_the_file_holds_what_is_trained_and_nothing_of_the_base(key, tmp_path):
    subject = subject_of(key)
    model = subject.model(torch.float32)
    made = subject.attach(model, "mine")
    veneer.save(model, "mine", tmp_path / "mine")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [TENSORS, RECORD]
    tensors = safetensors.torch.load_file(tmp_path / "mine" / TENSORS)
    assert made.named().keys() <= tensors.keys()
    own = set(made.frozen_own)
    assert tensors.keys() <= made.named().keys() | own
    trained = sum(v.numel() for k, v in tensors.items() if k in made.named())
    assert trained == made.trainable_parameters == sum(p.numel() for p in made.leaves())


@pytest.mark.parametrize("dtype", ["float32", "base"])
def test_the_precision_that_was_asked_for_survives_the_file(dtype, tmp_path):
    model, other = (bases.get("mlp").model(torch.bfloat16) for _ in range(2))
    made = veneer.attach(model, "lora", "a", sites=["first"], dtype=dtype)
    randomise(made)
    wanted = torch.float32 if dtype == "float32" else torch.bfloat16
    veneer.save(model, "a", tmp_path / "a")
    again = veneer.load(other, tmp_path / "a")
    assert {p.dtype for p in made.leaves()} == {p.dtype for p in again.leaves()} == {wanted}
    assert same(made.named(), again.named())


def test_what_a_task_keeps_beside_the_tensors_comes_back(tmp_path):
    model, other = (bases.get("mlp").model() for _ in range(2))
    veneer.attach(model, "lora", "a", sites=["first"])
    veneer.save(model, "a", tmp_path / "a", extra={"task": {"name": "classify", "labels": ["ü", "x/y"]}})
    assert veneer.load(other, tmp_path / "a").info == {"task": {"name": "classify", "labels": ["ü", "x/y"]}}
    veneer.save(other, "a", tmp_path / "b")
    assert (tmp_path / "b" / RECORD).read_bytes() == (tmp_path / "a" / RECORD).read_bytes()


# -- damage ----------------------------------------------------------------------------------------------------


class Kept:
    """A base, all of whose bits and flags are known, for asking whether a refused load left it alone."""

    def __init__(self, key):
        self.subject = subject_of(key)
        self.model = self.subject.model(torch.float32)
        next(self.model.parameters()).requires_grad_(False)
        self.contents = self.subject.base.contents(2)
        self.before = self.looks()

    def looks(self):
        model = self.model
        return (
            {n: (p.data_ptr(), p._version, p.requires_grad) for n, p in model.named_parameters()},
            {n: type(m) for n, m in model.named_modules()},
            [k for k in model.__dict__ if not k.startswith("__")],
        )

    def looked(self, model):
        return self.subject.evaluated(model, self.contents, dtype=torch.float32)

    def is_untouched(self):
        return self.looks() == self.before


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """{method: (folder, base)} of a few that differ in what they save."""
    found = {}
    for key in ("lora", "vera", "prefix_tuning", "serial_adapter", "fish_mask"):
        subject = subject_of(key)
        model = subject.model(torch.float32)
        subject.attach(model, "mine", seed=1)
        folder = tmp_path_factory.mktemp("good") / key
        veneer.save(model, "mine", folder, extra={"task": {"name": "classify"}})
        found[key] = folder, Kept(key)
    return found


def load_or_refuse(kept, folder):
    """It loads, works and comes off again, or it is refused in words; the base is the same either way."""
    loaded = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapter = veneer.load(kept.model, folder)
        except VeneerError as error:
            loaded = not str(error).strip()
        else:
            kept.looked(kept.model)
            veneer.detach(kept.model, adapter.name)
    assert kept.is_untouched()
    return loaded


METHODS = ("lora", "vera", "prefix_tuning", "serial_adapter", "fish_mask")
anything = settings(
    max_examples=40, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**30]),
    st.floats(), st.text(max_size=8),
    st.sampled_from(["lora", "vera", "", "..", "/", "a/b", "\x00", "\ud800", "first", "(", "[", "*", "float16"]),
)  # fmt: skip
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(value, path=()):
    """Every place in nested JSON, the root left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def edited(draw, record):
    """The record with one to three places replaced, taken out, or added."""
    record = copy.deepcopy(record)
    known = ["options", "plan", "whole", "of", "seed", "drawn", "sha256", "base", "dtype", "format", "before"]
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([*places(record)] or [("x",)]))
        owner = record
        for step in path:
            owner = owner[step]
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if how == "replace":
            owner[last] = draw(json_values)
        elif how == "remove":
            del owner[last]
        elif isinstance(owner, dict):
            owner[draw(st.sampled_from([*known, "rank", "sites", "x"]))] = draw(json_values)
    return record


def spoilt(folder, into):
    shutil.rmtree(into, ignore_errors=True)
    return Path(shutil.copytree(folder, into))


@pytest.mark.parametrize("key", METHODS)
@anything
@given(data=st.data())
def test_any_edit_of_the_record_loads_or_is_refused_in_words(key, good, tmp_path, data):
    folder, kept = good[key]
    record = edited(data.draw, json.loads((folder / RECORD).read_text()))
    place = spoilt(folder, tmp_path / "edited")
    (place / RECORD).write_text(json.dumps(record))
    load_or_refuse(kept, place)


@anything
@given(value=json_values)
def test_any_json_at_all_is_no_record(value, good, tmp_path):
    folder, kept = good["lora"]
    place = spoilt(folder, tmp_path / "any")
    (place / RECORD).write_text(json.dumps(value))
    assert not load_or_refuse(kept, place)


@pytest.mark.parametrize("file", [RECORD, TENSORS])
@anything
@given(content=st.binary(max_size=300))
def test_any_bytes_in_place_of_a_file_are_refused(file, content, good, tmp_path):
    folder, kept = good["lora"]
    place = spoilt(folder, tmp_path / "bytes")
    (place / file).write_bytes(content)
    assert not load_or_refuse(kept, place)


@pytest.mark.parametrize("file", [RECORD, TENSORS])
@anything
@given(data=st.data())
def test_any_truncation_or_flipped_byte_is_refused_or_harmless(file, data, good, tmp_path):
    folder, kept = good["lora"]
    place = spoilt(folder, tmp_path / "cut")
    content = bytearray((folder / file).read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content.rstrip()) - 1))]
        must = True
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        header = 8 + int.from_bytes((folder / file).read_bytes()[:8], "little")
        must = (
            file == TENSORS and at >= header
        )  # a changed number; the header's text has room for harmless changes
    (place / file).write_bytes(bytes(content))
    assert not (load_or_refuse(kept, place) and must)


@anything
@given(data=st.data())
def test_a_valid_file_of_other_tensors_is_refused(data, good, tmp_path):
    folder, kept = good["lora"]
    place = spoilt(folder, tmp_path / "others")
    tensors = safetensors.torch.load_file(folder / TENSORS)
    name = data.draw(st.sampled_from(sorted(tensors)))
    changes = {
        "shape": lambda v: v.T.contiguous() if v.shape[0] != v.shape[1] else v[:1].clone(),
        "scalar": lambda v: torch.tensor(1.0), "empty": lambda v: torch.zeros(0), "ints": lambda v: v.to(torch.int8),
        "bools": lambda v: v > 0, "half": lambda v: v.half(), "double": lambda v: v.double(),
        "value": lambda v: v + 1, "nan": lambda v: v * float("nan"),
    }  # fmt: skip
    change = changes[data.draw(st.sampled_from(sorted(changes)))]
    if data.draw(st.booleans()):
        tensors[name] = change(tensors[name])
    else:
        tensors[data.draw(st.text("ab./\x01", min_size=1, max_size=5))] = change(tensors.pop(name))
    safetensors.torch.save_file(tensors, place / TENSORS)
    if data.draw(st.booleans(), label="the digest is forged too"):
        record = json.loads((place / RECORD).read_text())
        record["sha256"] = engine._store._digest_all(tensors)
        (place / RECORD).write_text(json.dumps(record))
        load_or_refuse(kept, place)
    else:
        assert not load_or_refuse(kept, place)


def test_a_record_nested_too_deep_and_a_header_too_long_are_refused(good, tmp_path):
    folder, kept = good["lora"]
    for file, content in (
        (RECORD, b"[" * 100_000), (RECORD, b'{"method": ' * 50_000), (RECORD, b'{"method": "lora", "format": 1e999}'),
        (RECORD, b'{"method": "lora", "format": 1, "seed": ' + b"9" * 6000 + b"}"),
        (TENSORS, (2**63).to_bytes(8, "little") + b"{}"), (TENSORS, (2**40).to_bytes(8, "little") + b"{}"),
        (TENSORS, (90_000).to_bytes(8, "little") + b'{"a":' * 18_000),
    ):  # fmt: skip
        place = spoilt(folder, tmp_path / "deep")
        (place / file).write_bytes(content)
        assert not load_or_refuse(kept, place), content[:40]


def test_a_pickle_in_the_place_of_either_file_never_runs(good, tmp_path):
    folder, kept = good["lora"]
    ran = tmp_path / "ran"
    for file in (RECORD, TENSORS):
        place = spoilt(folder, tmp_path / "pickled")
        (place / file).write_bytes(f"cos\nsystem\n(S'touch {ran}'\ntR.".encode())
        assert not load_or_refuse(kept, place)
    assert not ran.exists()


@pytest.mark.parametrize("file", [RECORD, TENSORS])
def test_links_are_followed_inside_of_the_folder_and_nowhere_else(file, good, tmp_path):
    folder, kept = good["lora"]
    place = spoilt(folder, tmp_path / "links")
    for target in (tmp_path / "outside", Path("..") / "outside", Path("/dev/zero"), Path("gone"), Path(file)):
        shutil.copy(folder / file, tmp_path / "outside")
        (place / file).unlink()
        (place / file).symlink_to(target)
        assert not load_or_refuse(kept, place), f"a link to {target} was followed"
    (place / file).unlink()
    shutil.copy(folder / file, place / "inner")
    (place / file).symlink_to("inner")
    assert load_or_refuse(kept, place)
    (tmp_path / "alias").symlink_to(place)  # the folder itself may be a link: that is the caller's own word
    assert load_or_refuse(kept, tmp_path / "alias")


def test_a_pipe_in_the_place_of_a_file_does_not_hang(good, tmp_path):
    folder, kept = good["lora"]
    for file in (RECORD, TENSORS):
        place = spoilt(folder, tmp_path / "pipe")
        (place / file).unlink()
        os.mkfifo(place / file)
        assert not load_or_refuse(kept, place)


def test_a_failed_load_beside_another_adapter_leaves_it_acting(good, tmp_path):
    folder, kept = good["lora"]
    model = kept.subject.model(torch.float32)
    kept.subject.attach(model, "first")
    y = kept.looked(model)
    place = spoilt(folder, tmp_path / "cut")
    content = (place / TENSORS).read_bytes()
    for damage, kind in ((content[:-1], BadFile), (content[:-1] + b"\xff", BadFile)):
        (place / TENSORS).write_bytes(damage)
        with pytest.raises(kind):
            veneer.load(model, place, "second")
    tensors = safetensors.torch.load_file(folder / TENSORS)
    tensors.pop(sorted(tensors)[0])
    safetensors.torch.save_file(tensors, place / TENSORS)
    with pytest.raises(ShapeDiffers):
        veneer.load(model, place, "second")
    assert list(veneer.adapters(model)) == ["first"]
    assert model.veneer.active == ("first",)
    assert all(p.requires_grad for p in veneer.adapters(model)["first"].leaves())
    assert all(torch.equal(a, b) for a, b in zip(kept.looked(model), y))


# -- kills -----------------------------------------------------------------------------------------------------


def two_adapters():
    """A model with two adapters of one shape and other numbers, and their tensors."""
    model = bases.get("mlp").model(torch.float32)
    for seed, name in enumerate(("old", "new")):
        randomise(veneer.attach(model, "lora", name, sites=["first", "second"]), seed)
    return model, {n: {k: v.clone() for k, v in a.named().items()} for n, a in veneer.adapters(model).items()}


def whole_one(folder, tensors):
    """Which of the adapters lies in the folder, whole; "absent" where none does. A torn one is an error."""
    if not folder.exists() or not (folder / RECORD).exists() or not (folder / TENSORS).exists():
        return "absent"
    adapter = veneer.load(bases.get("mlp").model(torch.float32), folder)
    found = adapter.named()
    assert same(found, tensors[adapter.name]), f"the folder says '{adapter.name}', its numbers are others"
    return adapter.name


def child(work):
    """A forked process that does `work` and dies without cleaning up; returns its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


CHANGES = (
    "open",
    "os.rename",
    "os.mkdir",
    "os.chmod",
    "os.remove",
    "os.rmdir",
    "tempfile.mkdtemp",
    "shutil.rmtree",
)


def die_before(count):
    """End this process before its `count`-th operation on files; nothing is cleaned up, as at a SIGKILL."""
    seen = 0

    def watch(event, _):
        nonlocal seen
        seen += event in CHANGES
        if seen == count and event in CHANGES:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


@forks
@pytest.mark.parametrize("over", [False, True], ids=["new folder", "over another"])
def test_a_kill_before_any_file_operation_of_a_save_leaves_a_whole_adapter_or_none(over, tmp_path):
    model, tensors = two_adapters()
    seen = []
    for count in range(1, 200):
        folder = tmp_path / f"{count}"
        if over:
            veneer.save(model, "old", folder)

        def work(folder=folder, count=count):
            die_before(count)
            veneer.save(model, "new", folder)

        _, status = os.waitpid(child(work), 0)
        seen.append(whole_one(folder, tensors))
        if not os.WIFSIGNALED(status):
            break
        veneer.save(model, "new", folder)  # what the kill left is no obstacle to the next save
        assert whole_one(folder, tensors) == "new"
    assert len(seen) > 8, "the save was hardly interrupted"
    assert seen[-1] == "new", "the save that nobody interrupted did not finish"
    first = seen.index("new")
    assert set(seen[:first]) == {"old" if over else "absent"}
    assert set(seen[first:]) == {"new"}


@forks
def test_kills_at_random_moments_of_saves_over_and_over_never_tear_a_folder(tmp_path):
    model, tensors = two_adapters()
    folder = tmp_path / "one"
    draw = random.Random(0)
    began = time.perf_counter()
    veneer.save(model, "old", folder)
    a_save = time.perf_counter() - began

    seen = []
    for _ in range(25):
        reader, writer = os.pipe()

        def work(writer=writer):
            veneer.save(model, "new", folder)
            os.write(writer, b"!")
            while True:
                for name in ("old", "new"):
                    veneer.save(model, name, folder)

        pid = child(work)
        os.close(writer)
        assert os.read(reader, 1) == b"!", "the child did not come to its first save"
        os.close(reader)
        time.sleep(draw.uniform(0.0, 4 * a_save))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the child ended by itself"
        seen.append(whole_one(folder, tensors))
    assert set(seen) == {"old", "new"}


def linears():
    torch.manual_seed(0)
    return torch.nn.Sequential(OrderedDict(first=torch.nn.Linear(8, 8), second=torch.nn.Linear(8, 8)))


def left_behind(place, name: str, files: tuple[str, ...], age: float = 3600.0):
    """A hidden folder as a killed save leaves it."""
    folder = place / name
    folder.mkdir()
    for file in files:
        (folder / file).write_text("half")
    os.utime(folder, (time.time() - age,) * 2)
    return folder


def test_what_a_killed_save_left_is_removed_by_the_next_save_and_by_the_next_load(tmp_path):
    model = linears()
    veneer.attach(model, "lora", "a", sites=["first"], rank=2)
    files = ("adapter.safetensors", "veneer.json")
    first = left_behind(tmp_path, ".mine-abcd1234", files)
    veneer.save(model, "a", tmp_path / "mine")
    assert not first.exists()
    second = left_behind(tmp_path, ".mine-zz_z0000", files[:1])
    veneer.load(linears(), tmp_path / "mine", "a")
    assert not second.exists()


def test_only_what_is_surely_ours_and_left_is_removed(tmp_path):
    from veneer.engine._beside import beside, sweep

    names = ("adapter.safetensors", "veneer.json")
    kept = [
        left_behind(tmp_path, ".mine-abcd0001", (*names, "notes.txt")),  # a file of somebody else's
        left_behind(tmp_path, ".mine-abcd0002", names, age=5),  # a save that may just have begun
        left_behind(tmp_path, ".mine-longer-than-ours", names),
        left_behind(tmp_path, ".other-abcd0003", names),
    ]
    with beside(tmp_path / "mine", names) as writing:  # a save that goes on, for longer than a minute
        os.utime(writing, (time.time() - 3600,) * 2)
        assert sweep(tmp_path / "mine", names) == []
        assert writing.is_dir()
    assert not writing.exists()
    assert all(folder.is_dir() for folder in kept)
