"""The settings of a run: what decides its result, told apart from what does not.

The hash of the former is the run's identity: the same output with the same settings is resumed, with others
refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import BadOption, TrainingFailed, UnknownName, UnknownOption, nearest
from veneer.training._offload import OFFLOADS
from veneer.training._schedule import check_schedule

SILENT = (
    "evaluate_batch_size",
    "save_every",
    "frozen_prefix",
    "frozen_prefix_bytes",
    "offload_optimizer",
)  # change nothing of the result

FROZEN_PREFIX = ("memory", "memory-float16", "disk", "disk-float16", "off")


@dataclass(frozen=True)
class Settings:
    """batch_size: rows of a step; accumulate: into how many parts they are cut (the same result, less memory).
    max_tokens: real ones, without padding. max_seconds: of the steps themselves; such a run repeats only roughly.
    base_dropout: whether the base drops what it does in training; a cohort has it off. frozen_prefix: what the base
    computes below the lowest edit is kept over the epochs in "memory" or on "disk", up to frozen_prefix_bytes, in
    full or ("memory-float16", "disk-float16") half precision, or not ("off"). Never where the base draws at random.
    flat: no padding is computed, where that was seen to be exact. offload_optimizer: between steps the optimiser's
    state lies in the processor's memory ("cpu") or in a mapped file ("disk"), or stays ("off").
    """

    learning_rate: float | None = None
    epochs: float = 3
    max_steps: int | None = None
    max_tokens: int | None = None
    max_seconds: float | None = None
    batch_size: int = 16
    accumulate: int = 1
    seed: int = 0
    weight_decay: float = 0.01
    warmup: float = 0.06
    schedule: str = "linear"
    clip: float | None = 1.0
    base_dropout: bool = True
    frozen_prefix: str = "memory"
    frozen_prefix_bytes: int = 2**30
    offload_optimizer: str = "off"
    flat: bool = True
    gradient_checkpointing: bool = False
    mixed_precision: str | None = None
    early_stopping: int | None = None
    evaluate_every: int | None = None
    save_every: int | None = None
    evaluate_batch_size: int = 64
    evaluate_on: tuple[str, ...] = ("validation",)
    identity: Mapping[str, Any] = field(default_factory=dict)  # method, data, base, task

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        for name, least in (
            ("epochs", 0),
            ("batch_size", 1),
            ("accumulate", 1),
            ("warmup", 0),
            ("weight_decay", 0),
        ):
            _at_least(name, getattr(self, name), least)
        ends = [n for n in ("max_steps", "max_tokens", "max_seconds") if getattr(self, n) is not None]
        if len(ends) > 1:
            raise BadOption(f"{' and '.join(ends)} are both given; give one.", next_step=f"{ends[0]}= alone")
        if self.max_seconds is not None and not 0 < self.max_seconds < float("inf"):
            raise BadOption(
                f"max_seconds={self.max_seconds!r} should be above 0.", next_step="max_seconds=600"
            )
        for name in ("max_steps", "max_tokens", "early_stopping", "evaluate_every", "save_every"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 0 if name == "max_steps" else 1)
        if not isinstance(self.flat, bool):
            raise BadOption(
                f"flat={self.flat!r} should be true or false.",
                next_step="flat=False computes padding, or leave it out",
            )
        if not isinstance(self.base_dropout, bool):
            raise BadOption(
                f"base_dropout={self.base_dropout!r} should be true or false.",
                next_step="base_dropout=False, or leave it out: the base drops what it does in training",
            )
        if self.frozen_prefix not in FROZEN_PREFIX:
            raise UnknownName(
                f"frozen_prefix={self.frozen_prefix!r} is no way to keep states.",
                nearest=FROZEN_PREFIX,
                next_step="frozen_prefix= one of these, or leave it out",
            )
        if self.offload_optimizer not in OFFLOADS:
            raise UnknownName(
                f"offload_optimizer={self.offload_optimizer!r} is no place for an optimiser's state.",
                nearest=OFFLOADS,
                next_step="offload_optimizer= one of these, or leave it out",
            )
        if self.mixed_precision not in (None, "no", "fp16", "bf16"):
            raise BadOption(
                f"mixed_precision={self.mixed_precision!r} is not one that can be used.",
                nearest=("bf16", "fp16"),
                next_step="mixed_precision='bf16', 'fp16' or None",
            )
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise BadOption(
                f"learning_rate={self.learning_rate!r} should be above 0.",
                next_step="learning_rate=None takes the method's own",
            )

    def decides(self) -> dict[str, Any]:
        """What the result depends on, as JSON holds it."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in SILENT}
        return json.loads(json.dumps(found, default=str))

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.decides(), sort_keys=True).encode()).hexdigest()[:16]


def _at_least(name: str, value: Any, least: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= least:
        raise BadOption(
            f"{name}={value!r} should be a number that is at least {least}.",
            next_step=f"{name}={max(1, least)}, or leave it out for the default",
        )


def check_options(options: Mapping[str, Any], also: tuple[str, ...] = ()) -> None:
    """UnknownOption with the nearest names for what no setting is called."""
    known = [*(f.name for f in dataclasses.fields(Settings) if f.name != "identity"), *also]
    for name in options:
        if name not in known:
            raise UnknownOption(
                f"train has no option {name!r}.",
                nearest=nearest(name, known),
                next_step="options of the method go into method_options={...}, or into the arm: lora:rank=16",
            )


def hold_same(saved: Mapping[str, Any], settings: Settings, folder: str) -> None:
    """An error that names what differs, when a folder holds a run of other settings."""
    before, now = dict(_flat(saved)), dict(_flat(settings.decides()))
    for name in (
        now.keys() - before.keys()
    ):  # a setting that came after the run was begun had its default then
        default = getattr(Settings, name, None)
        before |= {} if default is None else {name: default}
    unlike = [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
    if unlike:
        shown = "; ".join(f"{n}: {before.get(n)!r} there, {now.get(n)!r} now" for n in unlike[:6])
        raise TrainingFailed(
            f"{folder} holds a run of other settings ({shown}).",
            next_step="another output, or delete the folder, or give the settings that it was begun with",
        )


def _flat(value: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, inner in value.items():
        name = f"{path}.{key}" if path else key
        found += _flat(inner, name) if isinstance(inner, Mapping) else [(name, inner)]
    return found
