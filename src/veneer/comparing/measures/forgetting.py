"""Forgetting: what the trained model has lost of what the bare base knew about other tasks.

Two measures, each of the bare base and of the trained model on the same off-task items. Language models: the log
likelihood of plain text, hence perplexity. Models that give features: how well a linear probe tells the classes of an
off-task set from them (Davari et al., 2022, arXiv:2203.13381): a probe is trained anew on the features of each model,
because a representation that merely turned has forgotten nothing. Other models have no such measure, and say so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from veneer.comparing.inference.statistics import Array
from veneer.errors import BadData, Unsupported, missing_package

PERPLEXITY, PROBE, IMAGE_PROBE = "perplexity", "probe", "image probe"
MEASURES = {"lm": PERPLEXITY, "instruct": PERPLEXITY, "image-classify": IMAGE_PROBE} | dict.fromkeys(
    ("classify", "multilabel", "regress", "tag", "rank", "qa"), PROBE
)
WHY_NOT = (
    "forgetting has no measure for the task '{task}': an encoder-decoder has neither a likelihood of plain text nor "
    "one representation that a probe could read"
)
TEXTS, PROBE_ROWS = 200, 400
BATCH = 32


def measure_for(task: str) -> str | None:
    """The measure that fits the bases of a task, or None."""
    return MEASURES.get(task)


def read_off_task(spec: str, measure: str) -> Any:
    """Splits of an off-task set, cut to what the measure reads. Errors: those of `veneer.data.read`."""
    from veneer.data import read

    if measure != PERPLEXITY and importlib.util.find_spec("sklearn") is None:
        raise missing_package("scikit-learn", "train", "the probe of --forgetting")
    task = {PERPLEXITY: "lm", PROBE: "classify", IMAGE_PROBE: "image-classify"}[measure]
    splits = read(spec, task=task)
    few = TEXTS if measure == PERPLEXITY else PROBE_ROWS
    splits.train, splits.test = splits.train[:PROBE_ROWS], splits.test[:few]
    if not splits.test or (measure != PERPLEXITY and len({row["label"] for row in splits.train}) < 2):
        raise BadData(
            f"the off-task set '{spec}' has {len(splits.train)} training and {len(splits.test)} test rows: a probe "
            "needs two classes to learn and rows to be tested on.",
            next_step="--forgetting with a larger set",
        )
    return splits


def knows(
    model: Any, task: Any, folder: Path, sets: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """{set: scored items} of the model in `folder`, or of the bare base where the folder holds no adapter."""
    from veneer.tasks import make_task

    measure = measure_for(task.name)
    length = options.get("max_length")
    as_lm = make_task("lm", **({"max_length": length} if length else {}))
    opened, feeder, device = _opened(model, as_lm if measure == PERPLEXITY else task, folder, options)
    found = {}
    for name, splits in sets.items():
        if measure == PERPLEXITY:
            found[name] = _likelihoods(opened, as_lm, feeder, splits.test, device)
        else:
            kind = "image-classify" if measure == IMAGE_PROBE else "classify"
            limit = {"max_length": length} if length and measure == PROBE else {}
            reading = make_task(kind, labels=splits.labels, **limit)
            train, test = (
                features_of(opened, reading, feeder, of, device) for of in (splits.train, splits.test)
            )
            found[name] = probed(train, test, splits.train, splits.test)
    return found


def _opened(model: Any, task: Any, folder: Path, options: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """(model, feeder, device): from the adapter's folder, else the bare base."""
    import torch

    from veneer.training import Predictor, _open

    given = {key: options.get(key) for key in ("device", "dtype")}
    if (folder / "veneer.json").is_file():
        predictor = Predictor.open(folder, task=task.name, **given)
        return predictor.model, predictor.feeder, predictor.device
    base = _open.open_model(
        model, task, tokenizer=None, seed=0, dtype=given["dtype"], quantise=options.get("quantise"),
        matmul=options.get("matmul"),
    )  # fmt: skip
    device = torch.device(given["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    base.model.to(device).eval()
    return base.model, _open.feeder_of(base, task), device


def _likelihoods(model: Any, task: Any, feeder: Any, rows: Any, device: Any) -> list[dict[str, Any]]:
    """A text's mean log likelihood a token as `score`, with its sum and its tokens."""
    from veneer.training._evaluate import predictions_of

    return predictions_of(model, task, task.encode(rows, feeder, model), feeder, device=device)


def features_of(model: Any, task: Any, feeder: Any, rows: Any, device: Any) -> Array:
    """(rows, width): the last hidden states of the model below its head, averaged over real positions."""
    import torch

    from veneer.training._evaluate import evaluating

    below = body_of(model)
    features = task.encode(rows, feeder, model).features
    found = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(features), BATCH):
            batch = task.collate(features[start : start + BATCH], feeder, model).to(device)
            output = below(**batch.inputs)
            hidden = getattr(output, "last_hidden_state", None)
            hidden = output if hidden is None and isinstance(output, torch.Tensor) else hidden
            if hidden is None:
                raise Unsupported(
                    f"{type(model).__name__} gives no hidden states that a probe could read.",
                    next_step="leave --forgetting out for this base",
                )
            found.append(pooled(hidden, batch.inputs.get("attention_mask")).double().cpu().numpy())
    return np.concatenate(found)


def body_of(model: Any) -> Any:
    """The model below its head: transformers' `base_model`, timm's `forward_features`."""
    if hasattr(model, "forward_features"):
        return lambda **inputs: model.forward_features(*inputs.values())
    below = getattr(model, "base_model", None)
    if below is None:
        raise Unsupported(
            f"{type(model).__name__} does not say what lies below its head.",
            next_step="leave --forgetting out for this base",
        )
    return below


def pooled(hidden: Any, mask: Any) -> Any:
    """(rows, token, width) or (rows, channel, height, width) -> (rows, width), padding left out.

    Positions that a method adds stand before the real ones (or behind a class token, itself real), so that a mask
    which is too short is filled up in front.
    """
    import torch

    hidden = hidden.float()
    if hidden.dim() == 4:
        return hidden.mean((2, 3))
    if hidden.dim() == 2:
        return hidden
    if mask is None or mask.dim() != 2:
        return hidden.mean(1)
    added = hidden.shape[1] - mask.shape[1]
    weight = torch.nn.functional.pad(mask, (added, 0), value=1)[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def probed(train: Array, test: Array, train_rows: Any, test_rows: Any) -> list[dict[str, Any]]:
    """A logistic regression on standardised features: is each test item's class told right?"""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    probe.fit(train, [row["label"] for row in train_rows])
    said = probe.predict(test)
    return [
        {
            "item": place,
            "score": float(guess == row["label"]),
            "prediction": str(guess),
            "label": row["label"],
        }
        for place, (guess, row) in enumerate(zip(said, test_rows, strict=True))
    ]
