"""The reading engine: every answer is the one that the adapter gives alone, whatever shares the forward."""

from __future__ import annotations

import random
import shutil
import threading

import numpy as np
import pytest
import torch

import veneer
from training_tiny import WORDS, llama, saved_bert, word_tokenizer
from veneer.bases import open_base
from veneer.errors import BadOption, Unsupported, VeneerError
from veneer.serving._reading import ReadingEngine
from veneer.serving._request import QueueFull, UnknownVersion
from veneer.tasks import make_task
from veneer.training import Predictor

SMALL = {
    "lora": {"rank": 2},
    "pfeiffer_adapter": {"reduction": 8},
    "prompt_tuning": {"num_virtual_tokens": 3},
}
ADAPTERS = {
    "mood": ("lora", "classify", ("bad", "good")),
    "topic": ("ia3", "classify", ("a", "b", "c", "d", "e")),
    "marks": ("pfeiffer_adapter", "multilabel", ("x", "y", "z")),
    "stars": ("bitfit", "regress", ()),
    "prompted": ("prompt_tuning", "classify", ("no", "maybe", "yes")),
    "probe": ("linear_probe", "classify", ("k", "l")),
    "whole": ("full", "classify", ("m", "n", "o")),
    "names": ("lora", "tag", ("O", "B-X", "I-X")),
    "kinds": ("loreft", "tag", ("N", "V")),
}


def saved(folder, spec, method, task, labels, seed=0, **more):
    """An adapter with random values and a random head, as training leaves it."""
    made = make_task(task, **({"labels": labels} if labels else {}), **more)
    base = open_base(spec, task=task, num_labels=made.num_labels, seed=seed)
    heads = {n.rpartition(".")[0] for n in base.fresh}
    options = {"whole": tuple(sorted(heads))} if heads else {}
    adapter = veneer.attach(base.model, method, "made", **{**SMALL.get(method, {}), **options})
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for leaf in adapter.leaves():
            leaf.add_(0.3 * torch.randn(leaf.shape, generator=generator))
    extra = {"task": made.to_dict(), "opens": {"spec": spec, "fresh": list(base.fresh)}}
    veneer.save(base.model, "made", folder, extra=extra)
    return folder


def texts(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 12))) for _ in range(count)]


def rows_of(task, found):
    return [
        {"tokens": t.split()} if task == "tag" else {"source": t} if task == "seq2seq" else {"text": t}
        for t in found
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("reading")
    spec = saved_bert(root / "base")
    folders = {n: saved(root / n, spec, *what, seed=i) for i, (n, what) in enumerate(ADAPTERS.items())}
    engine = ReadingEngine.open(spec)
    for name, folder in folders.items():
        engine.add(name, folder)
    yield engine, folders, spec
    engine.close()


def same(found, wanted):
    assert found["prediction"] == wanted["prediction"] or found["prediction"] == pytest.approx(
        wanted["prediction"], abs=1e-5
    )
    assert found["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_answer_is_the_one_that_predict_gives_for_the_adapter_alone(world, name):
    engine, folders, _ = world
    given = texts(7, 3)
    found = engine.read(name, rows_of(ADAPTERS[name][1], given)).result(60)
    wanted = Predictor.open(folders[name], device="cpu").predict(given)
    assert len({str(w["probabilities"] or w["prediction"]) for w in wanted}) > 1, "the rows have to differ"
    for f, w in zip(found, wanted, strict=True):
        same(f.prediction, w)


def test_rows_of_many_adapters_share_one_forward_of_the_base_and_keep_their_own_heads(world):
    engine, folders, _ = world
    names = [n for n, (_, task, _) in ADAPTERS.items() if task != "tag"]
    for name in names:
        engine.read(name, [{"text": "good"}]).result(60)  # attached
    wanted = {n: Predictor.open(folders[n], device="cpu").predict(texts(3, 5)) for n in names}
    before = engine.forwards
    with engine._models:  # hold the thread up, so that all of them wait together
        first = engine.read("mood", [{"text": "good"}])
        asked = {n: engine.read(n, rows_of("classify", texts(3, 5))) for n in names}
    found = {n: f.result(60) for n, f in asked.items()}
    first.result(60)
    assert engine.forwards - before <= 2
    for name in names:
        for f, w in zip(found[name], wanted[name], strict=True):
            same(f.prediction, w)


def test_all_shells_hold_one_copy_of_the_bases_weights(world):
    engine, *_ = world
    engine.read("mood", [{"text": "good"}]).result(60)
    engine.read("names", [{"tokens": ["good"]}]).result(60)
    shells = list(engine._shells._open.values())
    assert len(shells) >= 2
    places = {s.model.bert.encoder.layer[1].output.dense.weight.data_ptr() for s in shells}
    assert len(places) == 1


def test_an_adapter_whose_head_is_the_bases_own_is_read_with_that_head(tmp_path):
    from training_tiny import bert

    spec = tmp_path / "base"
    tokenizer = word_tokenizer()
    bert(3, tokenizer, seed=4).save_pretrained(spec)
    tokenizer.save_pretrained(spec)
    folder = saved(tmp_path / "a", str(spec), "lora", "classify", ("p", "q", "r"))
    engine = ReadingEngine.open(str(spec))
    engine.add("a", folder)
    found = engine.read("a", rows_of("classify", texts(5))).result(60)
    for f, w in zip(found, Predictor.open(folder, device="cpu").predict(texts(5)), strict=True):
        same(f.prediction, w)
    engine.close()


def test_translations_of_different_adapters_are_generated_together(tmp_path):
    import transformers

    tokenizer = word_tokenizer(pair=False)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                   decoder_start_token_id=0, pad_token_id=0, eos_token_id=3)  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    model.generation_config.suppress_tokens = [0, 1, 2, 3]
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    spec = str(tmp_path / "base")
    methods = {"de": "lora", "fr": "ia3"}
    folders = {
        n: saved(tmp_path / n, spec, m, "seq2seq", (), seed=i, max_target_length=6)
        for i, (n, m) in enumerate(methods.items())
    }
    engine = ReadingEngine.open(spec)
    for name, folder in folders.items():
        engine.add(name, folder)
        engine.read(name, [{"source": "good"}]).result(60)
    before = engine.forwards
    with engine._models:
        asked = {n: engine.read(n, rows_of("seq2seq", texts(4, i))) for i, n in enumerate(folders)}
    found = {n: [f.prediction["prediction"] for f in asked[n].result(60)] for n in folders}
    assert engine.forwards == before + 1
    for i, n in enumerate(folders):
        wanted = [p["prediction"] for p in Predictor.open(folders[n], device="cpu").predict(texts(4, i))]
        assert found[n] == wanted
        assert len(set(wanted)) > 1
    with pytest.raises(Unsupported, match="encoder-decoder"):
        engine.embed("de", ["good"]).result(60)
    engine.close()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_unit_vectors_of_the_states_before_the_head(world, pooling):
    engine, folders, _spec = world
    given = texts(6, 8)
    found = engine.embed("mood", given, pooling=pooling).result(60)
    predictor = Predictor.open(folders["mood"], device="cpu")
    for f, text in zip(found, given, strict=True):
        inputs = predictor.feeder(text, return_tensors="pt")
        states = predictor.model.bert(**inputs).last_hidden_state[0]
        wanted = states.mean(0) if pooling == "mean" else states[0]
        assert np.allclose(f.vector, (wanted / wanted.norm()).detach().numpy(), atol=1e-5)
        assert f.tokens == inputs["input_ids"].shape[1]
    bare = engine.embed(None, given, pooling=pooling).result(60)
    assert not np.allclose(bare[0].vector, found[0].vector, atol=1e-2)


def test_a_decoder_is_embedded_by_its_last_token_from_the_model_that_is_served(tmp_path):
    model, tokenizer = llama(40), word_tokenizer(pair=False)
    adapter = veneer.attach(model, "lora", "made", rank=2)
    with torch.no_grad():
        for leaf in adapter.leaves():
            leaf.normal_(0, 0.3)
    folder = veneer.save(model, "made", tmp_path / "a", extra={"task": make_task("lm").to_dict()})
    given = texts(4, 2)
    wanted = []
    for text in given:
        states = model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        wanted.append((states / states.norm()).detach().numpy())
    veneer.detach(model, "made")
    engine = ReadingEngine.open("tiny", model=(model, tokenizer))
    engine.add("a", folder)
    found = engine.embed("a", given).result(60)
    assert all(np.allclose(f.vector, w, atol=1e-5) for f, w in zip(found, wanted, strict=True))
    assert "veneer" not in model._modules, "the served model is left alone"
    with pytest.raises(Unsupported, match="'lm'"):
        engine.read("a", [{"text": "good"}])
    engine.close()


def test_many_rows_of_one_caller_give_way_to_those_who_come_later(tmp_path, world):
    _engine, folders, spec = world
    small = ReadingEngine.open(spec, batch_rows=4)
    small.add("mood", folders["mood"])
    small.read("mood", [{"text": "good"}]).result(60)
    done = []
    with small._models:
        many = small.read("mood", rows_of("classify", texts(60)))
        few = small.read("mood", [{"text": "bad"}])
        for name, f in (("many", many), ("few", few)):
            f.add_done_callback(lambda _, name=name: done.append(name))
    many.result(60)
    assert done == ["few", "many"]
    wanted = Predictor.open(folders["mood"], device="cpu").predict(texts(60))
    for f, w in zip(many.result(), wanted, strict=True):
        same(f.prediction, w)
    small.close()


def test_a_broken_adapter_fails_its_own_rows_alone(tmp_path, world):
    engine, folders, _spec = world
    shutil.copytree(folders["mood"], tmp_path / "broken")
    (tmp_path / "broken" / "adapter.safetensors").write_bytes(b"x" * 100)
    engine.add("broken", tmp_path / "broken")
    bad, good = engine.read("broken", [{"text": "good"}]), engine.read("mood", [{"text": "good"}])
    with pytest.raises(VeneerError):
        bad.result(60)
    assert good.result(60)
    with pytest.raises(VeneerError):
        engine.read("broken", [{"text": "good"}]).result(60)
    engine.remove("broken")


def test_a_row_that_fails_in_the_forward_fails_its_own_request_alone(world, monkeypatch):
    engine, *_ = world
    original = make_task("classify", labels=("m",)).__class__.item

    def item(self, logits, label):
        if self.labels[0] == "a":
            raise RuntimeError("no")
        return original(self, logits, label)

    monkeypatch.setattr(make_task("classify", labels=("m",)).__class__, "item", item)
    with engine._models:
        asked = {n: engine.read(n, [{"text": "good"}]) for n in ("mood", "topic", "prompted")}
    assert asked["mood"].result(60)
    assert asked["prompted"].result(60)
    with pytest.raises(RuntimeError):
        asked["topic"].result(60)


def test_a_version_in_use_stays_and_the_others_make_room(world):
    _, folders, spec = world
    engine = ReadingEngine.open(spec, memory_budget=1)
    for name in ("mood", "topic", "marks"):
        engine.add(name, folders[name])
    for _ in range(2):
        for name in ("mood", "topic", "marks"):
            engine.read(name, [{"text": "good"}]).result(60)
            assert list(engine.stats()["residents"]) == [name]
    engine.close()


def test_a_removed_version_answers_what_waits_and_then_its_memory_is_given_back(world):
    _, folders, spec = world
    threads = set(threading.enumerate())
    engine = ReadingEngine.open(spec)
    engine.add("mood", folders["mood"])
    engine.read("mood", [{"text": "good"}]).result(60)
    with engine._models:
        asked = engine.read("mood", [{"text": "good"}])
        engine.remove("mood")
        with pytest.raises(UnknownVersion):
            engine.read("mood", [{"text": "good"}])
    assert asked.result(60)
    for _ in range(200):
        if not engine.stats()["residents"]:
            break
        threading.Event().wait(0.02)
    assert engine.stats()["residents"] == {}
    assert engine.versions == ()
    assert all(not veneer.adapters(s.model) for s in engine._shells._open.values())
    engine.add("mood", folders["mood"])
    assert engine.read("mood", [{"text": "good"}]).result(60)
    engine.close()
    assert not [t for t in set(threading.enumerate()) - threads if t.name.startswith("veneer-reading")]


def test_a_registrys_check_leaves_nothing_behind_and_refuses_another_base(world, tmp_path):
    engine, folders, _spec = world
    engine.check(folders["topic"])
    other = saved(tmp_path / "other", saved_bert(tmp_path / "base", seed=7), "lora", "classify", ("a", "b"))
    with pytest.raises(BadOption, match="other weights"):
        engine.check(other)
    for shell in engine._shells._open.values():
        assert not [n for n in veneer.adapters(shell.model) if n.startswith("checked")]


def test_what_cannot_be_asked_is_refused_at_once(world):
    engine, *_ = world
    with pytest.raises(UnknownVersion):
        engine.read("nobody", [{"text": "good"}])
    for rows in ([{}], [{"text": ""}], [{"tokens": ["a"]}]):
        with pytest.raises(BadOption):
            engine.read("mood", rows)
    small = ReadingEngine(lambda task, labels: None, queue_limit=2)
    with small._models:
        small.embed(None, ["a", "a"])
        with pytest.raises(QueueFull):
            small.embed(None, ["a"])
    small.close()


@pytest.mark.parametrize(
    ("task", "labels"), [("classify", ("a", "b", "c")), ("tag", ("N", "V")), ("regress", ())]
)
def test_a_folder_of_hf_peft_is_read_with_labels_as_transformers_calls_them(world, tmp_path, task, labels):
    engine, _, spec = world
    folder = saved(tmp_path / "own", spec, "lora", task, labels, seed=9)
    alone = Predictor.open(folder, device="cpu")
    veneer.export(alone.model, alone.name, tmp_path / "hf", format="peft")
    engine.check(tmp_path / "hf")
    name = f"hf-{task}"
    engine.add(name, tmp_path / "hf")
    found = engine.read(name, rows_of(task, texts(5))).result(60)
    numbers = {label: f"LABEL_{i}" for i, label in enumerate(labels)}
    for f, w in zip(found, alone.predict(texts(5)), strict=True):
        if task == "classify":
            assert f.prediction["prediction"] == numbers[w["prediction"]]
            own, wanted = (list(p["probabilities"].values()) for p in (f.prediction, w))
            assert own == pytest.approx(wanted, abs=1e-5)
        elif task == "tag":
            assert f.prediction["prediction"] == [numbers[p] for p in w["prediction"]]
        else:
            assert f.prediction["prediction"] == pytest.approx(w["prediction"], abs=1e-5)
    engine.remove(name)
