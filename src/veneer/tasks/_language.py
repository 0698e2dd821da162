"""Tasks of decoders: any text, and conversations of which the assistant's turns are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.tasks import metrics
from veneer.tasks._answers import answer_losses, shifted
from veneer.tasks._chat import encode_conversation, messages_in
from veneer.tasks._collate import IGNORED, pad, text_inputs
from veneer.tasks._task import Batch, Encoded, Feature, Row, Task, task


class LanguageTask(Task):
    """Token ids with labels in, the likelihood of the labels out."""

    def ids_and_labels(self, row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
        raise NotImplementedError

    def encode(self, rows: Sequence[Row], feeder: Any, model: nn.Module | None = None) -> Encoded:
        features: list[Feature] = []
        supervised, cut, longest = [], 0, self.longest(feeder, model)
        for item, row in enumerate(rows):
            ids, labels = self.ids_and_labels(row, feeder)
            windows = self.windows(len(ids), longest)
            cut += windows[-1][1] < len(ids)
            kept = 0
            for start, end in windows:
                part = labels[start:end]
                # The first token of a window has nothing before it to be said from.
                part = [IGNORED, *part[1:]] if part else part
                kept += sum(y != IGNORED for y in part)
                features.append(
                    {"item": item, "input_ids": ids[start:end], "labels": part, "length": end - start}
                )
            supervised.append(kept)
        features = [f for f in features if any(y != IGNORED for y in f["labels"])]
        return Encoded(features, cut, supervised)

    def windows(self, length: int, longest: int) -> list[tuple[int, int]]:
        """Which tokens of a row make a feature; (start, end) each."""
        return [(0, min(length, longest))]

    def collate(self, features: Sequence[Feature], feeder: Any, model: nn.Module | None = None) -> Batch:
        inputs = text_inputs(features, feeder, model)
        labels = pad([f["labels"] for f in features], IGNORED)
        weight = int((labels != IGNORED).sum())
        tokens = sum(f["length"] for f in features)
        return Batch(inputs, labels, [f["item"] for f in features], weight, tokens)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        losses, _ = answer_losses(model, batch.inputs, shifted(batch.labels))
        return losses.sum() / max(1.0, batch.weight)

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """For each row the summed negative log likelihood and the number of its labels."""
        losses, rows = answer_losses(model, batch.inputs, shifted(batch.labels))
        sums = torch.zeros(len(batch.items), dtype=torch.float64, device=losses.device)
        summed = sums.index_add(0, rows, losses.double()).tolist()
        counts = (batch.labels != IGNORED).sum(-1).tolist()
        return [_likelihood(i, s, n) for i, s, n in zip(batch.items, summed, counts)]

    def joined(self, predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found: dict[int, list[float]] = {}
        for p in predictions:
            sums = found.setdefault(p["item"], [0.0, 0])
            sums[0] += p["prediction"]
            sums[1] += p["label"]
        return [_likelihood(i, s, int(n)) for i, (s, n) in found.items()]

    def metrics(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        counts, losses = [p["label"] for p in predictions], [p["prediction"] for p in predictions]
        return {"loss": metrics.loss(counts, losses), "perplexity": metrics.perplexity(counts, losses)}


def _likelihood(item: int, summed: float, count: int) -> dict[str, Any]:
    """prediction: summed loss; label: number of tokens; score: mean log likelihood a token."""
    return {
        "item": item,
        "score": -summed / max(1, count),
        "prediction": summed,
        "label": count,
        "probabilities": None,
    }


@task("lm", head="AutoModelForCausalLM", primary="loss", about="any text, every token of it")
@dataclass(frozen=True)
class LanguageModel(LanguageTask):
    """A row longer than max_length becomes several windows."""

    max_length: int = 512

    def ids_and_labels(self, row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
        ids = tokenizer(str(row["text"]), truncation=False)["input_ids"]
        eos = getattr(tokenizer, "eos_token_id", None)
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        return ids, list(ids)

    def windows(self, length: int, longest: int) -> list[tuple[int, int]]:
        starts = range(0, max(1, length - 1), max(1, longest - 1))
        # Neighbours share a token: the last of one is what the first label of the next is said from.
        return [(at, min(length, at + longest)) for at in starts]


@task(
    "instruct", head="AutoModelForCausalLM", primary="loss", about="conversations, the turns of the assistant"
)
@dataclass(frozen=True)
class Instruct(LanguageTask):
    """Through the tokenizer's own chat template. A conversation longer than max_length loses its end."""

    max_length: int = 512

    def ids_and_labels(self, row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
        return encode_conversation(tokenizer, messages_in(row), IGNORED)

    def encode(self, rows: Sequence[Row], feeder: Any, model: nn.Module | None = None) -> Encoded:
        encoded = super().encode(rows, feeder, model)
        if not getattr(feeder, "chat_template", None):
            encoded.notes.append(
                "the tokenizer has no chat template; 'User: ...' and 'Assistant: ...' are used"
            )
        if encoded.supervised:
            trained, all_tokens = sum(encoded.supervised), sum(f["length"] for f in encoded.features)
            encoded.notes.append(f"{trained:,} of {all_tokens:,} tokens are the assistant's, and are trained")
        return encoded


def shown(feature: Feature, tokenizer: Any) -> str:
    """A feature as text, with what is trained in brackets: [[ ... ]]."""
    pieces, run = list[str](), list[int]()
    inside = False
    for token, label in zip(feature["input_ids"], feature["labels"]):
        said = label != IGNORED
        if said != inside and run:
            pieces.append(_marked(tokenizer.decode(run), inside))
            run = []
        inside = said
        run.append(token)
    pieces.append(_marked(tokenizer.decode(run), inside))
    return "".join(pieces)


def _marked(text: str, inside: bool) -> str:
    return f"[[{text}]]" if inside else text
