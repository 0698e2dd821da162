"""What the report computes: best of n trials, how a rate lies among others, curves, disagreements, items."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from veneer.comparing import from_results
from veneer.comparing.inference.tuning import expected_best, scores_for_best_of, tuned
from veneer.comparing.reporting.axes import Axis, ByteAxis, spread_out
from veneer.comparing.reporting.disagreements import embedded, most_disputed, pair_counts, read_scores
from veneer.comparing.reporting.items import described, thumbnail, write_items
from veneer.comparing.reporting.published import Published, lines_of
from veneer.comparing.reporting.report import write_again, write_report
from veneer.comparing.reporting.tables import costs_of
from veneer.comparing.running.history import common_target, compact, first_reached, mean_curve
from veneer.comparing.running.runner import TrainingRunner


@pytest.mark.parametrize("rises", [True, False])
def test_the_expected_best_of_n_is_the_mean_over_all_draws(rises):
    values = [0.3, 0.9, 0.5, 0.5]
    best = max if rises else min
    by_hand = [np.mean([best(draw) for draw in itertools.product(values, repeat=n)]) for n in (1, 2, 3, 4)]
    assert expected_best(values, rises) == pytest.approx(by_hand)


def trial(rate, validation, status="ok"):
    return {"learning_rate": rate, "validation": validation, "status": status, "seed": 0}


def test_a_rate_is_judged_by_its_worse_neighbour():
    trials = [trial(0.1, 0.6), trial(0.01, 0.8), trial(0.001, 0.7), trial(1.0, 0.1)]
    found = tuned("a", trials, 0.01)
    assert found.neighbour_loss == pytest.approx(0.2)
    assert not found.at_edge
    assert tuned("a", trials[:3], 0.1).at_edge
    lost = [*trials[1:], {"learning_rate": 0.1, "status": "diverged", "seed": 0}]
    found = tuned("a", lost, 0.01)
    assert found.diverged == 1
    assert found.neighbour_loss is None
    assert scores_for_best_of(lost, worst=0.5) == pytest.approx([0.8, 0.7, 0.1, 0.5])
    assert len(scores_for_best_of(lost, worst=None)) == 3


def test_a_history_is_kept_in_few_points_that_hold_every_loss():
    history = [{"step": step, "loss": float(step), "learning_rate": 0.1} for step in range(1, 1001)]
    history.append({"step": 500, "split": "validation", "accuracy": 0.75})
    kept = compact(history, "accuracy")
    assert len(kept["loss"]) == 60
    assert kept["steps"][-1] == 1000
    weights = np.diff([0, *kept["steps"]])
    assert np.dot(kept["loss"], weights) / 1000 == pytest.approx(500.5)
    assert kept["validation"] == [[500, 0.75]]
    assert compact([], "accuracy") is None
    assert compact(history[:3], "accuracy")["loss"] == [1.0, 2.0, 3.0]


def test_the_target_is_what_the_slowest_reaches():
    curves = {"a": [(1, 0.9), (2, 0.5), (3, 0.2)], "b": [(1, 0.8), (2, 0.4), (3, 0.41)]}
    target = common_target(curves, ["a", "b"], falls=True)
    assert target == 0.4
    assert (first_reached(curves["a"], target, True), first_reached(curves["b"], target, True)) == (3, 2)
    assert first_reached(curves["a"], 0.1, True) is None
    assert mean_curve([{"steps": [1, 2], "loss": [1.0, 3.0]}] * 2, smooth=2) == [(1, 1.0), (2, 2.0)]


SCORES = {"a": [[1, 1, 0, 0], [1, 1, 0, 1]], "b": [[0, 1, 1, 0], [0, 1, 1, 1]], "c": [[1, 1, 1, 1]] * 2}


def score_file(tmp_path, scores=SCORES):
    lines = [
        {"arm": arm, "seed": seed, "item": f"i{item}", "score": float(score), "label": "x"}
        | {"prediction": "xy"[1 - score]}
        for arm, rows in scores.items()
        for seed, row in enumerate(rows)
        for item, score in enumerate(row)
    ]  # fmt: skip
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_disagreements_are_counted_over_all_items(tmp_path):
    scores = read_scores(score_file(tmp_path), ["a", "b", "c"])
    assert scores.is_right_or_wrong
    assert scores.mean.tolist() == [[1, 1, 0, 0.5], [0, 1, 1, 0.5], [1, 1, 1, 1]]
    assert pair_counts(scores) == {"0,1": [1, 1], "0,2": [0, 2], "1,2": [0, 2]}
    assert most_disputed(scores.mean, 2) == [0, 2]


def test_the_embedded_items_hold_predictions_labels_and_texts(tmp_path):
    found = embedded(score_file(tmp_path), ["a", "b"], {"i0": {"text": "a <b> text"}})
    first = next(item for item in found["items"] if item["i"] == "i0")
    assert first["t"] == "a <b> text"
    assert first["l"] == "x"
    assert [found["said"][place] for place in first["p"]] == ["x", "y"]
    assert found["pairs"] == {"0,1": [1, 1]}
    assert found["all"] == 4
    assert embedded(tmp_path / "scores.jsonl", ["a"], {}) is None


def test_the_embedded_items_are_bounded_and_the_rest_is_counted(tmp_path):
    rng = np.random.default_rng(0)
    many = {arm: rng.integers(0, 2, (2, 900)).tolist() for arm in "ab"}
    pictures = {f"i{n}": {"image": "data:image/jpeg;base64," + "A" * 6000} for n in range(900)}
    found = embedded(score_file(tmp_path, many), ["a", "b"], pictures)
    assert len(json.dumps(found)) < 800_000
    assert 100 < len(found["items"]) < 300
    assert found["all"] == 900


def test_an_item_is_described_by_its_text_or_picture(tmp_path):
    assert described({"question": "why?", "context": "because", "label": 1})["text"] == "why? | because"
    assert described({"tokens": ["a", "b"]})["text"] == "a b"
    assert (
        described({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]})[
            "text"
        ]
        == "hi"
    )
    assert len(described({"text": "long " * 1000})["text"]) <= 320
    assert (
        described({"text": "half a pair \ud800 and \0 nothing\nmore"})["text"]
        == "half a pair ? and nothing more"
    )
    image = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    assert described({"image": image})["image"].startswith("data:image/jpeg;base64,")
    assert len(thumbnail(image)) < 8000
    assert thumbnail("no such file.png") is None


def test_items_are_written_once_and_stay_where_nothing_is_known(tmp_path):
    write_items(tmp_path, ["b", "a"], [], lambda items: {item: {"text": item * 2} for item in items})
    assert lines_of(tmp_path / "items.jsonl") == [{"item": "b", "text": "bb"}, {"item": "a", "text": "aa"}]
    write_items(tmp_path, ["b", "a"], [], None)
    assert len(lines_of(tmp_path / "items.jsonl")) == 2
    write_items(tmp_path, ["c"], [{"items": [{"item": "c", "text": "beside\u2028the score"}]}], None)
    assert lines_of(tmp_path / "items.jsonl") == [{"item": "c", "text": "beside the score"}]


def test_names_at_line_ends_are_moved_apart_and_stay_inside():
    placed = spread_out([10, 11, 12, 90, 99], 10, 0, 100)
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(placed))
    assert placed[0] >= 0
    assert placed[-1] <= 100


def test_bytes_have_ticks_at_powers_of_two():
    assert all(np.log2(tick).is_integer() for tick in ByteAxis.of([4e3, 9e7], 0, 100).ticks())
    assert len(ByteAxis.of([1.7 * 2**30, 1.73 * 2**30], 0, 100).ticks()) >= 2
    assert Axis.of([1], [1], 0, 100).ticks()


def test_the_trainer_shows_rows_of_its_test_split():
    runner = object.__new__(TrainingRunner)
    runner.data = SimpleNamespace(test=[{"text": "first"}, {"text": "second"}])
    assert runner.show(["1", "7", "x"]) == {"1": {"text": "second"}}


def test_without_texts_the_report_says_so_and_keeps_its_counts(tmp_path):
    path = score_file(tmp_path)
    result = from_results(path, output=tmp_path / "out")
    write_items(tmp_path / "out", ["i0"], [], lambda items: {"i0": {"text": "a private text"}})
    assert "a private text" in write_report(tmp_path / "out").read_text()
    (tmp_path / "out" / "items.jsonl").unlink()
    page = write_again(tmp_path / "out").read_text()
    assert "a private text" not in page
    assert "The texts of the items are not in the folder" in page
    assert result.report.read_text() == page


def test_where_lower_is_better_the_lower_score_is_the_better_one(tmp_path):
    losses = {"a": [[0.1, 0.9, 0.5]], "b": [[0.2, 0.2, 0.2]]}
    lines = [
        {"arm": arm, "seed": 0, "item": str(item), "score": score}
        for arm, (row,) in losses.items()
        for item, score in enumerate(row)
    ]
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert embedded(path, ["a", "b"], {}, sign=-1.0)["pairs"] == {"0,1": [1, 2]}
    assert embedded(path, ["a", "b"], {})["pairs"] == {"0,1": [2, 1]}
    result = from_results(path, output=tmp_path / "out", metric="loss", higher_is_better=False)
    assert "has the lowest mean" in result.sentence or "better than all others" in result.sentence


def test_where_arms_were_measured_apart_what_workers_said_of_others_is_left_out():
    arms = [{"arm": name, "step_seconds": 1.0, "peak_memory_bytes": 9, "bytes_on_disk": 5} for name in "ab"]
    measured = {
        "a": {"status": "measured", "step_seconds": 0.1, "peak_memory_bytes": 3, "latency_seconds": None}
    }
    page = Published(Path(), {"arms": arms, "costs": {"measured": True, "arms": measured}}, [])
    found = costs_of(page)
    assert found["a"]["step_seconds"] == 0.1
    assert found["b"]["step_seconds"] is None
    assert found["b"]["bytes_on_disk"] == 5
    page = Published(Path(), {"arms": arms}, [])
    assert costs_of(page)["b"]["step_seconds"] == 1.0


def test_arms_that_answer_alike_leave_open_what_would_be_missed(tmp_path):
    path = score_file(tmp_path, {"a": [[1, 0, 1, 0]] * 3, "b": [[1, 0, 1, 0]] * 3})
    sentence = from_results(path, output=tmp_path / "out").sentence
    assert "gave the same scores, so that what would be missed is not known" in sentence
    assert "0.0 points" not in sentence


def test_results_without_items_claim_nothing_about_items(tmp_path):
    path = tmp_path / "runs.csv"
    lines = [
        f"{arm},{seed},{0.8 + 0.01 * seed + gain}"
        for arm, gain in (("a", 0), ("b", 0.05))
        for seed in (1, 2, 3)
    ]
    path.write_text("\n".join(["arm,seed,score", *lines]))
    page = from_results(path, output=tmp_path / "out", metric="accuracy").report.read_text()
    assert "test items <b>not known</b>" in page
    assert "Where two arms disagree" not in page
    assert "seeds and items" not in page
    assert "new items alike" not in page
    assert "Measured while training" not in page
    assert "0 s" not in page
