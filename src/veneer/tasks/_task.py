"""What a task is: how rows become batches, what is minimised, what is predicted, and how well.

A task is a small value (its labels, its longest input), so that an adapter's folder can hold it and another
process can predict with it. It never holds a model: every function is given one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from veneer.errors import BadData, BadOption, UnknownName, nearest
from veneer.tasks._collate import positions_of

Row = Mapping[str, Any]
Feature = dict[str, Any]  # of one example: its tensors as lists, "item" (the row's number), "length"


@dataclass
class Batch:
    """Inputs of one forward, (rows, ...), and what the loss needs beside them.

    weight: how many things the loss is a mean over (rows, or supervised tokens), so that micro-batches add
    up to exactly the large batch. tokens: real tokens, without padding. items: row numbers.
    """

    inputs: dict[str, Any]
    labels: Any = None
    items: list[int] = field(default_factory=list)
    weight: float = 1.0
    tokens: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def to(self, device: Any) -> Batch:
        return dataclasses.replace(
            self,
            inputs={k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()},
            labels=self.labels.to(device) if isinstance(self.labels, Tensor) else self.labels,
        )


@dataclass
class Encoded:
    """Features of a split. cut: rows longer than max_length. supervised: trained tokens of each row, if
    counted.
    """

    features: list[Feature]
    cut: int = 0
    supervised: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Task:
    """Base of all tasks. labels: names of the classes or tags in order. max_length: tokens of an input.

    | function | gives |
    |---|---|
    | from_rows(rows, ...) | the task with labels read off the rows |
    | encode(rows, feeder, model) | Encoded: features, with labels where the rows have them |
    | collate(features, feeder, model) | Batch |
    | loss(model, batch) | scalar mean over batch.weight things |
    | predict(model, batch) | a prediction for each item: item, score, prediction, label, probabilities |
    | metrics(predictions) | {metric: value} |
    """

    labels: tuple[str, ...] = ()
    max_length: int = 256

    name: ClassVar[str] = ""
    head: ClassVar[str] = ""  # transformers' auto class
    primary: ClassVar[str] = ""  # the metric that decides
    about: ClassVar[str] = ""
    generates: ClassVar[bool] = False  # predicts by generation

    @property
    def primary_metric(self) -> str:
        return self.primary

    @property
    def greater_is_better(self) -> bool:
        from veneer.tasks.metrics import METRICS

        return METRICS[self.primary_metric].greater_is_better

    def longest(self, tokenizer: Any, model: nn.Module | None = None) -> int:
        """max_length, or less where the tokenizer or the model's table of positions ends before."""
        limits = [self.max_length, getattr(tokenizer, "model_max_length", None)]
        config = getattr(model, "config", None)
        if model is not None and not getattr(config, "is_encoder_decoder", False):
            limits.append(positions_of(model))
        return min(n for n in limits if isinstance(n, int) and n > 0)

    @property
    def num_labels(self) -> int | None:
        return len(self.labels) or None

    @classmethod
    def from_rows(cls, rows: Sequence[Row], labels: Sequence[str] | None = None, **options: Any) -> Task:
        """The task that fits the rows. Subclasses that have labels read them off where none are given."""
        return cls(labels=tuple(labels or ()), **options)

    def encode(self, rows: Sequence[Row], feeder: Any, model: nn.Module | None = None) -> Encoded:
        raise NotImplementedError

    def collate(self, features: Sequence[Feature], feeder: Any, model: nn.Module | None = None) -> Batch:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError

    def with_labels(self, batch: Batch) -> dict[str, Any]:
        """Inputs with labels as transformers' models take them, whose output has `.loss`."""
        return {**batch.inputs, "labels": batch.labels}

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        raise NotImplementedError

    def joined(self, predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One prediction a row, where rows were cut into several features; they come sorted by item."""
        return predictions

    def metrics(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """As saved in an adapter's folder; `task_from_dict` reads it."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}}

    def index_of(self, label: Any) -> int:
        """The number of a label, given as its name or as its number."""
        if isinstance(label, bool):
            label = int(label)
        if isinstance(label, int) and str(label) not in self.labels:
            if 0 <= label < len(self.labels):
                return label
        elif str(label) in self.labels:
            return self.labels.index(str(label))
        raise BadData(
            f"the label {label!r} is not one of the {len(self.labels)} labels of this {self.name} task.",
            nearest=nearest(str(label), self.labels),
            next_step="correct the row, or give all labels with labels=[...]",
        )


TASKS: dict[str, type[Task]] = {}


def task(
    name: str, *, head: str, primary: str, about: str, generates: bool = False
) -> Callable[[type], type]:
    """Enter a subclass of Task under its name."""

    def enter(cls: type) -> type:
        cls.name, cls.head, cls.primary = name, head, primary  # type: ignore[attr-defined]
        cls.about, cls.generates = about, generates  # type: ignore[attr-defined]
        TASKS[name] = cls
        return cls

    return enter


def find_task(name: str) -> type[Task]:
    """The class of a task; UnknownName with the nearest names otherwise."""
    if name not in TASKS:
        raise UnknownName(
            f"no task is called {name!r}.",
            nearest=nearest(name, TASKS),
            next_step=f"one of {', '.join(TASKS)}",
        )
    return TASKS[name]


def make_task(name: str, **options: Any) -> Task:
    """A task by name with its options (labels, max_length, ...); unknown options name the nearest."""
    cls = find_task(name)
    known = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise BadOption(
                f"the task {name!r} has no option {option!r}.",
                nearest=nearest(option, known) or known,
                next_step="one of these names, or none: every option has a default",
            )
    if "labels" in options:
        options["labels"] = tuple(options["labels"])
    return cls(**options)


def task_from_dict(saved: Mapping[str, Any]) -> Task:
    """The task that `to_dict` wrote; options of a newer version that this one does not know are left out."""
    cls = find_task(saved["name"])
    known = {f.name for f in dataclasses.fields(cls)}
    options: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known
    }
    return cls(**options)
