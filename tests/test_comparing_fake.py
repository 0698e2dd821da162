"""A trainer in numpy for the tests of comparing: logistic regression on some of the features of made-up data.

The data have 10 features, the first four of which carry signal; `lora:rank=k` sees k + 2 of them, `full`
all, `linear_probe` two; `broken` diverges, `impossible` cannot be applied. It takes milliseconds and behaves
like a trainer in what matters here: seeds change the result, larger rates are better up to a point.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from veneer.errors import TrainingFailed, Unsupported

SIZES = {"train": 190, "validation": 200, "test": 300}
WEIGHTS = np.array([1.5, 1.0, 1.0, 0.8] + [0.0] * 6)


class FakeTrainer:
    """`run_arm` for tests. `calls` lists (arm, seed, rate, splits); `stop_after` dies like a kill would."""

    def __init__(self, stop_after: int | None = None, flip_test: bool = False, shuffle: bool = False) -> None:
        self.calls: list[tuple] = []
        self.stop_after, self.flip_test, self.shuffle = stop_after, flip_test, shuffle
        rng = np.random.default_rng(7)
        self.data = {}
        for split, size in SIZES.items():
            x = rng.standard_normal((size, 10))
            y = (x @ WEIGHTS + 0.2 + rng.logistic(size=size) > 0).astype(int)
            self.data[split] = (x, y)
        if shuffle:
            x, y = self.data["train"]
            self.data["train"] = (x, rng.permutation(y))

    def __call__(self, *, arm, seed, learning_rate, splits, output):
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((str(arm), seed, learning_rate, tuple(splits)))
        if arm.method == "broken":
            raise TrainingFailed("the loss is not finite at step 3.")
        if arm.method == "impossible":
            raise Unsupported("this base has no attention.")
        used = {"untrained": 0, "linear_probe": 2, "full": 10}.get(
            arm.method, dict(arm.options).get("rank", 1) + 2
        )
        weights = self.fit(seed, learning_rate, used)
        metrics, predictions = {}, {}
        for split in splits:
            x, y = self.data[split]
            guess = (x @ weights[:-1] + weights[-1] > 0).astype(int)
            truth = 1 - y if self.flip_test and split == "test" else y
            right = (guess == truth).astype(float)
            metrics[split] = {"accuracy": float(right.mean()), "loss": float(1 - right.mean())}
            predictions[split] = [
                {"item": f"{split}-{i}", "score": s, "prediction": int(g), "label": int(t)}
                for i, (s, g, t) in enumerate(zip(right, guess, truth))
            ]
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "predictions-test.jsonl").write_text("what must not stay in the open")
        (output / "weights.txt").write_text(f"{arm} {seed} {learning_rate} {weights.tolist()}")
        return SimpleNamespace(
            metrics=metrics,
            predictions=predictions,
            trainable_parameters=used + (used > 0),
            bytes_on_disk=8 * used,
            step_seconds=0.001 * (1 + used),
            tokens_per_second=1000.0,
            peak_memory_bytes=10_000 + used,
            folder=output,
        )

    def fit(self, seed, rate, used):
        x, y = self.data["train"]
        rng = np.random.default_rng(seed)
        if not used:  # the majority class
            return np.array([0.0] * 10 + [1.0 if y.mean() > 0.5 else -1.0])
        weights = 0.3 * rng.standard_normal(11)
        seen = np.zeros(11)
        seen[:used] = seen[-1] = 1
        weights *= seen
        for _ in range(30):
            order = rng.choice(len(y), 64)
            z = x[order] @ weights[:-1] + weights[-1]
            error = 1 / (1 + np.exp(-z)) - y[order]
            gradient = np.append(x[order].T @ error, error.sum()) / 64
            weights -= rate * gradient * seen
        return weights


RATES = {
    "lora": (0.01, 0.1, 1.0),
    "full": (0.01, 0.1, 1.0),
    "linear_probe": (0.01, 0.1, 1.0),
    "broken": (0.01, 0.1, 1.0),
}


def test_the_fake_trainer_learns_more_from_more_features(tmp_path):
    from veneer.comparing import parse_arm

    trainer = FakeTrainer()
    value = {
        arm: trainer(
            arm=parse_arm(arm), seed=1, learning_rate=1.0, splits=("test",), output=tmp_path
        ).metrics["test"]["accuracy"]
        for arm in ("untrained", "linear_probe", "full")
    }
    assert value["untrained"] < value["linear_probe"] - 0.05 < value["full"] - 0.05
