"""Pictures: one class each. Through the base's processor, or by the size and colours that a timm model
states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from veneer.tasks._media import picture, pixels
from veneer.tasks._task import Batch, Encoded, Feature, Row, task
from veneer.tasks._text import Classify


@task(
    "image-classify",
    head="AutoModelForImageClassification",
    primary="accuracy",
    about="one class for a picture",
)
class ImageClassify(Classify):
    def encode(self, rows: Sequence[Row], feeder: Any, model: nn.Module | None = None) -> Encoded:
        features: list[Feature] = []
        for item, row in enumerate(rows):
            feature: Feature = {"item": item, "image": row["image"], "length": 1}
            if row.get("label") is not None:
                feature["label"] = self.target(row["label"])
            features.append(feature)
        return Encoded(features)

    def collate(self, features: Sequence[Feature], feeder: Any, model: nn.Module | None = None) -> Batch:
        images = [picture(f["image"]) for f in features]
        if feeder is not None:
            inputs = dict(feeder(images=images, return_tensors="pt"))
        else:
            size, mean, std = stated(model)
            inputs = {"x": torch.stack([pixels(image, size, mean, std) for image in images])}
        dtype = next((p.dtype for p in model.parameters()), None) if model is not None else None
        inputs = {k: v.to(dtype) if v.is_floating_point() and dtype else v for k, v in inputs.items()}
        labels = torch.tensor([f["label"] for f in features]) if "label" in features[0] else None
        return Batch(inputs, labels, [f["item"] for f in features], len(features), len(features))


def stated(model: Any) -> tuple[tuple[int, int], Sequence[float], Sequence[float]]:
    """(height, width), mean and deviation of the colours, as timm models state them."""
    config = getattr(model, "pretrained_cfg", None) or {}
    size = tuple(config.get("input_size", (3, 224, 224)))[1:]
    return size, config.get("mean", (0.485, 0.456, 0.406)), config.get("std", (0.229, 0.224, 0.225))  # type: ignore[return-value]
