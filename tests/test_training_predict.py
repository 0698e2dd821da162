"""From an adapter's folder to predictions and text, in another process too."""

import json
import os
import subprocess
import sys

import pytest
import torch

import veneer.engine as engine
from training_tiny import opened, saved_bert, saved_llama, sentences, talks
from veneer.errors import BadData, BadFile, BadOption, Unsupported
from veneer.training import Chat, Predictor, evaluate, generate, predict, stream, train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """(folder of the adapter, its result): trained on a base that was opened by its spec."""
    place = tmp_path_factory.mktemp("classifier")
    result = train(
        model=saved_bert(place / "base"),
        data=opened(300, 32, 16),
        method="lora",
        output=place / "run",
        epochs=8,
        learning_rate=2e-2,
        batch_size=8,
        progress=False,
        device="cpu",
        evaluate_on=("validation", "test"),
    )
    return place / "run", result


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """(folder of the adapter, {question: answer}): a decoder that learned fixed answers."""
    place = tmp_path_factory.mktemp("speaker")
    data, answers = talks(64)
    train(
        model=saved_llama(place / "base"), data=data, method="full", output=place / "run", epochs=30,
        learning_rate=1e-2, batch_size=16, progress=False, device="cpu",
    )  # fmt: skip
    return place / "run", answers


def test_a_fresh_head_is_found_trained_saved_and_said(classifier):
    folder, result = classifier
    assert any("classifier" in note and "trained whole" in note for note in result.notes)
    record = json.loads((folder / "veneer.json").read_text())
    assert record["whole"] == ["classifier"]
    assert record["task"]["labels"] == ["bad", "good"]
    assert result.metrics["test"]["accuracy"] > 0.9


@pytest.mark.slow
def test_a_new_process_predicts_what_training_saw(classifier):
    folder, result = classifier
    code = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "from veneer.training import predict\n"
        "print(json.dumps(predict(sys.argv[1], json.loads(sys.argv[2]), device='cpu')))"
    )
    texts = [row["text"] for row in sentences(16, 3)]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, str(folder), json.dumps(texts)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "other weights" not in done.stderr
    found = json.loads(done.stdout)
    assert [p["prediction"] for p in found] == [p["prediction"] for p in result.predictions["test"]]
    for one, two in zip(found, result.predictions["test"]):
        assert one["probabilities"] == pytest.approx(two["probabilities"], abs=1e-6)
        assert one["score"] is None


def test_evaluation_of_the_folder_gives_the_metrics_of_the_run(classifier):
    folder, result = classifier
    found = evaluate(folder, opened(64, 32, 16), device="cpu")
    assert found.metrics == pytest.approx(result.metrics["test"], abs=1e-6)
    with pytest.raises(BadData, match="validation"):
        evaluate(folder, opened(64, 0, 16), split="validation", device="cpu")


def test_texts_rows_and_files_are_predicted_alike(classifier, tmp_path):
    folder, _ = classifier
    predictor = Predictor.open(folder, device="cpu")
    texts = [row["text"] for row in sentences(5, 3)]
    (tmp_path / "rows.csv").write_text("text\n" + "\n".join(texts) + "\n")
    by_text = predictor.predict(texts)
    assert predictor.predict([{"text": t} for t in texts]) == by_text
    assert [p["prediction"] for p in predictor.predict(str(tmp_path / "rows.csv"))] == [
        p["prediction"] for p in by_text
    ]
    assert predictor.predict(texts[0])[0]["prediction"] == by_text[0]["prediction"]
    with pytest.raises(BadData, match="empty"):
        predictor.predict(["  "])
    with pytest.raises(Unsupported, match="does not write text"):
        generate(predictor, "good")


def test_a_folder_without_base_or_task_says_what_to_give(classifier, tmp_path):
    folder, _ = classifier
    base = Predictor.open(folder, device="cpu").model
    base.config._name_or_path = ""
    engine.save(base, next(iter(engine.adapters(base))), tmp_path / "bare", extra={"task": None, "opens": {}})
    with pytest.raises(BadFile, match="which task"):
        predict(tmp_path / "bare", "good")
    with pytest.raises(BadFile, match="which base"):
        predict(tmp_path / "bare", "good", task="classify")


def test_a_decoder_answers_what_it_was_taught(speaker):
    folder, answers = speaker
    predictor = Predictor.open(folder, device="cpu")
    said = {q: generate(predictor, q, max_new_tokens=8).strip() for q in answers}
    assert said == answers


def test_streamed_pieces_are_the_text_and_seeds_give_it_again(speaker):
    folder, _ = speaker
    predictor = Predictor.open(folder, device="cpu")
    drawn = {"temperature": 3.0, "max_new_tokens": 12}
    one, same, other = (generate(predictor, "good", seed=s, **drawn) for s in (1, 1, 2))
    assert one == same != other
    pieces = list(stream(predictor, "good", seed=1, **drawn))
    assert len(pieces) > 1
    assert "".join(pieces).split() == one.split()
    with pytest.raises(BadOption, match="temperature"):
        list(stream(predictor, "good", temperature=-1.0))


def test_a_chat_remembers_and_a_failed_answer_leaves_no_trace(speaker):
    folder, answers = speaker
    chat = Chat(Predictor.open(folder, device="cpu"))
    question = next(iter(answers))
    assert chat.say(question, max_new_tokens=8).strip() == answers[question]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    with pytest.raises(BadOption):
        chat.say("good", max_new_tokens=0)
    assert len(chat.messages) == 2
    chat.say("bad", max_new_tokens=4)
    assert len(chat.messages) == 4


def test_likelihoods_of_conversations_are_predicted_from_the_folder(speaker):
    folder, _ = speaker
    data, _ = talks(64)
    found = evaluate(folder, data, split="validation", device="cpu")
    assert found.metrics["perplexity"] < 1.5
    with pytest.raises(Unsupported, match="generate"):
        predict(folder, "good", device="cpu")
