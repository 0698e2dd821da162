"""Tagging: one tag a word, read at the word's first piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import Unsupported
from veneer.tasks import metrics
from veneer.tasks._collate import IGNORED, pad, text_inputs
from veneer.tasks._task import Batch, Encoded, Feature, Row, Task, task
from veneer.tasks._text import logits_of, names_of


@task("tag", head="AutoModelForTokenClassification", primary="entity_f1", about="a tag for every word")
class Tag(Task):
    """Entities (labels that begin with B-, I- and the like) are scored whole; other tags word by word."""

    @classmethod
    def from_rows(cls, rows: Sequence[Row], labels: Sequence[str] | None = None, **options: Any) -> Tag:
        given = (tag for row in rows for tag in row.get("tags") or ())
        return cls(labels=tuple(labels or names_of(given)), **options)

    @property
    def has_entities(self) -> bool:
        marks = ("B-", "I-", "E-", "S-", "L-", "U-")
        others = [name for name in self.labels if not name.startswith(marks)]
        return len(others) < len(self.labels) and all(name == "O" for name in others)

    @property
    def primary_metric(self) -> str:
        return "entity_f1" if self.has_entities else "token_accuracy"

    def encode(self, rows: Sequence[Row], feeder: Any, model: nn.Module | None = None) -> Encoded:
        if not getattr(feeder, "is_fast", False):
            raise Unsupported(
                f"{type(feeder).__name__} does not say which word a token is of, which tagging needs.",
                next_step="a base with a fast tokenizer (tokenizer.json)",
            )
        if not rows:
            return Encoded([])
        words = [[str(w) for w in row["tokens"]] for row in rows]
        encoded = feeder(
            words, is_split_into_words=True, truncation=True, max_length=self.longest(feeder, model)
        )
        features: list[Feature] = []
        cut = 0
        for item, row in enumerate(rows):
            first = _first_pieces(encoded.word_ids(item))
            feature: Feature = {
                "item": item,
                "input_ids": encoded["input_ids"][item],
                "words": len(words[item]),
            }
            if "token_type_ids" in encoded:
                feature["token_type_ids"] = encoded["token_type_ids"][item]
            feature["length"] = len(feature["input_ids"])
            feature["first"] = first
            cut += len(first) < len(words[item])
            if row.get("tags") is not None:
                feature["tags"] = [self.index_of(tag) for tag in row["tags"]]
                labels = [IGNORED] * feature["length"]
                for word, place in first.items():
                    labels[place] = feature["tags"][word]
                feature["labels"] = labels
            features.append(feature)
        return Encoded(features, cut)

    def collate(self, features: Sequence[Feature], feeder: Any, model: nn.Module | None = None) -> Batch:
        inputs = text_inputs(features, feeder, model)
        labels, weight = None, float(len(features))
        if "labels" in features[0]:
            labels = pad([f["labels"] for f in features], IGNORED)
            weight = int((labels != IGNORED).sum())
        extra = {"first": [f["first"] for f in features], "words": [f["words"] for f in features]}
        extra["tags"] = [f.get("tags") for f in features]
        tokens = sum(f["length"] for f in features)
        return Batch(inputs, labels, [f["item"] for f in features], weight, tokens, extra)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = logits_of(model, batch)
        summed = F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return summed / max(1.0, batch.weight)

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        chances = logits_of(model, batch).softmax(-1).cpu()
        best, index = chances.max(-1)
        found = []
        for at, item in enumerate(batch.items):
            first, words, tags = (batch.extra[k][at] for k in ("first", "words", "tags"))
            # Words behind max_length were not read; they count as outside, or as the first tag.
            unread = self.labels.index("O") if "O" in self.labels else 0
            guessed = [int(index[at, first[w]]) if w in first else unread for w in range(words)]
            sure = [float(best[at, first[w]]) if w in first else 0.0 for w in range(words)]
            right = None if tags is None else sum(g == y for g, y in zip(guessed, tags)) / max(1, words)
            found.append({
                "item": item, "score": right, "prediction": [self.labels[g] for g in guessed],
                "label": None if tags is None else [self.labels[y] for y in tags], "probabilities": sure,
            })  # fmt: skip
        return found

    def metrics(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        y, guessed = [p["label"] for p in predictions], [p["prediction"] for p in predictions]
        found = {"token_accuracy": metrics.token_accuracy(y, guessed)}
        if self.has_entities:
            for name in ("entity_f1", "entity_precision", "entity_recall"):
                found[name] = getattr(metrics, name)(y, guessed)
        return found


def _first_pieces(word_ids: Sequence[int | None]) -> dict[int, int]:
    """{word: place of its first token}."""
    found: dict[int, int] = {}
    for place, word in enumerate(word_ids):
        if word is not None:
            found.setdefault(word, place)
    return found
