"""Decoders: which tokens are trained, and a loss that never holds all logits."""

import pytest
import torch
import torch.nn.functional as F

from training_tiny import CHATML, WORDS, llama, word_tokenizer
from veneer.tasks import IGNORED, make_task
from veneer.tasks._answers import answer_losses, shifted
from veneer.tasks._chat import assistant_spans, encode_conversation
from veneer.tasks._language import shown

torch.set_num_threads(1)

TALK = [
    {"role": "system", "content": "be very plot"},
    {"role": "user", "content": "the film was"},
    {"role": "assistant", "content": "good and fine"},
    {"role": "user", "content": "a story was"},
    {"role": "assistant", "content": "bad"},
]

LLAMA2 = (  # the assistant has no header, and there is no generation prompt at all
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'system' %}<<SYS>> {{ m['content'] }} <</SYS>> "
    "{% else %} {{ m['content'] }} </s>{% endif %}"
    "{% endfor %}"
)
THINKING = (  # thoughts are shown in the last turn alone, so that a prefix is no prefix of the whole
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # as Llama 3 writes it
    "{{ '<s>' }}{% for m in messages %}<|h|>{{ m['role'] }}<|/h|>\n\n"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)


def said(tokenizer, messages):
    text, spans = assistant_spans(tokenizer, messages)
    return [text[a:b] for a, b in spans]


def chat_tokenizer(template):
    marks = ["<|im_start|>", "<|im_end|>", "<|eot|>", "<|h|>", "<|/h|>", "<s>", "</s>", "<think>", "</think>"]
    roles = ["system", "user", "assistant", ":", "be", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
    tokenizer = word_tokenizer(roles, marks, pair=False)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["good and fine <|im_end|>", "bad <|im_end|>"]),
        (LLAMA2, ["good and fine </s>", "bad </s>"]),
        (THINKING, ["good and fine<|im_end|>", "<think>\n\n</think>\n\nbad<|im_end|>"]),
        (HEADERS, ["good and fine<|eot|>", "bad<|eot|>"]),
        (None, [" good and fine\n", " bad\n"]),
    ],
    ids=["chatml", "no-prompt", "thinking", "headers", "no-template"],
)
def test_the_assistants_turns_are_found_in_any_template(template, expected):
    found = [t.lstrip(" ") for t in said(chat_tokenizer(template), TALK)]
    assert found == [t.lstrip(" ") for t in expected]


def test_an_answer_that_stands_in_the_question_too_is_not_mistaken():
    talk = [{"role": "user", "content": "bad bad bad"}, {"role": "assistant", "content": "bad"}]
    tokenizer = chat_tokenizer(CHATML)
    ids, labels = encode_conversation(tokenizer, talk, IGNORED)
    # <|im_start|> user : bad bad bad <|im_end|> <|im_start|> assistant : bad <|im_end|>
    assert len(ids) == 12
    assert [y != IGNORED for y in labels] == [False] * 10 + [True] * 2
    assert tokenizer.decode([y for y in labels if y != IGNORED]) == "bad <|im_end|>"


def test_an_answer_without_a_mark_gets_the_end_token():
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    tokenizer.eos_token = "</s>"
    ids, labels = encode_conversation(tokenizer, TALK[1:3], IGNORED)
    assert labels[-1] == tokenizer.eos_token_id == ids[-1]
    assert tokenizer.decode([y for y in labels if y != IGNORED]).split() == ["good", "and", "fine", "</s>"]


def test_a_conversation_whose_answers_are_cut_off_counts_no_trained_token():
    encoded = make_task("instruct", max_length=8).encode([{"messages": TALK}], chat_tokenizer(CHATML))
    assert encoded.supervised == [0]
    assert encoded.cut == 1
    assert encoded.features == []


def test_training_refuses_rows_without_a_trained_token():
    from veneer.errors import BadData
    from veneer.training._open import encode_splits

    task = make_task("instruct", max_length=18)
    rows = {"train": [{"messages": TALK}, {"messages": [{**TALK[1], "content": "a " * 30}, TALK[2]]}]}
    with pytest.raises(BadData, match=r"1 train rows have no trained token .* \(rows 1\)"):
        encode_splits(task, rows, [], chat_tokenizer(CHATML), llama(40))


def test_a_feature_is_shown_with_what_is_trained_in_brackets():
    tokenizer = chat_tokenizer(CHATML)
    feature = make_task("instruct").encode([{"messages": TALK[1:3]}], tokenizer).features[0]
    assert shown(feature, tokenizer).endswith("assistant :[[good and fine <|im_end|>]]")


def windows_of(words, max_length):
    tokenizer = word_tokenizer(pair=False)
    return make_task("lm", max_length=max_length).encode([{"text": " ".join(words)}], tokenizer)


def test_windows_of_a_long_text_train_every_token_but_the_first_once():
    encoded = windows_of(WORDS[:13], 5)
    labels = [y for f in encoded.features for y in f["labels"] if y != IGNORED]
    tokenizer = word_tokenizer(pair=False)
    assert tokenizer.decode(labels).split() == WORDS[1:13]
    assert encoded.supervised == [12]
    assert all(f["length"] <= 5 for f in encoded.features)


def answer_batch(model, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 40, (3, 11), generator=draw)
    labels = torch.where(torch.rand(3, 11, generator=draw) < 0.4, ids, IGNORED)
    mask = torch.ones_like(ids)
    mask[1, 7:], labels[1, 7:] = 0, IGNORED
    return {"input_ids": ids, "attention_mask": mask}, labels


def plain_loss(model, inputs, labels):
    logits = model(**inputs).logits[:, :-1]
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORED
    )


@pytest.mark.parametrize("chunk_bytes", [4 * 40, 4 * 40 * 3, 1 << 20])
def test_the_chunked_loss_equals_the_plain_one_forward_and_backward(chunk_bytes):
    model = llama(40)
    inputs, labels = answer_batch(model)
    results = []
    for chunked in (False, True):
        model.zero_grad()
        if chunked:
            loss = answer_losses(model, inputs, shifted(labels), chunk_bytes)[0].mean()
        else:
            loss = plain_loss(model, inputs, labels)
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (one, g1), (two, g2) = results
    assert abs(one - two) < 1e-6
    assert all(torch.allclose(g1[n], g2[n], atol=1e-6) for n in g1)
    assert any(g.abs().max() > 1e-3 for g in g1.values())


def test_full_logits_are_never_made_where_the_output_layer_is_all():
    model = llama(40)
    inputs, labels = answer_batch(model)
    shapes = []
    model.lm_head.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape)))
    losses, _ = answer_losses(model, inputs, shifted(labels), 4 * 40 * 2)
    assert max(len(losses), 2) > 2
    assert all(torch.Size(s).numel() <= 40 * 3 for s in shapes), shapes  # one place of 3 rows, or two places


def test_a_model_that_caps_its_logits_gets_its_own():
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        final_logit_softcapping=0.5,
        pad_token_id=0,
    )
    model = transformers.Gemma2ForCausalLM(config).eval()
    inputs, labels = answer_batch(model)
    expected = plain_loss(model, inputs, labels)
    assert abs(answer_losses(model, inputs, shifted(labels))[0].mean() - expected) < 1e-6
    uncapped = F.cross_entropy(
        torch.atanh(model(**inputs).logits[:, :-1] / 0.5).mul(0.5).reshape(-1, 40), labels[:, 1:].reshape(-1),
        ignore_index=IGNORED,
    )  # fmt: skip
    assert abs(uncapped - expected) > 1e-4


def test_an_adapter_on_the_output_layer_is_in_the_loss():
    import veneer.engine as engine

    model = llama(40)
    inputs, labels = answer_batch(model)
    engine.attach(model, "lora", name="one", sites="head")
    for p in engine.parameters(model)[0]["params"]:
        torch.nn.init.normal_(p, std=0.5)
    expected = plain_loss(model, inputs, labels)
    with engine.active(model, None):
        bare = plain_loss(model, inputs, labels)
    assert abs(bare - expected) > 1e-2
    loss = answer_losses(model, inputs, shifted(labels))[0].mean()
    assert abs(loss - expected) < 1e-6
    loss.backward()
    assert all(p.grad.abs().max() > 0 for g in engine.parameters(model) for p in g["params"])


def test_scores_of_items_add_up_to_the_loss():
    tokenizer = chat_tokenizer(CHATML)
    model = llama(len(tokenizer))
    task = make_task("instruct")
    encoded = task.encode([{"messages": TALK}, {"messages": TALK[1:3]}], tokenizer)
    batch = task.collate(encoded.features, tokenizer, model)
    found = task.predict(model, batch)
    mean = sum(-p["score"] * p["label"] for p in found) / sum(p["label"] for p in found)
    assert mean == pytest.approx(task.loss(model, batch).item(), rel=1e-5)
    assert task.metrics(found)["loss"] == pytest.approx(mean)
    assert "position_ids" in batch.inputs
