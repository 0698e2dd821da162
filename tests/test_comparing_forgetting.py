"""Forgetting is measured on the model as it was saved, from the bare base, and on real positions alone."""

import json

import numpy as np
import pytest
import torch

from training_tiny import bert, opened, saved_bert, saved_llama, sentences, word_tokenizer
from veneer.comparing import compare
from veneer.comparing.measures.forgetting import features_of, knows, pooled, probed
from veneer.comparing.measures.further import further_of
from veneer.tasks import make_task
from veneer.training import train

torch.set_num_threads(1)
OPTIONS = {"device": "cpu", "max_length": 24}


def off_task(folder, count=60):
    """Texts whose class is their last word, in sentences of two lengths."""
    path = folder / "off.jsonl"
    rows = [
        {"text": f"{'very ' * (i % 3)}{middle} was {word}", "label": word}
        for i in range(count)
        for middle, word in ((f"a film {i}", "dull"), (f"the story {i}", "fine"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_probe_tells_separable_classes_and_is_at_chance_on_noise():
    rng = np.random.default_rng(0)
    rows = [{"label": "ab"[i % 2]} for i in range(400)]
    noise = rng.standard_normal((400, 16))
    told = noise + 3 * np.array([[i % 2] for i in range(400)])
    assert np.mean([p["score"] for p in probed(told[:200], told[200:], rows[:200], rows[200:])]) == 1.0
    assert np.mean([p["score"] for p in probed(noise[:200], noise[200:], rows[:200], rows[200:])]) < 0.65


def test_features_are_means_over_real_positions_whatever_stands_beside_them_in_the_batch():
    tokenizer, model = word_tokenizer(), bert()
    task = make_task("classify", labels=["dull", "fine"])
    rows = [{"text": "a film", "label": "dull"}, {"text": "very " * 12 + "fine story", "label": "fine"}]
    together = features_of(model, task, tokenizer, rows, "cpu")
    alone = np.concatenate([features_of(model, task, tokenizer, [row], "cpu") for row in rows])
    assert together.shape == (2, 32)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    hidden, mask = torch.arange(8.0).reshape(1, 4, 2), torch.tensor([[1, 1, 0]])
    assert pooled(hidden, mask).tolist() == [
        [2.0, 3.0]
    ]  # one position was added in front: 0, 1 and 2 are real


def test_the_saved_adapter_is_what_is_probed_and_an_empty_folder_is_the_bare_base(tmp_path):
    base = saved_bert(tmp_path / "base")
    data = opened(32, 8, 8)
    found = further_of(data, {"forgetting": off_task(tmp_path)})
    (name,) = found.off_task
    assert found.about[name]["measure"] == "probe"
    for method, rate in (("full", 0.5), ("prompt_tuning:length=3", 1e-3)):
        train(model=base, data=data, method=method, output=tmp_path / method[:4], learning_rate=rate, max_steps=12,
              progress=False, **OPTIONS)  # fmt: skip
    task = make_task("classify", labels=data.labels)
    bare, ruined, prompted = (
        np.mean([p["score"] for p in knows(base, task, tmp_path / folder, found.off_task, OPTIONS)[name]])
        for folder in ("nothing", "full", "prom")
    )
    assert bare == 1.0
    assert ruined < bare  # a rate of one half; even features of a ruined model tell much of such simple texts
    assert prompted > 0.9


def test_a_language_model_forgets_in_perplexity(tmp_path):
    base = saved_llama(tmp_path / "base")
    path = tmp_path / "plain.jsonl"
    texts = list(dict.fromkeys(row["text"] for row in sentences(200, 5)))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    from veneer.data import read

    data = read([{"text": f"nice {text} {i}"} for i, text in enumerate(texts)], task="lm")
    found = further_of(data, {"forgetting": str(path)})
    (name,) = found.off_task
    train(model=base, data=data, method="full", output=tmp_path / "full", learning_rate=0.3, max_steps=8,
          progress=False, **OPTIONS)  # fmt: skip
    bare, changed = (
        np.mean(
            [
                p["score"]
                for p in knows(base, make_task("lm"), tmp_path / folder, found.off_task, OPTIONS)[name]
            ]
        )
        for folder in ("nothing", "full")
    )
    assert changed != bare
    assert bare == pytest.approx(-np.log(40), abs=1.0)  # an untrained model knows nothing of its forty words


def test_where_there_is_no_measure_the_reason_is_kept():
    data = opened(8, 4, 4)
    data.task = "seq2seq"
    about = further_of(data, {"forgetting": "builtin:nothing"}).about
    assert "encoder-decoder" in about["forgetting-nothing"]["not_applicable"]
    in_memory = further_of(
        opened(8, 4, 4), {"forgetting": "builtin:nothing"}, no_model="the base is in memory"
    ).about
    assert in_memory["forgetting-nothing"]["not_applicable"] == "the base is in memory"


@pytest.mark.slow
def test_a_comparison_measures_all_of_it_on_a_tiny_base(tmp_path):
    every = list({row["text"]: row for row in sentences(1500, 1)}.values())
    rows = [{**row, "place": "north" if i % 2 else "south"} for i, row in enumerate(every)]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in every[190:250]))
    data = {"train": rows[:64], "validation": rows[64:96], "test": rows[96:196]}
    result = compare(
        saved_bert(tmp_path / "base"), data, "lora:rank=2", output=tmp_path / "out", task="classify", seeds=2, trials=1,
        extend_rates=0, budget="examples=64", batch_size=8, groups="place", shifted=[str(other)], corrupt="typos,case",
        forgetting=[off_task(tmp_path)], costs=False, progress=None, **OPTIONS,
    )  # fmt: skip
    summary = result.to_dict()
    for section, sets in (("shifted", 1), ("corrupted", 3), ("forgetting", 1)):
        assert len(summary[section]) == sets
        for of in summary[section].values():
            assert set(of["arms"]) >= {"untrained", "linear_probe", "full", "lora:rank=2"}
    assert summary["shifted"]["shifted-other"]["copies_left_out"] == 6
    assert {row["n"] for row in summary["by_group"]["arms"]["full"]["groups"]} == {50}
    assert summary["stability"]["lora:rank=2"]["train_validation_gap"]["mean"] is not None
    probe = summary["forgetting"]["forgetting-off"]["arms"]["linear_probe"]
    assert probe["lost"]["difference"] == 0.0  # a probe leaves the base as it was
    for record in (tmp_path / "out" / "runs").rglob("veneer.json"):
        assert set(json.loads(record.read_text())["training"]["metrics"]) == {"validation"}
    assert 'groups = "place"' in (tmp_path / "out" / "comparison.toml").read_text()


def test_pictures_are_probed_below_the_head_of_an_image_model():
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = transformers.ViTForImageClassification(config).eval()

    def feeder(images, return_tensors):
        sized = [torch.tensor(np.asarray(image.resize((16, 16))) / 255.0).float() for image in images]
        return {"pixel_values": torch.stack([one.permute(2, 0, 1) for one in sized])}

    rng = np.random.default_rng(0)
    rows = [
        {
            "image": rng.integers(0, 100, (16, 16, 3), dtype=np.uint8) + np.uint8(100 * (i % 2)),
            "label": "ab"[i % 2],
        }
        for i in range(80)
    ]
    task = make_task("image-classify", labels=["a", "b"])
    train_rows, test_rows = rows[:40], rows[40:]
    features = [features_of(model, task, feeder, of, "cpu") for of in (train_rows, test_rows)]
    assert features[0].shape == (40, 32)
    assert np.mean([p["score"] for p in probed(*features, train_rows, test_rows)]) > 0.9  # bright or dark
