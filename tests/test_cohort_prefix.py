"""What the base computes below the lowest edit: found, recorded once, played back, and the same as computed anew."""

import pytest
import torch

import veneer
from engine_tools import add, base, inputs, out
from training_tiny import bert_base, opened, saved_bert
from veneer import engine
from veneer.training import train_cohort
from veneer.training._kept import CHUNK, Kept

UPPER = {
    "probe": ("linear_probe", {}),
    "query": ("lora", {"sites": "block[1].attention.query"}),
    "stream": ("loreft", {"sites": "block[1:]"}),
    "ladder": ("ladder_side_tuning", {}),
}


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "falcon"])
def test_a_forward_behind_the_prefix_is_the_whole_forward(family):
    model = base(family)
    given = inputs(family, 3, padding="left" if family == "llama" else "right")
    for name, (method, options) in UPPER.items():
        add(model, method, name, **options)
        prefix = engine.frozen_prefix(model, [name])
        found = engine.record_prefix(model, prefix, given)
        calls = []
        handle = engine.host_of(model).module(engine.host_of(model).anatomy.facts.blocks[0][1][0])
        hook = handle.register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        with veneer.active(model, name):
            whole = out(model, given)
            assert calls
            calls.clear()
            with engine.playing(model, prefix, found.states, found.plain):
                behind = out(model, given)
            assert not calls, "the first block ran although its states were kept"
        hook.remove()
        assert torch.equal(whole, behind), name
        with (
            veneer.active(model, name),
            engine.playing(model, prefix, {p: x + 1 for p, x in found.states.items()}, found.plain),
        ):
            changed = not torch.equal(out(model, given), whole)
        assert changed or (name == "probe" and family != "bert")  # the states are what is read


def test_edits_of_the_embedding_of_low_blocks_and_of_two_stacks_have_no_prefix():
    model = base("bert")
    for method, options in (("lora", {}), ("prompt_tuning", {}), ("bitfit", {}), ("full", {})):
        add(model, method, method, **options)
        assert engine.frozen_prefix(model, [method]) is None, method
    add(model, "lora", "upper", sites="block[1].mlp.up")
    assert engine.frozen_prefix(model, ["upper"]).block == 1
    assert engine.frozen_prefix(model, ["upper", "lora"]) is None
    other = base("t5")
    add(other, "lora", "upper", sites="decoder.block[1].attention.query")
    assert engine.frozen_prefix(other, ["upper"]) is None


def test_a_base_whose_blocks_do_not_follow_one_another_keeps_nothing():
    model = base("bert")
    add(model, "lora", "upper", sites="block[1].attention.query")
    prefix = engine.frozen_prefix(model, ["upper"])
    encoder = next(m for n, m in model.named_modules() if n.endswith("encoder"))
    encoder.layer = torch.nn.ModuleList([encoder.layer[0], encoder.layer[0]])
    assert engine.record_prefix(model, engine.Prefix(prefix.stack, 2, (2,)), inputs("bert", 2)) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_bert(tmp_path_factory.mktemp("bert"))


MEMBERS = {
    "probe": {"method": "linear_probe", "learning_rate": 1e-2},
    "upper": {"method": "lora:sites=block[1].attention.query,dropout=0.1", "seed": 2, "batch_size": 8},
    "ladder": {"method": "ladder_side_tuning"},
    "low": {"method": "lora", "seed": 1},
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "form", ["memory", pytest.param("disk", marks=SLOW), pytest.param("disk-float16", marks=SLOW)]
)
def test_training_behind_the_prefix_ends_where_training_without_it_ends(folder, form, monkeypatch):
    data, options = opened(48, 16, 8), {"model": folder, "progress": False, "epochs": 2}
    without = train_cohort(MEMBERS, data=data, frozen_prefix="off", **options)
    filled = []
    fill = Kept.room
    monkeypatch.setattr(Kept, "room", lambda self, *a: filled.append(a) or fill(self, *a))
    found = train_cohort(MEMBERS, data=data, frozen_prefix=form, **options)
    assert not found.failed
    assert len(filled) == 6  # places 0, 1 and 2 of the training rows and of the validation rows, once for all
    for name in MEMBERS:
        mine = [h["loss"] for h in found[name].history if "loss" in h]
        other = [h["loss"] for h in without[name].history if "loss" in h]
        assert mine == pytest.approx(other, rel=1e-5 if form != "disk-float16" else 1e-3), name
        if name != "low":
            alone = veneer.train(
                data=data,
                frozen_prefix=form,
                base_dropout=False,
                evaluate_every=3,
                **options,
                **MEMBERS[name],
            )
            assert [h["loss"] for h in alone.history if "loss" in h] == pytest.approx(mine, rel=1e-5)


def test_nothing_is_kept_where_the_base_draws_or_the_bound_is_too_low_and_the_bound_is_said(
    folder, monkeypatch
):
    rooms = []
    fill = Kept.room
    monkeypatch.setattr(Kept, "room", lambda self, *a: rooms.append(a) or fill(self, *a))
    data, options = (
        opened(32, 8, 8),
        {"model": folder, "method": "linear_probe", "progress": False, "epochs": 2},
    )
    veneer.train(data=data, **options)
    assert not rooms, "kept although dropout is on"
    veneer.train(data=data, base_dropout=False, frozen_prefix="off", **options)
    veneer.train(data=data, base_dropout=False, **{**options, "epochs": 1})
    assert not rooms, "kept although no row is met twice"
    low = veneer.train(data=data, base_dropout=False, frozen_prefix_bytes=1000, **options)
    assert any("frozen_prefix_bytes=1,000" in note for note in low.notes)
    high = veneer.train(data=data, base_dropout=False, **options)
    assert len(rooms) == 2
    assert not any("frozen_prefix_bytes" in note for note in high.notes)
    assert [h["loss"] for h in high.history] == pytest.approx([h["loss"] for h in low.history], rel=1e-6)


@pytest.mark.parametrize(("epochs", "rooms"), [(0.25, 1), (1.0, 2)])
def test_a_small_part_of_the_training_rows_is_not_kept_in_a_cohort_and_all_of_them_are(
    folder, monkeypatch, epochs, rooms
):
    """States are computed a chunk at a time: of few rows among many, most would be for nothing."""
    seen = []
    fill = Kept.room
    monkeypatch.setattr(Kept, "room", lambda self, *a: seen.append(a) or fill(self, *a))
    members = {name: {"method": "linear_probe", "seed": seed} for name, seed in (("a", 1), ("b", 2))}
    found = train_cohort(members, data=opened(64, 8, 8), model=folder, progress=False, epochs=epochs)
    assert not found.failed
    assert len(seen) == rooms  # of the validation rows, which both look at, and of the training rows


def test_a_rows_states_do_not_depend_on_who_asked_first():
    """Chunks follow from the split, so that a resumed run meets the very same states."""
    made = []
    for first in (0, 30):
        base = bert_base(fresh=False)
        engine.attach(base.model, "lora", name="a", sites="block[1].attention.query")
        from veneer.training import _open

        rows = _open.open_rows(opened(40, 8, 8), None)
        task = _open.task_for(rows, None)
        encoded = task.encode(rows.splits["train"], base.tokenizer, base.model)
        kept = Kept(base.model, _open.accelerator_for("cpu", None, False), "memory", 2**20)
        view = kept.view("a", encoded, task, base.tokenizer)
        for at in (first, 5):
            few = encoded.features[at : at + 3]
            found = view.of(few, task.collate(few, base.tokenizer, base.model))
        made.append(found.states[1])
        assert len(view.table.filled[1]) <= 6
        assert max(map(len, view.table.chunks)) <= CHUNK
    assert torch.equal(*made)
