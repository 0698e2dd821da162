"""Tasks: rows to batches, losses, predictions with a score each, in tiny models of every kind."""

import io
import wave

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training_tiny import WORDS, bert, llama, word_tokenizer
from veneer.errors import BadData, BadOption, UnknownName
from veneer.tasks import METRICS, TASKS, find_task, make_task, positions, task_from_dict, wants_positions
from veneer.tasks._collate import pad, text_inputs

torch.set_num_threads(1)
TOKENIZER = word_tokenizer()


def through(task, rows, model, feeder=TOKENIZER):
    """(batch, loss, predictions) of all rows at once."""
    encoded = task.encode(rows, feeder, model)
    batch = task.collate(encoded.features, feeder, model)
    with torch.no_grad():
        return batch, float(task.loss(model, batch)), task.joined(task.predict(model, batch))


def test_tasks_are_those_that_the_documentation_names():
    assert set(TASKS) == {
        "classify",
        "multilabel",
        "regress",
        "tag",
        "qa",
        "rank",
        "lm",
        "instruct",
        "seq2seq",
        "image-classify",
        "speech",
    }
    with pytest.raises(UnknownName, match="classify"):
        find_task("clasify")
    with pytest.raises(BadOption, match="max_length"):
        make_task("classify", max_lenght=3)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_is_saved_and_read_as_it_was(name):
    made = make_task(name, labels=["O", "B-X"], max_length=17)
    again = task_from_dict({**made.to_dict(), "of a later version": 1})
    assert again == made
    assert made.primary_metric in METRICS
    assert isinstance(made.greater_is_better, bool)


def test_classify_gives_the_cross_entropy_and_probabilities_that_add_up():
    rows = [{"text": "good film", "label": 1}, {"text": "the plot was bad", "label": "bad"}]
    task = make_task("classify", labels=["bad", "good"])
    model = bert(2, TOKENIZER)
    batch, loss, found = through(task, rows, model)
    logits = model(**batch.inputs).logits
    assert batch.labels.tolist() == [1, 0]
    assert loss == pytest.approx(F.cross_entropy(logits, batch.labels).item())
    for row, p in zip((1, 0), found):
        assert sum(p["probabilities"].values()) == pytest.approx(1)
        assert p["score"] == float(p["prediction"] == ("bad", "good")[row])
    assert task.metrics(found)["accuracy"] == sum(p["score"] for p in found) / 2


def test_an_unknown_label_names_the_nearest():
    with pytest.raises(BadData, match="good"):
        make_task("classify", labels=["bad", "good"]).index_of("goood")
    with pytest.raises(BadData, match="7"):
        make_task("classify", labels=["bad", "good"]).index_of(7)


def test_labels_that_are_numbers_keep_their_names():
    task = find_task("classify").from_rows([{"label": "10"}, {"label": "9"}])
    assert task.labels == ("9", "10")
    assert task.index_of("10") == 1


def test_pairs_are_one_input_with_two_types():
    rows = [{"text": "good film", "text_pair": "bad plot", "label": 0}]
    batch, _, _ = through(make_task("classify", labels=["a", "b"]), rows, bert(2, TOKENIZER))
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_multilabel_scores_the_overlap_of_sets():
    rows = [{"text": "good film", "label": ["x", "z"]}, {"text": "plot", "label": []}]
    task = make_task("multilabel", labels=["x", "y", "z"])
    model = bert(3, TOKENIZER)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([2.0, -2.0, -2.0]))
    batch, loss, found = through(task, rows, model)
    assert batch.labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert [p["prediction"] for p in found] == [["x"], ["x"]]
    assert found[0]["score"] == pytest.approx(2 / 3)
    assert found[1]["score"] == 0.0
    expected = (
        np.mean(
            [np.log1p(np.exp(-2)) * 2 + np.log1p(np.exp(2)), np.log1p(np.exp(2)) + 2 * np.log1p(np.exp(-2))]
        )
        / 3
    )
    assert loss == pytest.approx(expected, rel=1e-5)


def test_regress_is_the_squared_error():
    rows = [{"text": "good film", "label": 1.5}, {"text": "plot", "label": -1}]
    task = make_task("regress")
    _, loss, found = through(task, rows, bert(1, TOKENIZER))
    assert loss == pytest.approx(np.mean([(p["prediction"] - p["label"]) ** 2 for p in found]), rel=1e-5)
    assert found[0]["score"] == pytest.approx(-((found[0]["prediction"] - 1.5) ** 2))


def test_rank_compares_the_documents_of_one_query():
    rows = [
        {"query": "film", "document": "good", "label": 1}, {"query": "film", "document": "bad", "label": 0},
        {"query": "plot", "document": "dull", "label": 0}, {"query": "plot", "document": "nice", "label": 1},
    ]  # fmt: skip
    task = make_task("rank")
    _, _, found = through(task, rows, bert(1, TOKENIZER))
    firsts = [
        found[0]["prediction"] > found[1]["prediction"],
        found[3]["prediction"] > found[2]["prediction"],
    ]
    assert task.metrics(found)["mean_reciprocal_rank"] == np.mean([1.0 if f else 0.5 for f in firsts])
    with pytest.raises(BadData, match="grade"):
        task.encode([{"query": "a", "document": "b", "label": 3}], TOKENIZER)


def test_tags_stand_at_the_first_piece_of_each_word():
    tags = ["O", "B-X", "I-X"]
    task = make_task("tag", labels=tags)
    rows = [{"tokens": ["the", "good", "film"], "tags": [0, 1, 2]}, {"tokens": ["plot"], "tags": ["O"]}]
    model = bert(3, TOKENIZER, cls="BertForTokenClassification")
    batch, loss, found = through(task, rows, model)
    assert batch.labels.tolist() == [[-100, 0, 1, 2, -100], [-100, 0, -100, -100, -100]]
    assert batch.weight == 4
    logits = model(**batch.inputs).logits
    picked = torch.cat([logits[0, 1:4], logits[1, 1:2]])
    assert loss == pytest.approx(F.cross_entropy(picked, torch.tensor([0, 1, 2, 0])).item(), rel=1e-5)
    assert found[0]["label"] == tags
    assert [len(p["prediction"]) for p in found] == [3, 1]
    assert "entity_f1" in task.metrics(found)


def test_words_behind_the_longest_length_count_as_outside():
    task = make_task("tag", labels=["O", "B-X"], max_length=4)
    rows = [{"tokens": ["good"] * 5, "tags": [1] * 5}]
    encoded = task.encode(rows, TOKENIZER)
    assert encoded.cut == 1
    _, _, found = through(task, rows, bert(2, TOKENIZER, cls="BertForTokenClassification"))
    assert found[0]["prediction"][2:] == ["O"] * 3


def test_parts_of_speech_are_scored_word_by_word():
    assert make_task("tag", labels=["NOUN", "VERB", "X"]).primary_metric == "token_accuracy"
    assert make_task("tag", labels=["O", "B-X"]).primary_metric == "entity_f1"


def qa_rows():
    context = "the film was good and the plot was dull"
    return [
        {"question": "film", "context": context, "answers": {"text": ["good"], "answer_start": [13]}},
        {"question": "plot", "context": context, "answers": {"text": ["was dull"], "answer_start": [31]}},
    ]


def test_an_answer_is_found_where_it_stands_in_every_window():
    task = make_task("qa", max_length=12, stride=3)
    encoded = task.encode(qa_rows(), TOKENIZER)
    assert len(encoded.features) > 2
    for feature in encoded.features:
        first, last = feature["span"]
        if first:
            start, end = feature["offsets"][first][0], feature["offsets"][last][1]
            assert feature["context"][start:end] == feature["answers"][0]
    assert {f["item"] for f in encoded.features if f["span"] != (0, 0)} == {0, 1}


def test_the_best_window_answers():
    task = make_task("qa", max_length=12, stride=3)
    model = bert(2, TOKENIZER, cls="BertForQuestionAnswering")
    batch, loss, found = through(task, qa_rows(), model)
    assert [p["item"] for p in found] == [0, 1]
    assert all(p["prediction"] in qa_rows()[0]["context"] and p["prediction"] for p in found)
    output = model(**batch.inputs)
    expected = (
        F.cross_entropy(output.start_logits, batch.labels[:, 0])
        + F.cross_entropy(output.end_logits, batch.labels[:, 1])
    ) / 2
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert all(0 <= p["score"] <= 1 for p in found)


def test_a_question_without_an_answer_can_be_left_unanswered():
    rows = [{"question": "film", "context": "the plot", "answers": {"text": [], "answer_start": []}}]
    task = find_task("qa").from_rows(rows)
    assert task.unanswerable
    p = {"item": 0, "prediction": "plot", "label": [], "score": None, "value": 1.0, "none": 2.0}
    assert task.joined([p])[0]["prediction"] == ""
    assert task.joined([{**p, "none": 0.5}])[0]["score"] == 0.0


def t5():
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=3,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def test_seq2seq_trains_on_what_transformers_would():
    rows = [
        {"source": "good film", "target": "bad plot"},
        {"source": "a nice story was dull", "target": "fine"},
    ]
    task, model = make_task("seq2seq", max_target_length=8), t5()
    batch, loss, found = through(task, rows, model)
    expected = model(**batch.inputs, labels=batch.labels).loss
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert all(0 <= p["score"] <= 100 for p in found)
    assert set(task.metrics(found)) == {"chrf", "bleu"}


def test_generation_is_in_the_predictions_and_padding_does_not_change_it():
    rows = [
        {"source": "good film", "target": "x"},
        {"source": "a nice story was dull the the the", "target": "y"},
    ]
    task, model = make_task("seq2seq", max_target_length=6), t5()
    together = [p["prediction"] for p in through(task, rows, model)[2]]
    alone = [through(task, [row], model)[2][0]["prediction"] for row in rows]
    assert together == alone


def wav(samples, rate=8000):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def test_sounds_are_read_and_brought_to_the_wanted_rate():
    from veneer.tasks._media import sound

    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    found = sound(wav(tone), 16000)
    assert len(found) == 16000
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(found - expected)[500:-500].max() < 0.01
    with pytest.raises(BadData, match="WAV"):
        sound(b"no sound at all", 16000)


def whisper():
    import transformers

    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=40,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=50,
        max_target_positions=32,
        decoder_start_token_id=2,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=2,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


def test_speech_trains_on_what_transformers_would():
    import transformers

    class Feeder:
        feature_extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
        tokenizer = word_tokenizer()

        def batch_decode(self, *a, **k):
            return self.tokenizer.batch_decode(*a, **k)

    draw = np.random.default_rng(0)
    rows = [
        {"audio": {"array": draw.normal(size=9000), "sampling_rate": 16000}, "text": "good film"}
        for _ in range(2)
    ]
    rows[1]["text"] = "the plot was Dull"
    task, model = make_task("speech", max_target_length=6), whisper()
    batch, loss, found = through(task, rows, model, Feeder())
    assert loss == pytest.approx(model(**batch.inputs, labels=batch.labels).loss.item(), rel=1e-5)
    assert all(p["score"] <= 1 for p in found)
    assert "word_error_rate" in task.metrics(found)


def test_pictures_are_classified_through_a_processor_and_without_one():
    pytest.importorskip("PIL")
    import transformers

    from veneer.tasks._media import pixels

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=2,
    )
    model = transformers.ViTForImageClassification(config).eval()

    def processor(images, return_tensors):
        half = (0.5, 0.5, 0.5)
        return {"pixel_values": torch.stack([pixels(i, (16, 16), half, half) for i in images])}

    draw = np.random.default_rng(0)
    rows = [{"image": draw.integers(0, 255, (20, 24, 3), dtype=np.uint8), "label": i % 2} for i in range(3)]
    task = make_task("image-classify", labels=["cat", "dog"])
    batch, loss, found = through(task, rows, model, processor)
    assert batch.inputs["pixel_values"].shape == (3, 3, 16, 16)
    assert loss == pytest.approx(F.cross_entropy(model(**batch.inputs).logits, batch.labels).item(), rel=1e-5)
    assert found[0]["prediction"] in ("cat", "dog")

    class Net(torch.nn.Module):
        pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(192, 2)

        def forward(self, x):
            return self.head(x.flatten(1))

    batch, _, found = through(task, rows, Net(), None)
    assert batch.inputs["x"].shape == (3, 3, 8, 8)
    assert batch.inputs["x"].abs().max() <= 1.2
    assert len(found) == 3


def test_padding_stands_on_the_asked_side_and_positions_follow_the_tokens():
    assert pad([[1, 2], [3]], 0, "left").tolist() == [[1, 2], [0, 3]]
    features = [{"input_ids": [4, 5, 6]}, {"input_ids": [7]}]
    inputs = text_inputs(features, TOKENIZER, llama(40), side="left")
    assert inputs["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert positions(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist() == [[0, 1, 1], [0, 0, 1]]


def test_left_and_right_padding_give_the_same_logits_with_positions():
    model = llama(40)
    features = [{"input_ids": list(range(4, 11))}, {"input_ids": [7, 8, 9]}]
    with torch.no_grad():
        right, left = (
            model(**text_inputs(features, TOKENIZER, model, side)).logits for side in ("right", "left")
        )
    assert torch.allclose(right[1, :3], left[1, 4:], atol=1e-6)
    assert torch.allclose(right[0], left[0], atol=1e-6)


def test_models_that_count_from_the_padding_are_left_to_count():
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    assert not wants_positions(transformers.RobertaForSequenceClassification(config))
    assert wants_positions(bert(2, TOKENIZER))
    assert not wants_positions(t5())
    assert len(WORDS) == 18


def test_inputs_end_where_the_models_positions_end():
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = int(1e30)
    rows = [{"text": "good " * 200, "label": 0}]
    model = bert(2, TOKENIZER)  # 64 positions
    encoded = make_task("classify", labels=["a", "b"]).encode(rows, tokenizer, model)
    assert (encoded.features[0]["length"], encoded.cut) == (64, 1)
    just = make_task("classify", labels=["a", "b"]).encode([{"text": "good " * 62}], tokenizer, model)
    assert (just.features[0]["length"], just.cut) == (64, 0)
    windows = make_task("lm", max_length=500).encode(rows, word_tokenizer(pair=False), llama(40))
    assert [f["length"] for f in windows.features] == [64, 64, 64, 11]  # the tokenizer's 64
