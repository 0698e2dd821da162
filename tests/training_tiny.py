"""Tiny models, tokenizers and data for the tests of tasks and training: seconds, not minutes."""

from __future__ import annotations

import random

import torch

WORDS = [
    "good",
    "great",
    "fine",
    "nice",
    "bad",
    "poor",
    "awful",
    "dull",
    "the",
    "a",
    "film",
    "story",
    "was",
    "and",
    "very",
    "plot",
    "actor",
    "scene",
]
GOOD, BAD = WORDS[:4], WORDS[4:8]
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} : {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant : {% endif %}"
)


def word_tokenizer(words=(), special=(), *, pair=True, side="right"):
    """A tokenizer of whole words, as transformers keeps them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *special]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys([*marks, *WORDS, *words]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pair:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        additional_special_tokens=list(special), padding_side=side, model_max_length=64,
    )  # fmt: skip
    if pair:
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def bert(num_labels=2, tokenizer=None, seed=0, cls="BertForSequenceClassification", **options):
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer or WORDS) + 8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=num_labels,
        hidden_dropout_prob=0.1,
        **options,
    )
    return getattr(transformers, cls)(config).eval()


def llama(vocabulary, seed=0, **options):
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def sentences(count, seed=0):
    """Sentences of one good or bad word among others; the label is the word's side."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.randrange(2)
        words = [draw.choice(WORDS[8:]) for _ in range(draw.randrange(2, 12))]
        words.insert(draw.randrange(len(words)), draw.choice((BAD, GOOD)[label]))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def opened(train=64, validation=32, test=16):
    """The splits of `sentences`, as the data room gives them."""
    from veneer.data import Splits

    return Splits(
        sentences(train, 1), sentences(validation, 2), sentences(test, 3), "classify",
        {"text": "text", "label": "label"}, ["bad", "good"], None, "sentences",
    )  # fmt: skip


def bert_base(seed=0, fresh=True):
    """A tiny BERT as `open_base` would give it, its classifier fresh."""
    from veneer.bases import Base

    tokenizer = word_tokenizer()
    model = bert(2, tokenizer, seed)
    names = ["classifier.weight", "classifier.bias"] if fresh else []
    return Base(model, "tiny-bert", f"tiny-bert-{seed}", "transformers", tokenizer=tokenizer, fresh=names)


def saved_bert(folder, seed=0):
    """A folder with a tiny BERT encoder without a head, as a person would have it."""
    tokenizer = word_tokenizer()
    bert(2, tokenizer, seed, cls="BertModel").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def saved_llama(folder, seed=0):
    """A folder with a tiny decoder and a tokenizer that has a chat template."""
    roles = ["user", "assistant", "system", ":"]
    tokenizer = word_tokenizer(roles, ["<|im_start|>", "<|im_end|>"], pair=False)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML
    model = llama(len(tokenizer), seed)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def talks(count, seed=0):
    """Questions of one word, answered with a fixed word."""
    from veneer.data import Splits

    draw = random.Random(seed)
    answers = dict(zip(WORDS[:6], WORDS[6:12]))
    rows = []
    for _ in range(count):
        word = draw.choice(list(answers))
        said = [{"role": "user", "content": word}, {"role": "assistant", "content": answers[word]}]
        rows.append({"messages": said})
    cut = count * 3 // 4
    return Splits(
        rows[:cut], rows[cut:], [], "instruct", {"messages": "messages"}, [], None, "talks"
    ), answers
