"""Sampling and text: rows that draw by their own seed alone, whole characters, stop texts over token borders."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import RepetitionPenaltyLogitsProcessor

from serving_tiny import Inbox, ask, byte_tokenizer, model, prompts
from veneer.serving import Engine, Sampling
from veneer.serving._sampling import Chooser, choose
from veneer.serving._text import UNFINISHED, Text

TOKENIZER = byte_tokenizer()


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def chooser(prompt: tuple[int, ...] = (), ends: tuple[int, ...] = (), **options: Any) -> Chooser:
    return Chooser(Sampling(**options), frozenset(prompt), ends)


def logits(rows: int = 1, vocabulary: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


# -- sampling -----------------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_likeliest() -> None:
    x = logits(4)
    tokens, told = choose(x, [chooser(temperature=0.0) for _ in range(4)])
    assert tokens == x.argmax(-1).tolist()
    assert told == [None] * 4


def test_a_row_draws_the_same_whatever_runs_beside_it() -> None:
    x = logits(5)
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    alone = [choose(x[2:3], [row])[0][0] for row in [chooser(**options)] for _ in range(20)]
    row = chooser(**options)
    others = [
        chooser(temperature=1.5, top_k=3, seed=1),
        chooser(),
        row,
        chooser(temperature=2.0),
        chooser(min_p=0.2),
    ]
    beside = [choose(x, others)[0][2] for _ in range(20)]
    assert beside == alone
    assert len(set(alone)) > 1
    assert [
        choose(x[2:3], [r])[0][0] for r in [chooser(**{**options, "seed": 8})] for _ in range(20)
    ] != alone


def test_draws_follow_the_distribution_that_is_left() -> None:
    x = torch.tensor([[2.0, 1.5, 1.0, 0.0, -1.0]])
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.6}, [0, 1]),
        ({"min_p": 0.35}, [0, 1, 2]),
        ({"top_k": 4, "top_p": 0.8}, [0, 1, 2]),
    ]
    for options, left in cases:
        row = chooser(temperature=1.0, seed=0, **options)
        counts = Counter(choose(x, [row])[0][0] for _ in range(2000))
        p = x[0, left].softmax(-1)
        assert set(counts) == set(left), options
        for token, wanted in zip(left, p.tolist()):
            assert abs(counts[token] / 2000 - wanted) < 0.04, options


def test_penalties_are_those_of_transformers_and_of_openai() -> None:
    x = logits()
    prompt = (3, 4, 5)
    ids = torch.tensor([prompt])
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(ids, x.clone()).argmax(-1).tolist()
    assert choose(x, [chooser(prompt, repetition_penalty=1.7)])[0] == wanted
    favourite = int(x.argmax())
    row = chooser(presence_penalty=0.1, frequency_penalty=1.5)
    said = [choose(x, [row])[0][0] for _ in range(6)]
    counts: Counter[int] = Counter()
    for token in said:
        own = x[0].clone()
        for t, n in counts.items():
            own[t] -= 0.1 + 1.5 * n
        assert token == int(own.argmax())
        counts[token] += 1
    assert said[0] == favourite
    assert len(set(said)) > 1


def test_biases_and_ends_that_may_not_come_yet() -> None:
    x = logits()
    best = int(x.argmax())
    assert choose(x, [chooser(logit_bias={best: -100.0})])[0] != [best]
    assert choose(x, [chooser(logit_bias={7: 100.0})])[0] == [7]
    row = chooser(ends=(best,), min_tokens=2)
    said = [choose(x, [row])[0][0] for _ in range(3)]
    assert best not in said[:2]
    assert said[2] == best


def test_log_probabilities_are_those_of_the_base_before_anything_is_changed() -> None:
    x = logits()
    _, told = choose(x, [chooser(logprobs=3, logit_bias={7: 100.0}, temperature=0.5, seed=1)])
    assert told[0] is not None
    assert told[0].token == 7
    plain = x[0].log_softmax(-1)
    assert told[0].logprob == pytest.approx(float(plain[7]), abs=1e-6)
    assert [t for t, _ in told[0].top] == plain.topk(3).indices.tolist()
    assert choose(x, [chooser(logprobs=0)])[1][0].top == ()  # type: ignore[union-attr]


def test_the_same_seed_gives_the_same_text_in_any_company() -> None:
    inbox = Inbox()
    options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 11}
    with Engine(model(), slots=4) as engine:
        alone = engine.generate([5, 6, 7], max_tokens=20, ignore_eos=True, **options).tokens
        asked = [ask(p, count=20, temperature=1.2) for p in prompts(9)]
        again = ask([5, 6, 7], count=20, **options)
        for request in (*asked[:4], again, *asked[4:]):
            engine.submit(request, inbox)
        assert inbox.tokens(again) == list(alone)
        other = engine.generate([5, 6, 7], max_tokens=20, ignore_eos=True, **{**options, "seed": 12}).tokens
        free = {
            engine.generate([5, 6, 7], max_tokens=20, temperature=1.0, ignore_eos=True).tokens
            for _ in range(3)
        }
    assert other != alone
    assert len(free) == 3


# -- text ---------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=20))
def test_text_comes_in_whole_characters_and_adds_up(words: str) -> None:
    ids = TOKENIZER(words)["input_ids"]
    text = Text(decode)
    parts = [text.add(i) for i in ids]
    if UNFINISHED not in words:
        assert not any(UNFINISHED in p for p in parts)
    assert "".join(parts) + text.finish() == decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text("abcé", max_size=20), st.lists(st.text("abcé", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_text_is_ever_shown(words: str, stops: list[str]) -> None:
    text, out = Text(decode, stops), ""
    for i in TOKENIZER(words)["input_ids"]:
        out += text.add(i)
        assert not any(s in out for s in stops)
        if text.stopped:
            break
    out += text.finish()
    assert words.startswith(out)
    assert not any(s in out for s in stops)
    if text.stopped:
        assert any(words.startswith(out + s) for s in stops)
    else:
        assert out == words
        assert not any(s in words for s in stops)


def test_an_answer_ends_before_its_stop_text_and_at_its_ends() -> None:
    base = model(words=300)
    with Engine(base, TOKENIZER, slots=2) as engine:
        whole = engine.generate("hello", max_tokens=30, ignore_eos=True)
        assert whole.text == decode(list(whole.tokens))
        visible = whole.text
        stop = visible[3:5]
        cut = engine.generate("hello", max_tokens=30, ignore_eos=True, stop=(stop,))
        assert cut.finish == "stop"
        assert cut.text == visible[: visible.index(stop)]
        token = whole.tokens[4]
        ended = engine.generate("hello", max_tokens=30, ignore_eos=True, stop_tokens=(token,))
        first = whole.tokens.index(token)
        assert ended.tokens == whole.tokens[: first + 1]
        assert ended.finish == "stop"
        assert ended.text == decode(list(whole.tokens[:first]))
        later = engine.generate(
            "hello", max_tokens=30, ignore_eos=True, stop_tokens=(token,), min_tokens=first + 5
        )
        assert len(later.tokens) >= first + 5
        assert engine.encode("hello") == TOKENIZER("hello")["input_ids"]
        assert engine.decode(engine.encode("hello")) == "hello"
        TOKENIZER.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
        chat = [{"role": "user", "content": "hi"}]
        assert engine.decode(engine.encode_chat(chat)) == "user:hi;"
        assert engine.generate(chat, max_tokens=3).prompt_tokens == len("user:hi;")


def test_the_end_of_text_ends_an_answer_unless_it_is_to_be_ignored() -> None:
    with Engine(model(), slots=1) as engine:
        end = next(iter(engine.words.eos))
        answer = engine.generate([3, 4], logit_bias={end: 100.0}, max_tokens=5)
        assert (answer.tokens, answer.finish) == ((end,), "stop")
        assert (
            engine.generate([3, 4], logit_bias={end: 100.0}, max_tokens=5, ignore_eos=True).finish == "length"
        )
        held = engine.generate([3, 4], logit_bias={end: 100.0}, max_tokens=5, min_tokens=3)
        assert len(held.tokens) == 4


def test_a_draw_depends_on_its_own_row_alone_and_the_likeliest_say_what_the_whole_order_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from veneer.serving import _sampling
    from veneer.serving._sampling import Chooser, _draw

    cuts = [{}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 40, "top_p": 0.5}, {"min_p": 0.2}, {"top_p": 0.999},
            {"top_k": 300}, {"min_p": 1e-9}]  # fmt: skip
    logits = 3 * torch.randn(len(cuts), 400, generator=torch.Generator().manual_seed(0))

    def draws(chosen: list[int], seed: int) -> list[int]:
        made = [
            Chooser(Sampling(temperature=1.3, seed=seed + i, **cuts[i]), frozenset(), ())  # type: ignore[arg-type]
            for i in chosen
        ]
        return _draw(logits[chosen], made)

    everybody = list(range(len(cuts)))
    alone, together, whole = [], [], []
    for seed in range(0, 400, 20):
        monkeypatch.setattr(_sampling, "HEAD", 16)  # some cuts lie inside of it, some do not
        alone.append([draws([i], seed)[0] for i in everybody])
        together.append(draws(everybody, seed))
        monkeypatch.setattr(_sampling, "HEAD", 400)
        whole.append(draws(everybody, seed))
    assert alone == together == whole
    assert len({tuple(row) for row in alone}) > 15
    best = logits.sort(-1, descending=True).indices
    assert all(row[2] in best[2, :5] and row[1] in best[1] for row in alone)
