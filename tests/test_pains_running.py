"""What users of adapters complain of most, each as a test of what happens here: rows, switching, generation, memory.

The first half (attaching, targets, training, merging, files) is in test_pains.py.
"""

import gc
import itertools
import random
import threading
import time

import pytest
import torch

import veneer
from engine_tools import add, base, inputs, out, real
from veneer.errors import BadOption, UnknownAdapter, VeneerError

torch.set_num_threads(1)
PAD = 0


def seconds(work, times=7):
    """CPU seconds of the fastest of several runs: what the work costs, not what the machine was busy with."""
    best = float("inf")
    for _ in range(times):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best


@pytest.fixture
def three():
    """A decoder with an adapter at each of three ports, and its inputs in four rows of unequal length."""
    model = base("llama")
    for seed, (name, key) in enumerate((("a", "lora"), ("b", "prefix_tuning"), ("c", "serial_adapter"))):
        add(model, key, name, seed=seed)
    return model, inputs("llama", 4)


# -- switching -------------------------------------------------------------------------------------------------


def test_switching_costs_the_same_among_two_and_among_two_hundred():
    few, many = base("llama"), base("llama")
    for model, count in ((few, 2), (many, 200)):
        for i in range(count):
            veneer.attach(model, "lora", f"a{i}", activate=False)

    def switches(model):
        for name in ("a0", "a1") * 20:
            veneer.activate(model, name)

    one, other = seconds(lambda: switches(few)), seconds(lambda: switches(many))
    assert other < 3 * one, f"{one:.5f} s among 2, {other:.5f} s among 200"


def test_a_forward_costs_the_same_beside_two_hundred_idle_adapters():
    few, many, given = base("llama", double=False), base("llama", double=False), inputs("llama", 2)
    for model, count in ((few, 1), (many, 200)):
        for i in range(count):
            veneer.attach(model, "lora", f"a{i}", activate=i == 0)

    def forwards(model):
        with torch.no_grad():
            for _ in range(5):
                model(**given)

    forwards(few), forwards(many)
    one, other = seconds(lambda: forwards(few)), seconds(lambda: forwards(many))
    assert other < 2 * one, f"{one:.5f} s beside none, {other:.5f} s beside 199"


def test_a_list_of_adapters_is_a_public_choice_and_adds_what_each_adds():
    model, given = base("bert"), inputs("bert", 2)
    for name, seed in (("a", 1), ("b", 2)):
        add(
            model, "lora", name, seed=seed, sites=["classifier"]
        )  # the last layer: what is added shows unchanged
    y = {}
    for names in (None, "a", "b", ("a", "b"), ["b", "a"]):
        with veneer.active(model, names):
            y[str(names)] = out(model, given)
    bare = y["None"]
    torch.testing.assert_close(y["('a', 'b')"] - bare, (y["a"] - bare) + (y["b"] - bare))
    torch.testing.assert_close(y["['b', 'a']"], y["('a', 'b')"])
    assert (y["a"] - bare).abs().max() > 1e-3


def test_an_unknown_name_never_runs_as_the_base(three):
    model, given = three
    for call in (
        lambda: veneer.activate(model, "x"),
        lambda: model(**given, adapters=["a", "x", None, "b"]),
        lambda: model(**given, adapters="x"),
        lambda: model.generate(given["input_ids"][:1], adapters=["x"], max_new_tokens=1),
        lambda: veneer.rows(model, ["a", "x", None, "b"]).__enter__(),
        lambda: veneer.active(model, ["a", "x"]).__enter__(),
    ):
        with pytest.raises(UnknownAdapter, match="'x'"):
            call()
    assert veneer.adapters(model).keys() == {"a", "b", "c"}


def test_one_name_stands_for_every_row_and_a_wrong_number_of_names_is_refused(three):
    model, given = three
    with torch.no_grad():
        with veneer.active(model, "a"):
            whole = out(model, given)
        for names in ("a", ["a"] * 4):
            torch.testing.assert_close(out(model, given, adapters=names), whole, atol=1e-12, rtol=0)
    with pytest.raises(BadOption, match=r"4 rows.*3"):
        out(model, given, adapters=["a", "b", "c"])


def test_each_row_equals_its_adapter_alone_at_any_port_and_in_any_order(three):
    model, given = three
    alone = {}
    with torch.no_grad():
        for name in (None, "a", "b", "c"):
            with veneer.active(model, name):
                alone[name] = out(model, given)
        for names in itertools.permutations((None, "a", "b", "c")):
            y = out(model, given, adapters=list(names))
            for i, name in enumerate(names):
                torch.testing.assert_close(
                    real(y, given["attention_mask"], i), real(alone[name], given["attention_mask"], i),
                    atol=1e-10, rtol=0,
                )  # fmt: skip


# -- threads ---------------------------------------------------------------------------------------------------


def test_requests_in_threads_get_their_own_adapters_however_they_race(three):
    model, given = three
    choices = [None, "a", "b", "c"]
    with torch.no_grad():
        wanted = {names: out(model, given, adapters=list(names)) for names in itertools.product(choices, repeat=4)
                  if len(set(names)) > 2}  # fmt: skip
    wrong, barrier = [], threading.Barrier(6)

    def requests(seed):
        draw = random.Random(seed)
        barrier.wait()
        for turn in range(12):
            names = draw.choice(list(wanted))
            with torch.no_grad():
                if turn % 2:
                    y = out(model, given, adapters=list(names))
                else:
                    with veneer.rows(model, list(names)):
                        time.sleep(draw.uniform(0, 0.002))
                        y = out(model, given)
            if not torch.allclose(y, wanted[names], atol=1e-10, rtol=0):
                wrong.append((seed, turn, names))

    threads = [threading.Thread(target=requests, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_that_fails_leaves_the_others_their_rows(three):
    model, given = three
    failed = []

    def fail():
        try:
            with veneer.rows(model, ["a", "b", "c"]):
                out(model, given)
        except BadOption as error:
            failed.append(error)

    with torch.no_grad(), veneer.rows(model, ["a", "b", "c", None]):
        before = out(model, given)
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        assert torch.equal(out(model, given), before)
    assert failed


# -- padding, cache, beams -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["lora", "prompt_tuning", "prefix_tuning", "loreft", "llama_adapter", "serial_adapter"]
)
def test_left_padding_changes_no_row(key):
    model = base("llama")
    add(model, key, "a")
    ids = torch.randint(5, 40, (1, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = out(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                            "position_ids": torch.arange(6)[None]})[0]  # fmt: skip
        with veneer.active(model, None):
            bare = out(model, {"input_ids": ids})[0]
        for left, right in ((5, 0), (0, 5), (3, 2)):
            padded = torch.nn.functional.pad(ids, (left, right), value=PAD)
            mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            y = out(model, {"input_ids": padded, "attention_mask": mask, "position_ids": positions})[0]
            torch.testing.assert_close(y[left : left + 6], plain, atol=1e-9, rtol=0)
    assert (plain - bare).abs().max() > 1e-4


@pytest.mark.parametrize("key", ["lora", "prompt_tuning", "prefix_tuning", "loreft", "serial_adapter"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without_greedy_and_with_beams(key, beams):
    model = base("llama")
    add(model, key, "a", size=0.5)
    add(model, "lora", "b", seed=9, size=0.5)
    given = inputs("llama", 3, tokens=6, padding="left")
    given.pop("position_ids")
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "adapters": ["a", None, "b"],
               "pad_token_id": PAD, "eos_token_id": None}  # fmt: skip
    cached = model.generate(**given, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**given, use_cache=False, **options))
    for i, name in enumerate(("a", None, "b")):
        keep = given["attention_mask"][i].bool()
        alone = model.generate(
            input_ids=given["input_ids"][i : i + 1, keep], attention_mask=given["attention_mask"][i : i + 1, keep],
            **{**options, "adapters": [name]},
        )  # fmt: skip
        assert torch.equal(alone[0, -5:], cached[i, -5:])


@pytest.mark.parametrize("key", ["prompt_tuning", "prefix_tuning", "vera", "loreft", "hyperformer"])
def test_no_method_wants_an_adapter_of_a_certain_name(key):
    options = {"tasks": 1} if key == "hyperformer" else {}
    model, other, given = base("bert"), base("bert"), inputs("bert", 2)
    add(model, key, "default", **options)
    add(other, key, "any other, 2.0/x", **options)
    assert torch.equal(out(model, given), out(other, given))


# -- memory ----------------------------------------------------------------------------------------------------


def held():
    """(tensors, bytes) that are alive in this process; what shares storage is counted once."""
    gc.collect()
    alive = {}
    for thing in gc.get_objects():
        try:
            if isinstance(thing, torch.Tensor):
                alive[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        except Exception:  # an object of a library that breaks when it is looked at
            continue
    return len(alive), sum(alive.values())


@pytest.mark.parametrize("key", ["lora", "vera", "prefix_tuning", "loreft"])
def test_deletion_leaves_bytes_tensors_and_answers_as_they_were(key):
    model, given = base("llama"), inputs("llama", 2)

    def use(name):
        add(model, key, name, whole=["lm_head"])
        with torch.no_grad():
            out(model, given)
            out(model, given, adapters=[name, None])
        out(model, given).sum().backward()
        veneer.detach(model, name)

    bare = out(model, given).detach()
    use("first")
    before = held()
    use("second")
    assert held() == before
    assert "veneer" not in model._modules
    assert torch.equal(out(model, given), bare)

    add(model, "lora", "stays")
    veneer.activate(model, None)
    with torch.no_grad():
        out(model, given)
    before = held()
    use("third")
    assert held() == before
    veneer.activate(model, None)
    assert torch.equal(out(model, given), bare)


def test_after_the_last_adapter_is_gone_the_model_answers_as_before_and_names_are_gone(three):
    model, given = three
    for name in ("a", "b", "c"):
        veneer.activate(model, ["a", "b", "c"] if name == "a" else list(veneer.adapters(model)))
        veneer.detach(model, name)
        assert name not in veneer.adapters(model)
        assert torch.isfinite(out(model, given)).all()
    assert torch.equal(out(model, given), out(base("llama"), given))
    with pytest.raises(VeneerError, match="no adapter"):
        veneer.activate(model, "a")


# -- compiled graphs -------------------------------------------------------------------------------------------


def count_compilations(model, given, switches):
    """(graphs compiled, graph breaks) over calls of a compiled model; each equals the eager one."""
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    seen = []

    def backend(graph, _):
        seen.append(1)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for switch in switches:
            with switch():
                wanted, y = out(model, given), out(compiled, given)
            torch.testing.assert_close(y, wanted, atol=1e-10, rtol=0)
    return len(seen), sum(dynamo.utils.counters["graph_break"].values())


@pytest.mark.slow
def test_switching_among_ten_adapters_and_shuffled_rows_compiles_once():
    model, given = base("llama"), inputs("llama", 4)
    given["use_cache"] = False
    names = [f"a{i}" for i in range(10)]
    for i, name in enumerate(names):
        add(model, "lora", name, seed=i)
    draw = random.Random(0)
    shuffles = [draw.choices([*names, None], k=4) for _ in range(8)]
    by_row = [lambda rows=rows: veneer.rows(model, rows) for rows in shuffles]
    compiled, breaks = count_compilations(model, given, by_row)
    assert (compiled, breaks) == (1, 0)
    whole = [lambda name=name: veneer.active(model, name) for name in names]
    compiled, breaks = count_compilations(model, given, whole)
    assert (compiled, breaks) == (1, 0)


@pytest.mark.slow
def test_a_new_adapter_in_place_of_another_is_seen_by_the_compiled_model():
    model, given = base("llama"), inputs("llama", 2)
    given["use_cache"] = False
    add(model, "lora", "a")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        first = out(compiled, given)
        veneer.detach(model, "a")
        add(model, "lora", "a", seed=5)
        second = out(compiled, given)
        torch.testing.assert_close(second, out(model, given), atol=1e-10, rtol=0)
    assert (first - second).abs().max() > 1e-4
