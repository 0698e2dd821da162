"""Questions whose answer is a span of a context; long contexts are read in windows that overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import Unsupported
from veneer.tasks import metrics
from veneer.tasks._collate import text_inputs
from veneer.tasks._task import Batch, Encoded, Feature, Row, Task, task

LONGEST_ANSWER = 30  # tokens
CANDIDATES = 20  # starts and ends that are combined


@task(
    "qa", head="AutoModelForQuestionAnswering", primary="word_f1", about="the span of a context that answers"
)
@dataclass(frozen=True)
class QuestionAnswering(Task):
    """stride: tokens that neighbouring windows share. unanswerable: some questions have no answer in the
    context.
    """

    max_length: int = 384
    stride: int = 128
    unanswerable: bool = False

    @classmethod
    def from_rows(
        cls, rows: Sequence[Row], labels: Sequence[str] | None = None, **options: Any
    ) -> QuestionAnswering:
        options.setdefault("unanswerable", any(not texts_of(row) for row in rows if "answers" in row))
        return cls(**options)

    def encode(self, rows: Sequence[Row], feeder: Any, model: nn.Module | None = None) -> Encoded:
        if not getattr(feeder, "is_fast", False):
            raise Unsupported(
                f"{type(feeder).__name__} does not say where a token stands in the text, which answers need.",
                next_step="a base with a fast tokenizer (tokenizer.json)",
            )
        if not rows:
            return Encoded([])
        longest = self.longest(feeder, model)
        encoded = feeder(
            [str(r["question"]).strip() for r in rows],
            [str(r["context"]) for r in rows],
            truncation="only_second",
            max_length=longest,
            stride=min(self.stride, longest // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        features: list[Feature] = []
        for at, item in enumerate(encoded["overflow_to_sample_mapping"]):
            row, ids = rows[item], encoded["input_ids"][at]
            inside = [s == 1 for s in encoded.sequence_ids(at)]
            offsets = [o if i else None for o, i in zip(encoded["offset_mapping"][at], inside)]
            feature: Feature = {"item": item, "input_ids": ids, "length": len(ids), "offsets": offsets}
            if "token_type_ids" in encoded:
                feature["token_type_ids"] = encoded["token_type_ids"][at]
            feature["context"] = str(row["context"])
            if row.get("answers") is not None:
                feature["answers"] = texts_of(row)
                feature["span"] = span_of(row, offsets)
            features.append(feature)
        return Encoded(features)

    def collate(self, features: Sequence[Feature], feeder: Any, model: nn.Module | None = None) -> Batch:
        labels = torch.tensor([f["span"] for f in features]) if "span" in features[0] else None
        extra = {k: [f.get(k) for f in features] for k in ("offsets", "context", "answers")}
        tokens = sum(f["length"] for f in features)
        inputs = text_inputs(features, feeder, model)
        return Batch(inputs, labels, [f["item"] for f in features], len(features), tokens, extra)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        output = model(**batch.inputs)
        start = F.cross_entropy(output.start_logits.float(), batch.labels[:, 0])
        return (start + F.cross_entropy(output.end_logits.float(), batch.labels[:, 1])) / 2

    def with_labels(self, batch: Batch) -> dict[str, Any]:
        return {**batch.inputs, "start_positions": batch.labels[:, 0], "end_positions": batch.labels[:, 1]}

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        output = model(**batch.inputs)
        starts, ends = output.start_logits.double().cpu(), output.end_logits.double().cpu()
        found = []
        for at, item in enumerate(batch.items):
            offsets, context = batch.extra["offsets"][at], batch.extra["context"][at]
            (first, last), value = best_span(starts[at], ends[at], offsets)
            none = float(starts[at, 0] + ends[at, 0])
            text = "" if first is None else context[offsets[first][0] : offsets[last][1]]
            found.append({
                "item": item, "score": None, "prediction": text, "label": batch.extra["answers"][at],
                "probabilities": None, "value": value, "none": none,
            })  # fmt: skip
        return found

    def joined(self, predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The best span of all windows of a question, or none, where none is better in every window."""
        by_item: dict[int, list[dict[str, Any]]] = {}
        for p in predictions:
            by_item.setdefault(p["item"], []).append(p)
        found = []
        for windows in by_item.values():
            best = dict(max(windows, key=lambda p: p["value"]))
            if self.unanswerable and min(p["none"] for p in windows) > best["value"]:
                best["prediction"] = ""
            if best["label"] is not None:
                best["score"] = metrics.answer_f1(best["label"], best["prediction"])
            del best["value"], best["none"]
            found.append(best)
        return found

    def metrics(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        y, guessed = [p["label"] for p in predictions], [p["prediction"] for p in predictions]
        return {"word_f1": metrics.word_f1(y, guessed), "exact_match": metrics.exact_match(y, guessed)}


def texts_of(row: Row) -> list[str]:
    """The accepted answers of a row, in any of the usual forms."""
    answers = row.get("answers")
    if isinstance(answers, Mapping):
        answers = answers.get("text") or []
    return [answers] if isinstance(answers, str) else list(answers or [])


def span_of(row: Row, offsets: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) where this window does not hold all of it."""
    texts = texts_of(row)
    if not texts:
        return 0, 0
    given = row["answers"].get("answer_start") if isinstance(row["answers"], Mapping) else None
    start = given[0] if given else str(row["context"]).find(texts[0])
    end = start + len(texts[0])
    held = [i for i, o in enumerate(offsets) if o is not None and o[0] < end and o[1] > start and o[1] > o[0]]
    whole = [o for o in offsets if o is not None]
    if start < 0 or not held or whole[0][0] > start or whole[-1][1] < end:
        return 0, 0
    return held[0], held[-1]


def best_span(
    starts: Tensor, ends: Tensor, offsets: Sequence[tuple[int, int] | None]
) -> tuple[tuple[int | None, int], float]:
    """The span with the highest sum of logits that lies in the context and is not too long."""
    inside = torch.tensor([o is not None for o in offsets])
    n = len(offsets)
    count = min(CANDIDATES, n)
    best: tuple[tuple[int | None, int], float] = ((None, 0), float("-inf"))
    s = starts[:n].masked_fill(~inside, float("-inf"))
    e = ends[:n].masked_fill(~inside, float("-inf"))
    for first in s.topk(count).indices.tolist():
        for last in e.topk(count).indices.tolist():
            value = float(s[first] + e[last])
            if first <= last < first + LONGEST_ANSWER and value > best[1]:
                best = ((first, last), value)
    return best
