"""Cohorts step by step: gradients of separate training, members that come, go and fail alone."""

import copy
import math

import pytest
import torch

import veneer
from engine_tools import base
from training_tiny import bert, llama, word_tokenizer
from veneer.engine import without_dropout
from veneer.errors import BadOption, UnknownName, UnknownOption, Unsupported

FAMILIES = ("encoder", "decoder", "left-padded decoder", "encoder-decoder")


def model_of(family):
    if family == "encoder":
        return bert(2, word_tokenizer())
    return base("t5", False) if family == "encoder-decoder" else llama(30)


def batch_of(family, rows, tokens, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 20, (rows, tokens), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(1, rows, 2):
        mask[row, slice(0, 2) if family.startswith("left") else slice(-2, None)] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if family == "encoder":
        return {**given, "labels": torch.randint(0, 2, (rows,), generator=draw)}
    if family == "encoder-decoder":
        return {**given, "labels": torch.randint(5, 20, (rows, tokens - 2), generator=draw)}
    given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return {**given, "labels": torch.where(mask.bool(), ids, -100)}


def randomise(model, size=0.1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for adapter in veneer.adapters(model).values():
        for leaf in adapter.leaves():
            leaf.data.add_(torch.randn(leaf.shape, generator=draw) * size)


class Watched(veneer.Cohort):
    """Keeps the gradients that the optimizers were about to use."""

    def _update(self, member):
        leaves = veneer.adapters(self.model)[member.name].leaves()
        self.__dict__.setdefault("seen", {})[member.name] = [p.grad.clone() for p in leaves]
        super()._update(member)


MEMBERS = {
    "a": "lora:rank=4",
    "b": "ia3",
    "c": {"method": "dora", "learning_rate": 1e-4},
    "d": "prefix_tuning:length=3",
    "e": "lora:rank=4",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_of_a_cohort_are_those_of_separate_training(family):
    model = model_of(family)
    members = {n: m for n, m in MEMBERS.items() if family == "encoder" or n != "d"}
    cohort = Watched(model, members, learning_rate=1e-3)
    randomise(model)
    apart = copy.deepcopy(model).train()
    shapes = {"a": (2, 7), "b": (3, 9), "c": (1, 5), "d": (2, 6), "e": (2, 9)}
    batches = {n: batch_of(family, *shapes[n], seed=i) for i, n in enumerate(members)}
    losses = cohort.step(batches)
    for name, batch in batches.items():
        with without_dropout(apart), veneer.active(apart, name):
            loss = apart(**batch).loss
            loss.backward()
        assert losses[name] == pytest.approx(float(loss.detach()), rel=1e-6)
        alone = torch.cat([p.grad for p in veneer.adapters(apart)[name].leaves()])
        together = torch.cat(cohort.seen[name])
        assert (alone - together).norm() <= 1e-6 * alone.norm(), name
        assert alone.norm() > 0


def test_the_base_stays_and_its_dropout_is_off_and_said_and_comes_back():
    model = model_of("encoder")
    before = {n: p.clone() for n, p in model.named_parameters()}
    cohort = veneer.Cohort(model, {"a": "lora", "b": "ia3"}, learning_rate=1e-2)
    assert "dropout is off" in cohort.notes[0]
    batches = {"a": batch_of("encoder", 2, 6), "b": batch_of("encoder", 2, 6)}
    first = cohort.step(batches)
    for _ in range(20):
        last = cohort.step(batches)
    assert all(last[n] < first[n] for n in first)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert model.bert.embeddings.dropout.p == 0.1
    assert not model.training


def test_a_member_that_fails_stops_alone():
    model = model_of("encoder")
    names = ("good", "label", "token", "nan", "shape")
    cohort = veneer.Cohort(model, dict.fromkeys(names, "lora"), learning_rate=1e-2)
    batches = {n: batch_of("encoder", 2, 6, seed=i) for i, n in enumerate(names)}
    batches["label"]["labels"] = torch.tensor([0, 7])
    batches["token"]["input_ids"] = batches["token"]["input_ids"] + 10_000
    batches["shape"]["attention_mask"] = torch.ones(3, 4, dtype=torch.long)
    veneer.adapters(model)["nan"].leaves()[0].data.fill_(math.nan)
    before = {n: [p.clone() for p in veneer.adapters(model)[n].leaves()] for n in names}
    losses = cohort.step(batches)
    assert math.isfinite(losses["good"])
    assert all(math.isnan(losses[n]) for n in names[1:])
    reasons = {n: str(cohort.members[n].error) for n in names}
    assert reasons["good"] == "None"
    assert "label 7 is outside of 0..1" in reasons["label"]
    assert "'nan': the loss is not finite at its step 0" in reasons["nan"]
    for name in names[1:]:
        now = veneer.adapters(model)[name].leaves()
        assert all(
            torch.equal(
                a,
                b,
            )
            or name == "nan"
            for a, b in zip(before[name], now)
        )
    alone = veneer.Cohort(model_of("encoder"), {"good": "lora"}, learning_rate=1e-2)
    first = alone.step({"good": batches["good"]})
    assert losses["good"] == pytest.approx(first["good"], rel=1e-6)
    second = cohort.step(batches)["good"]
    assert second == pytest.approx(alone.step({"good": batches["good"]})["good"], rel=1e-5)


def test_where_no_member_is_left_the_step_says_why():
    cohort = veneer.Cohort(model_of("encoder"), {"a": "lora"})
    batch = batch_of("encoder", 2, 6)
    with pytest.raises(veneer.VeneerError, match="label 7"):
        cohort.step({"a": {**batch, "labels": torch.tensor([7, 0])}})


def test_members_join_rest_and_leave_while_it_runs():
    model = model_of("encoder")
    cohort = veneer.Cohort(model, {"a": "lora", "b": "ia3"}, learning_rate=1e-2)
    batch = batch_of("encoder", 2, 6)
    cohort.step({"a": batch, "b": batch})
    cohort.add("c", "dora:rank=2", learning_rate=1e-3, seed=3)
    resting = [p.clone() for p in veneer.adapters(model)["a"].leaves()]
    assert set(cohort.step({"b": batch, "c": batch})) == {"b", "c"}
    assert all(torch.equal(p, q) for p, q in zip(resting, veneer.adapters(model)["a"].leaves()))
    assert [cohort.members[n].steps for n in "abc"] == [1, 2, 1]
    cohort.remove("b")
    cohort.remove("a", keep=True)
    assert set(veneer.adapters(model)) == {"a", "c"}
    assert set(cohort.step({"c": batch})) == {"c"}
    with pytest.raises(UnknownName, match="no member"):
        cohort.step({"a": batch})


def test_a_name_is_taken_once_and_unknown_options_are_named():
    model = model_of("encoder")
    cohort = veneer.Cohort(model, {"a": "lora"})
    with pytest.raises(BadOption, match="already called 'a'"):
        cohort.add("a", "ia3")
    with pytest.raises(UnknownOption, match="learning_rat"):
        cohort.add("b", "ia3", learning_rat=1)
    with pytest.raises(BadOption, match="by itself"):
        cohort.add("b", "lora+mezo")
    assert set(veneer.adapters(model)) == {"a"}


def test_a_loss_of_ones_own_and_a_model_that_is_no_transformer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    batch = (torch.randn(5, 4), torch.randint(0, 2, (5,)))

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    cohort = veneer.Cohort(
        model, dict.fromkeys("ab", "lora:rank=2,sites=all-linear"), loss=loss, learning_rate=0.1
    )
    first = cohort.step({"a": batch, "b": batch})
    assert first["a"] == pytest.approx(float(loss(model, batch)), rel=1e-6)
    for _ in range(10):
        last = cohort.step({"a": batch, "b": batch})
    assert last["a"] < first["a"]
    with pytest.raises(Unsupported, match="does not say how it computes its loss"):
        veneer.Cohort(model, {"c": "lora:rank=2,sites=all-linear"}).step({"c": {"input": batch[0]}})
