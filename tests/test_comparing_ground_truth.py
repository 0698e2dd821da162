"""A task whose answer is known: labels from a base whose query projection was changed by a hidden matrix of rank 2.

LoRA of rank 2 on the query can become that change exactly, a bias cannot. A comparison that is worth its name finds
that out: it recommends LoRA, recovers the labels, and tells BitFit apart.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

import veneer
from veneer.comparing import compare, decide

WORDS, LENGTH, WIDTH = 12, 8, 16
LORA = "lora:alpha=8.0,rank=2,sites=attention.query"


def tiny_base():
    """One layer of one head; the head's weights are large, so that labels are nearly free of noise."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=1, intermediate_size=2 * WIDTH,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.4, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.classifier.weight.data *= 10
    return model


def sentences(count, seed):
    return torch.randint(0, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


class HiddenChange:
    """A trainer of that task: the head of the base is right already, and stays unless an arm trains it."""

    steps, batch = 500, 128

    def __init__(self) -> None:
        self.base = tiny_base()
        truth = copy.deepcopy(self.base)
        torch.manual_seed(1)
        weight = truth.bert.encoder.layer[0].attention.self.query.weight
        change = torch.randn(WIDTH, 2) @ torch.randn(2, WIDTH)
        weight.data += change * weight.data.norm() / change.norm()
        self.texts = {"train": sentences(4000, 1), "validation": sentences(400, 2), "test": sentences(400, 3)}
        with torch.no_grad():
            logits = truth(input_ids=self.texts["train"]).logits
            middle = (logits[:, 1] - logits[:, 0]).median()
            for model in (self.base, truth):  # as many labels of one class as of the other
                model.classifier.bias.data[1] -= middle
            self.labels = {name: truth(input_ids=x).logits.argmax(-1) for name, x in self.texts.items()}

    def __call__(self, *, arm, seed, learning_rate, splits, output):
        model = copy.deepcopy(self.base)
        torch.manual_seed(seed)
        trained = self.train(model, arm, learning_rate) if arm.is_trained else 0
        model.eval()
        metrics, predictions = {}, {}
        for split in splits:
            with torch.no_grad():
                guess = model(input_ids=self.texts[split]).logits.argmax(-1)
            right = (guess == self.labels[split]).double()
            metrics[split] = {"accuracy": float(right.mean())}
            predictions[split] = [{"item": str(i), "score": s} for i, s in enumerate(right.tolist())]
        return SimpleNamespace(
            metrics=metrics, predictions=predictions, trainable_parameters=trained, bytes_on_disk=4 * trained,
            step_seconds=None, tokens_per_second=None, peak_memory_bytes=None, folder=output,
        )  # fmt: skip

    def train(self, model, arm, rate):
        if arm.method == "linear_probe":
            model.requires_grad_(False)
            groups = list(model.classifier.requires_grad_(True).parameters())
        else:
            veneer.attach(model, arm.method, **dict(arm.options))
            groups = veneer.parameters(model, lr=rate)
        optimiser = torch.optim.Adam(groups, lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        for _ in range(self.steps):
            rows = torch.randint(0, len(self.texts["train"]), (self.batch,))
            loss = cross_entropy(
                model(input_ids=self.texts["train"][rows]).logits, self.labels["train"][rows]
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_lora_of_rank_two_recovers_a_hidden_change_of_rank_two_and_bitfit_does_not(tmp_path):
    claim = {"id": "ground truth", "says": "LoRA on the query beats a bias", "rule": "signs", "first": LORA,
             "second": "bitfit", "signs": ["+"]}  # fmt: skip
    found = compare(
        methods=[LORA, "bitfit"], output=tmp_path, run_arm=HiddenChange(), seeds=3, trials=1, extend_rates=0,
        rates={LORA: [0.01], "bitfit": [0.01], "full": [0.003], "linear_probe": [0.03]}, progress=None, claim=claim,
    )  # fmt: skip
    print(found)
    lora, bitfit = found.analysis.arm(LORA), found.analysis.arm("bitfit")
    assert lora.interval.estimate >= 0.95
    assert lora.tied_with_best
    assert bitfit.interval.high < 0.95
    assert not bitfit.tied_with_best
    assert found.best == LORA
    assert found.sentence.startswith(LORA)
    assert decide(tmp_path).verdict == "agrees"


def test_the_labels_are_not_the_bases_and_are_reached_by_the_hidden_change():
    task = HiddenChange()
    with torch.no_grad():
        own = task.base(input_ids=task.texts["test"]).logits.argmax(-1)
    assert 0.5 < (own == task.labels["test"]).double().mean() < 0.8
    assert 0.4 < task.labels["test"].double().mean() < 0.6
