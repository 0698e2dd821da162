"""Both engines over one base, opened together: what generates, what reads, and the check for adapters of either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.errors import Unsupported

from ._engine import Engine
from ._reading import ReadingEngine
from ._reading_tasks import task_of
from ._registry import Check
from ._registry_check import check_on
from ._registry_content import Content
from ._registry_engine import reads


class ReadingOnly:
    """Stands where the engine does over a base that writes no text: it tokenises, and refuses every prompt."""

    alive = True
    writes = False  # no prompt is answered
    versions: tuple[str, ...] = ()

    def __init__(self, reading: ReadingEngine, name: str) -> None:
        self.model_name = name
        self.tokenizer, self.max_length = reading.feeder()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))

    def add(self, version: str, folder: Path) -> None:
        """Adapters that name no task can still be embedded with."""
        if task_of(folder) is not None:
            raise self._refusal()

    def remove(self, version: str, *, drain: bool = True) -> None:
        """Nothing was added."""

    def encode_chat(self, messages: Any, **options: Any) -> list[int]:
        raise self._refusal()

    def submit(self, request: Any, sink: Any) -> None:
        raise self._refusal()

    def cancel(self, name: str) -> None:
        """Nothing runs."""

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing was opened."""

    def _refusal(self) -> Unsupported:
        return Unsupported(
            f"'{self.model_name}' does not write text.",
            next_step="/v1/classify, /v1/tag, /v1/translate or /v1/embeddings, with an adapter's name as the model",
        )


def open_engines(
    model: str, *, dtype: Any = None, quantise: str | None = None, **options: Any
) -> tuple[Engine | ReadingOnly, ReadingEngine]:
    """The engine of the base that `model` names, and one that reads with the same weights.

    options: of `Engine.open`. The base of a reading head is opened when the first adapter with one is used.
    """
    try:
        engine = Engine.open(model, dtype=dtype, quantise=quantise, **options)
    except Unsupported:
        reading = ReadingEngine.open(model, dtype=dtype, quantise=quantise)
        return ReadingOnly(reading, model), reading
    shared = None if engine.tokenizer is None else (engine.model, engine.tokenizer)
    return engine, ReadingEngine.open(model, dtype=dtype, quantise=quantise, model=shared)


def check_for(engine: Engine | ReadingOnly, reading: ReadingEngine) -> Check:
    """A registry's check: an adapter with a head against the base under that head, any other against the base."""
    generating = None if isinstance(engine, ReadingOnly) else check_on(engine.model)

    def check(folder: Path, content: Content) -> None:
        if generating is None or reads(folder):
            reading.check(folder, content)
        else:
            generating(folder, content)

    return check
