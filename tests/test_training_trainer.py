"""Adapters in transformers' Trainer; recipes and every kind of method in veneer's own loop."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import veneer
import veneer.engine as engine
from training_tiny import CHATML, bert_base, llama, opened, word_tokenizer
from veneer.errors import BadOption
from veneer.tasks import IGNORED, make_task
from veneer.tasks._answers import answer_losses, shifted
from veneer.training import Callback, train
from veneer.training import hf as hf_module

torch.set_num_threads(1)


def trainer(base, tmp_path, callbacks, steps=6):
    import transformers

    task = make_task("classify", labels=["bad", "good"])
    features = task.encode(opened().train, base.tokenizer, base.model).features

    def collate(rows):
        batch = task.collate(rows, base.tokenizer, base.model)
        return {**batch.inputs, "labels": batch.labels}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
    )
    return transformers.Trainer(
        model=base.model, args=arguments, train_dataset=features, data_collator=collate, callbacks=callbacks
    )


def test_the_callback_runs_a_methods_work_between_the_trainers_steps(tmp_path):
    base, seen = bert_base(fresh=False), []
    engine.attach(base.model, "adalora", name="one", total_steps=6, whole=["classifier"])
    original = engine.between_steps

    def watch(model, step, total, optimizer):
        gradient = any(p.grad is not None for g in engine.parameters(model) for p in g["params"])
        seen.append((step, total, gradient))
        return original(model, step, total, optimizer)

    hf_module.engine.between_steps = watch
    try:
        before = [p.detach().clone() for g in engine.parameters(base.model) for p in g["params"]]
        trainer(base, tmp_path, [Callback()]).train()
    finally:
        hf_module.engine.between_steps = original
    assert seen == [(k, 6, True) for k in range(1, 7)]
    after = [p for g in engine.parameters(base.model) for p in g["params"]]
    assert all(not torch.equal(a, b) for a, b in zip(before, after))


def test_a_constraint_holds_behind_every_step_of_the_trainer(tmp_path):
    base = bert_base(fresh=False)
    engine.attach(base.model, "loreft", name="one", whole=["classifier"])
    trainer(base, tmp_path, [Callback()]).train()
    rotations = [v for n, v in engine.trainable(base.model).items() if n.endswith("/R")]
    assert rotations
    for r in rotations:
        assert torch.allclose(r @ r.mT, torch.eye(r.shape[0]), atol=1e-5)


def test_a_constraint_and_what_is_derived_hold_behind_every_step_of_the_loop():
    """torch's fused AdamW does not count its writes, so that a kept value could be a stale one."""
    errors, fresh = [], []

    class Watch:
        def between_steps(self, run, step):
            for name, r in engine.trainable(run.model).items():
                if name.endswith("/R"):
                    errors.append((r @ r.mT - torch.eye(r.shape[0])).abs().max())
            run.model.eval()
            batch = run.batches("train", 4)[0]
            with torch.no_grad():
                fresh.append(run.model(**batch.inputs).logits.clone())
            run.model.train()

    train(
        model=bert_base(),
        data=opened(),
        method="loreft",
        max_steps=5,
        batch_size=8,
        learning_rate=1e-2,
        progress=False,
        device="cpu",
        hooks=[Watch()],
    )
    assert max(errors) < 1e-5
    assert all(not torch.equal(a, b) for a, b in pairwise(fresh[:-1]))


def test_diff_pruning_leaves_the_share_of_entries_that_it_names_and_trains_them_on():
    seen = {}

    class Watch:
        def between_steps(self, run, step):
            sites = [sp for sp in run.model.veneer.adapter("trained").plan.sites if sp.part == 0]
            named = engine.trainable(run.model)
            w = {sp.site.name: named[f"trained.{sp.site.name}/w"] for sp in sites}
            seen[step] = {n: v.clone() for n, v in w.items()}

    base = bert_base()
    model = base.model
    train(
        model=base, data=opened(), method="diff_pruning:keep_ratio=0.01,settle=0.5,gate_rate=10", max_steps=6,
        batch_size=8, learning_rate=1e-3, progress=False, device="cpu", hooks=[Watch()],
    )  # fmt: skip
    total = sum(v.numel() for v in seen[6].values())
    before, fixed, last = (torch.cat([v.flatten() for v in seen[n].values()]) for n in (2, 3, 6))
    assert int((before != 0).sum()) > 0.5 * total
    assert int((last != 0).sum()) == int(0.01 * total)
    assert torch.equal(fixed != 0, last != 0)
    assert not torch.equal(fixed, last)
    with torch.no_grad():  # what an entry was trained to is what it adds, without noise too
        veneer.merge(model, "trained")
        bare = {n: p.clone() for n, p in model.named_parameters() if n in last_names(model, seen[6])}
        veneer.unmerge(model)
        for name, merged in bare.items():
            change = merged - model.get_parameter(name)
            assert torch.allclose(change, seen[6][name], atol=1e-6)


def last_names(model, sites):
    return [n for n, _ in model.named_parameters() if n in sites]


def test_a_share_that_keeps_nothing_is_said_at_the_first_step():
    with pytest.raises(BadOption, match=r"(?s)keep_ratio=1e-09 keeps none.*keeps one"):
        train(
            model=bert_base(), data=opened(), method="diff_pruning:keep_ratio=1e-9", max_steps=3,
            batch_size=8, progress=False, device="cpu",
        )  # fmt: skip


METHODS = [
    "lora",
    "dora",
    "ia3",
    "bitfit",
    "serial_adapter",
    "prefix_tuning",
    "prompt_tuning",
    "loreft",
    "adalora",
    "full",
]


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_every_port_train_in_the_loop(method):
    result = train(
        model=bert_base(),
        data=opened(),
        method=method,
        max_steps=5,
        batch_size=8,
        learning_rate=1e-2,
        progress=False,
        device="cpu",
    )
    assert result.steps == 5
    assert result.trainable_parameters > 66  # more than the fresh head
    assert all(h["loss"] == h["loss"] for h in result.history)


def test_a_recipe_sets_the_rates_and_survives_a_stop(tmp_path):
    from test_training_loop import Stop, StopAt

    options = {
        "data": opened(),
        "max_steps": 8,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "progress": False,
        "device": "cpu",
        "save_every": 1,
        "method": "lora+lora_plus:ratio=4",
    }
    rates = []

    class Watch:
        def on_gradients(self, run, step):
            rates.append(
                sorted(
                    {
                        round(g["lr"] / run.optimizer.param_groups[0]["lr"], 6)
                        for g in run.optimizer.param_groups
                    }
                )
            )

    whole = train(model=bert_base(), output=tmp_path / "whole", hooks=[Watch()], **options)
    assert any(4.0 in found or 0.25 in found for found in rates)
    with pytest.raises(Stop):
        train(model=bert_base(), output=tmp_path / "cut", hooks=[StopAt(5)], **options)
    again = train(model=bert_base(), output=tmp_path / "cut", **options)
    assert again.history == whole.history
    one, two = (tmp_path / n / "adapter.safetensors" for n in ("whole", "cut"))
    assert one.read_bytes() == two.read_bytes()
    assert whole.method == "lora+lora_plus:ratio=4"


def test_a_recipe_without_backward_lowers_the_loss_without_gradients():
    seen = []

    class Watch:
        def between_steps(self, run, step):
            seen.extend(p.grad for p in run.subject.parameters())

    result = train(
        model=bert_base(), data=opened(), method="lora+mezo", max_steps=30, batch_size=64, learning_rate=3e-2,
        schedule="constant", progress=False, device="cpu", hooks=[Watch()],
    )  # fmt: skip
    assert seen
    assert all(g is None for g in seen)
    losses = [h["loss"] for h in result.history]
    assert min(losses[-5:]) < losses[0]


@pytest.mark.parametrize(
    "method", ["lora", "prompt_tuning", "prefix_tuning", "serial_adapter", "ladder_side_tuning"]
)
def test_the_chunked_loss_is_that_of_the_full_logits_under_any_method(method):
    model = llama(40)
    engine.attach(model, method, name="one")
    with torch.no_grad():
        for g in engine.parameters(model):
            for p in g["params"]:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(4, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = IGNORED
    labels[1, 7:] = IGNORED
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    gradients = []
    for chunked in (True, False):
        model.zero_grad()
        if chunked:
            loss = answer_losses(model, inputs, shifted(labels), chunk_bytes=4 * 40 * 2)[0].mean()
        else:
            logits = model(**inputs).logits[:, -9:][:, :-1]
            loss = F.cross_entropy(logits.reshape(-1, 40), labels[:, 1:].reshape(-1), ignore_index=IGNORED)
        loss.backward()
        gradients.append(
            [loss.item(), *(p.grad.clone() for g in engine.parameters(model) for p in g["params"])]
        )
    assert gradients[0][0] == pytest.approx(gradients[1][0], abs=1e-6)
    for one, two in zip(gradients[0][1:], gradients[1][1:]):
        assert torch.allclose(one, two, atol=1e-6)
        assert two.abs().max() > 0


def test_gradient_checkpointing_changes_nothing():
    one, two = (
        train(
            model=bert_base(), data=opened(), method="lora", max_steps=4, batch_size=8, learning_rate=1e-2,
            progress=False, device="cpu", gradient_checkpointing=on,
        )
        for on in (False, True)
    )  # fmt: skip
    assert [h["loss"] for h in one.history] == [h["loss"] for h in two.history]


def test_half_precision_of_the_activations_trains():
    result = train(
        model=bert_base(),
        data=opened(),
        method="lora",
        max_steps=4,
        batch_size=8,
        learning_rate=1e-2,
        progress=False,
        device="cpu",
        mixed_precision="bf16",
    )
    plain = train(
        model=bert_base(),
        data=opened(),
        method="lora",
        max_steps=4,
        batch_size=8,
        learning_rate=1e-2,
        progress=False,
        device="cpu",
    )
    losses, exact = [h["loss"] for h in result.history], [h["loss"] for h in plain.history]
    assert losses == pytest.approx(exact, abs=0.02)
    assert losses != exact


def test_conversations_train_in_the_loop_and_report_their_trained_tokens():
    from veneer.data import Splits

    tokenizer = word_tokenizer(["user", "assistant", ":"], ["<|im_start|>", "<|im_end|>"], pair=False)
    tokenizer.chat_template = CHATML
    rows = [
        {"messages": [{"role": "user", "content": "good film"}, {"role": "assistant", "content": "bad plot"}]}
        for _ in range(8)
    ]
    data = Splits(rows, rows[:2], [], "instruct", {"messages": "messages"}, [], None, "talk")
    result = train(
        model=(llama(len(tokenizer)), tokenizer), data=data, method="lora", max_steps=20, batch_size=4,
        learning_rate=3e-2, progress=False, device="cpu",
    )  # fmt: skip
    # <|im_start|> user : good film <|im_end|> <|im_start|> assistant : bad plot <|im_end|>
    assert "train: 24 of 96 tokens are the assistant's, and are trained" in result.notes
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]


@pytest.mark.slow
def test_trls_trainer_trains_a_model_with_an_adapter(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = word_tokenizer(["user", "assistant", ":"], ["<|im_start|>", "<|im_end|>"], pair=False)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML
    model = llama(len(tokenizer))
    bare = {n: p.clone() for n, p in model.named_parameters()}
    engine.attach(model, "lora", name="one")
    rows = [
        {"messages": [{"role": "user", "content": "good film"}, {"role": "assistant", "content": "bad plot"}]}
    ] * 16
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        max_length=32,
        gradient_checkpointing=False,
    )
    before = [p.detach().clone() for g in engine.parameters(model) for p in g["params"]]
    trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Callback()],
    ).train()
    after = [p for g in engine.parameters(model) for p in g["params"]]
    assert all(not torch.equal(a, b) for a, b in zip(before, after))
    now = dict(model.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in bare.items())
