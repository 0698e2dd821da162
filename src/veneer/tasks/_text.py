"""Tasks over whole texts (or pairs of texts): classes, several labels, a number, a rank.

All of them encode a text, or a pair, and read one vector of logits a row; they differ in the loss, in what a
prediction is and in the metrics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import BadData
from veneer.tasks import metrics
from veneer.tasks._collate import cut_rows, text_inputs
from veneer.tasks._task import Batch, Encoded, Feature, Row, Task, task


class TextTask(Task):
    """A text or a pair of texts in, (rows, labels) logits out."""

    columns = ("text", "text_pair")

    def encode(self, rows: Sequence[Row], feeder: Any, model: nn.Module | None = None) -> Encoded:
        first, second = self.columns
        texts = [str(row[first]) for row in rows]
        pairs = [str(row[second]) for row in rows] if rows and rows[0].get(second) is not None else None
        if not texts:
            return Encoded([])
        encoded = feeder(
            texts,
            pairs,
            truncation=True,
            max_length=self.longest(feeder, model),
            return_overflowing_tokens=False,
        )
        features: list[Feature] = []
        for i, row in enumerate(rows):
            feature: Feature = {"item": i, "input_ids": encoded["input_ids"][i]}
            if "token_type_ids" in encoded:
                feature["token_type_ids"] = encoded["token_type_ids"][i]
            if row.get("label") is not None:
                feature["label"] = self.target(row["label"])
            feature["length"] = len(feature["input_ids"])
            features.append(feature)
        return Encoded(features, cut=cut_rows(encoded, self.longest(feeder, model)))

    def collate(self, features: Sequence[Feature], feeder: Any, model: nn.Module | None = None) -> Batch:
        inputs = text_inputs(features, feeder, model)
        labels = None
        if "label" in features[0]:
            labels = torch.tensor([f["label"] for f in features], dtype=self.label_dtype)
        tokens = sum(f["length"] for f in features)
        return Batch(inputs, labels, [f["item"] for f in features], len(features), tokens)

    label_dtype = torch.long

    def target(self, label: Any) -> Any:
        """A row's label as the loss reads it."""
        return self.index_of(label)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss_of(logits_of(model, batch), batch.labels)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(rows, labels) float32 logits -> mean over rows."""
        raise NotImplementedError

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        logits = logits_of(model, batch).cpu()
        labels = [None] * len(batch.items) if batch.labels is None else batch.labels.tolist()
        return [{"item": i, **self.item(z, y)} for i, z, y in zip(batch.items, logits, labels)]

    def item(self, logits: Tensor, label: Any) -> dict[str, Any]:
        """The prediction of one row, and its score where its label is known."""
        raise NotImplementedError


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Logits in float32, of models that return a tensor, a tuple or an output with `.logits`."""
    output = model(**batch.inputs)
    if isinstance(output, Tensor):
        return output.float()
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0]
    return logits.float()


@task(
    "classify",
    head="AutoModelForSequenceClassification",
    primary="accuracy",
    about="one class for a text, or for a pair of texts",
)
class Classify(TextTask):
    @classmethod
    def from_rows(cls, rows: Sequence[Row], labels: Sequence[str] | None = None, **options: Any) -> Classify:
        return cls(labels=tuple(labels or names_of(row.get("label") for row in rows)), **options)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def item(self, logits: Tensor, label: int | None) -> dict[str, Any]:
        probabilities = logits.double().softmax(-1).tolist()
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return {
            "score": None if label is None else float(best == label),
            "prediction": self.labels[best],
            "label": None if label is None else self.labels[label],
            "probabilities": dict(zip(self.labels, probabilities)),
        }

    def metrics(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        y = [self.labels.index(p["label"]) for p in predictions]
        guessed = [self.labels.index(p["prediction"]) for p in predictions]
        probabilities = [[p["probabilities"][name] for name in self.labels] for p in predictions]
        return {
            "accuracy": metrics.accuracy(y, guessed),
            "f1_macro": metrics.f1_macro(y, guessed),
            "matthews": metrics.matthews(y, guessed),
            "log_loss": metrics.log_loss(y, probabilities),
            "calibration_error": metrics.calibration_error(y, probabilities),
        }


def names_of(values: Any) -> list[str]:
    """Label names in a stable order: numbers by size, then names by the alphabet; indexes fill up from 0."""
    found = {v for v in values if v is not None}
    if found and all(isinstance(v, int) and not isinstance(v, bool) for v in found):
        return [str(i) for i in range(max(found) + 1)]
    return sorted(
        {str(v) for v in found}, key=lambda name: (not name.isdigit(), len(name) * name.isdigit(), name)
    )


@task(
    "multilabel",
    head="AutoModelForSequenceClassification",
    primary="f1_micro",
    about="any number of labels for a text",
)
class Multilabel(TextTask):
    label_dtype = torch.float32

    @classmethod
    def from_rows(
        cls, rows: Sequence[Row], labels: Sequence[str] | None = None, **options: Any
    ) -> Multilabel:
        given = (v for row in rows for v in row.get("label") or ())
        return cls(labels=tuple(labels or names_of(given)), **options)

    def target(self, label: Any) -> list[float]:
        chosen = {self.index_of(v) for v in label}
        return [float(i in chosen) for i in range(len(self.labels))]

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels)

    def item(self, logits: Tensor, label: list[float] | None) -> dict[str, Any]:
        probabilities = logits.double().sigmoid().tolist()
        chosen = [name for name, p in zip(self.labels, probabilities) if p > 0.5]
        found: dict[str, Any] = {
            "score": None, "prediction": chosen, "label": None,
            "probabilities": dict(zip(self.labels, probabilities)),
        }  # fmt: skip
        if label is not None:
            true = [name for name, y in zip(self.labels, label) if y > 0.5]
            both = len(set(true) & set(chosen))
            found["label"] = true
            found["score"] = 2 * both / (len(true) + len(chosen)) if true or chosen else 1.0
        return found

    def metrics(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        y = [[int(name in p["label"]) for name in self.labels] for p in predictions]
        guessed = [[int(name in p["prediction"]) for name in self.labels] for p in predictions]
        return {
            "f1_micro": metrics.f1_micro(y, guessed),
            "f1_macro": metrics.f1_macro(y, guessed),
            "subset_accuracy": metrics.subset_accuracy(y, guessed),
        }


@task(
    "regress",
    head="AutoModelForSequenceClassification",
    primary="spearman",
    about="a number for a text, or for a pair of texts",
)
class Regress(TextTask):
    label_dtype = torch.float32

    @property
    def num_labels(self) -> int:
        return 1

    def target(self, label: Any) -> float:
        try:
            return float(label)
        except (TypeError, ValueError):
            raise BadData(
                f"the label {label!r} of a {self.name} task is not a number.",
                next_step="task='classify' for labels that are words",
            ) from None

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(logits.squeeze(-1), labels)

    def item(self, logits: Tensor, label: float | None) -> dict[str, Any]:
        value = float(logits.reshape(-1)[0])
        score = None if label is None else -((value - label) ** 2)
        return {"score": score, "prediction": value, "label": label, "probabilities": None}

    def metrics(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        y, guessed = [p["label"] for p in predictions], [p["prediction"] for p in predictions]
        return {
            "spearman": metrics.spearman(y, guessed),
            "pearson": metrics.pearson(y, guessed),
            "mean_squared_error": metrics.mean_squared_error(y, guessed),
            "mean_absolute_error": metrics.mean_absolute_error(y, guessed),
        }


@task(
    "rank",
    head="AutoModelForSequenceClassification",
    primary="mean_reciprocal_rank",
    about="documents in the order of their fit to a query, read together with it",
)
class Rank(Regress):
    """Pointwise: the logit of relevance is trained with labels in [0, 1]; candidates of one query are
    compared.
    """

    columns = ("query", "document")

    def encode(self, rows: Sequence[Row], feeder: Any, model: nn.Module | None = None) -> Encoded:
        encoded = super().encode(rows, feeder, model)
        for feature, row in zip(encoded.features, rows):
            feature["query"] = str(row["query"])
        return encoded

    def target(self, label: Any) -> float:
        value = super().target(label)
        if not 0 <= value <= 1:
            raise BadData(
                f"the label {label!r} of a rank task is outside of 0 (does not fit) to 1 (fits).",
                next_step="divide graded labels by the highest grade",
            )
        return value

    def collate(self, features: Sequence[Feature], feeder: Any, model: nn.Module | None = None) -> Batch:
        batch = super().collate(features, feeder, model)
        batch.extra["query"] = [f["query"] for f in features]
        return batch

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits.squeeze(-1), labels)

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        found = super().predict(model, batch)
        return [{**p, "query": q} for p, q in zip(found, batch.extra["query"])]

    def item(self, logits: Tensor, label: float | None) -> dict[str, Any]:
        """The score of an item is the log likelihood of its own label; queries are scored in `metrics`."""
        z = logits.double().reshape(-1)[:1]
        score = None
        if label is not None:
            score = -float(F.binary_cross_entropy_with_logits(z, torch.tensor([label]).double()))
        p = float(z.sigmoid())
        return {"score": score, "prediction": float(z), "label": label, "probabilities": {"fits": p}}

    def metrics(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        by_query: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for p in predictions:
            by_query[p["query"]].append(p)
        y = [[p["label"] for p in found] for found in by_query.values()]
        scores = [[p["prediction"] for p in found] for found in by_query.values()]
        return {
            "mean_reciprocal_rank": metrics.mean_reciprocal_rank(y, scores),
            "ndcg_at_10": metrics.ndcg_at_10(y, scores),
        }
