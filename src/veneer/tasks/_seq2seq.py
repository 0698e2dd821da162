"""Tasks of encoder-decoders: text to text, and speech to text. Trained on the target, predicted by
generation.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.tasks import metrics
from veneer.tasks._answers import answer_losses
from veneer.tasks._collate import IGNORED, cut_rows, pad, text_inputs
from veneer.tasks._task import Batch, Encoded, Feature, Row, Task, task


class GenerationTask(Task):
    """A decoder that reads an encoder's output; labels are the tokens that it is to say."""

    max_target_length: int
    beams: int

    def with_target(
        self, inputs: dict[str, Any], features: Sequence[Feature], model: nn.Module | None
    ) -> Batch:
        labels, weight = None, float(len(features))
        if "labels" in features[0]:
            labels = pad([f["labels"] for f in features], IGNORED)
            weight = int((labels != IGNORED).sum())
        extra = {"target": [f.get("target") for f in features]}
        tokens = sum(f["length"] + len(f.get("labels", ())) for f in features)
        return Batch(inputs, labels, [f["item"] for f in features], weight, tokens, extra)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = {**batch.inputs, "decoder_input_ids": decoder_inputs(model, batch.labels)}
        losses, _ = answer_losses(model, inputs, batch.labels)
        return losses.sum() / max(1.0, batch.weight)

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        texts = self.generate(model, batch)
        return [
            {
                "item": item,
                "score": None if y is None else self.score(y, text),
                "prediction": text,
                "label": y,
                "probabilities": None,
            }
            for item, text, y in zip(batch.items, texts, batch.extra["target"])
        ]

    def generate(self, model: nn.Module, batch: Batch) -> list[str]:
        with _without_advice():
            ids = model.generate(  # type: ignore[operator]
                **batch.inputs, max_new_tokens=self.max_target_length, num_beams=self.beams, do_sample=False
            )
        return [t.strip() for t in batch.extra["decode"](ids)]

    def score(self, label: str, prediction: str) -> float:
        raise NotImplementedError


@contextmanager
def _without_advice() -> Iterator[None]:
    """transformers' warnings about options that its own saved settings set."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder has heard before it says each label: the start token, then the labels before it."""
    config: Any = model.config
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(getattr(model, "generation_config", None), "decoder_start_token_id", None)
    filling = next((v for v in (config.pad_token_id, config.eos_token_id, 0) if isinstance(v, int)), 0)
    start = filling if start is None else start
    before = torch.full_like(labels[:, :1], start)
    return torch.cat([before, labels[:, :-1]], 1).masked_fill(
        torch.cat([before, labels[:, :-1]], 1) == IGNORED, filling
    )


@task(
    "seq2seq",
    head="AutoModelForSeq2SeqLM",
    primary="chrf",
    about="text to text: translation, summaries",
    generates=True,
)
@dataclass(frozen=True)
class Seq2Seq(GenerationTask):
    """max_target_length: tokens of what is said. beams: of the search when it predicts."""

    max_target_length: int = 128
    beams: int = 1

    def encode(self, rows: Sequence[Row], feeder: Any, model: nn.Module | None = None) -> Encoded:
        longest = self.longest(feeder, model)
        features: list[Feature] = []
        supervised, cut = [], 0
        for item, row in enumerate(rows):
            encoded = feeder([str(row["source"])], truncation=True, max_length=longest)
            ids = encoded["input_ids"][0]
            feature: Feature = {"item": item, "input_ids": ids, "length": len(ids)}
            cut += cut_rows(encoded, longest)
            if row.get("target") is not None:
                target = str(row["target"])
                said = feeder(text_target=target, truncation=True, max_length=self.max_target_length)
                feature["labels"], feature["target"] = said["input_ids"], target
                feature["tokens"] = feature["length"] + len(feature["labels"])
                supervised.append(len(feature["labels"]))
            features.append(feature)
        return Encoded(features, cut, supervised)

    def collate(self, features: Sequence[Feature], feeder: Any, model: nn.Module | None = None) -> Batch:
        inputs = text_inputs(features, feeder, None)
        inputs.pop("token_type_ids", None)
        batch = self.with_target(inputs, features, model)
        batch.extra["decode"] = lambda ids: feeder.batch_decode(ids, skip_special_tokens=True)
        return batch

    def score(self, label: str, prediction: str) -> float:
        return metrics.sentence_chrf(label, prediction)

    def metrics(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        y, guessed = [p["label"] for p in predictions], [p["prediction"] for p in predictions]
        return {"chrf": metrics.chrf(y, guessed), "bleu": metrics.bleu(y, guessed)}


@task(
    "speech",
    head="AutoModelForSpeechSeq2Seq",
    primary="word_error_rate",
    about="speech to text",
    generates=True,
)
@dataclass(frozen=True)
class Speech(GenerationTask):
    """Rows hold `audio` (a WAV file, its bytes, or {"array", "sampling_rate"}) and `text`."""

    max_target_length: int = 128
    beams: int = 1

    def encode(self, rows: Sequence[Row], feeder: Any, model: nn.Module | None = None) -> Encoded:
        from veneer.tasks._media import sound

        extractor = getattr(feeder, "feature_extractor", feeder)
        features: list[Feature] = []
        for item, row in enumerate(rows):
            wave = sound(row["audio"], extractor.sampling_rate)
            feature: Feature = {
                "item": item,
                "wave": wave,
                "length": len(wave) // extractor.sampling_rate + 1,
            }
            if row.get("text") is not None:
                ids = feeder.tokenizer(str(row["text"]))["input_ids"][: self.max_target_length]
                start = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
                feature["labels"] = ids[1:] if ids and ids[0] == start else ids
                feature["target"] = str(row["text"])
            features.append(feature)
        return Encoded(features)

    def collate(self, features: Sequence[Feature], feeder: Any, model: nn.Module | None = None) -> Batch:
        extractor = getattr(feeder, "feature_extractor", feeder)
        made = extractor(
            [f["wave"] for f in features], sampling_rate=extractor.sampling_rate, return_tensors="pt"
        )
        dtype = next((p.dtype for p in model.parameters()), None) if model is not None else None
        inputs = {k: v.to(dtype) if v.is_floating_point() and dtype else v for k, v in made.items()}
        batch = self.with_target(inputs, features, model)
        batch.extra["decode"] = lambda ids: feeder.batch_decode(ids, skip_special_tokens=True)
        return batch

    def score(self, label: str, prediction: str) -> float:
        """1 less the word error rate, in normal form."""
        return 1.0 - metrics.word_error_rate([plain_words(label)], [plain_words(prediction)])

    def metrics(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        y = [plain_words(p["label"]) for p in predictions]
        guessed = [plain_words(p["prediction"]) for p in predictions]
        return {
            "word_error_rate": metrics.word_error_rate(y, guessed),
            "character_error_rate": metrics.character_error_rate(y, guessed),
        }


def plain_words(text: str) -> str:
    """Lower case, no punctuation, single blanks: what is heard of a text."""
    return " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split())
