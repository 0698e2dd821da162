"""Adapters of any method behind one running base: the engine, the registry of versions, and the server over both."""

from __future__ import annotations

from ._both import ReadingOnly, check_for, open_engines
from ._engine import Engine
from ._jobs import FineTuning, Wish
from ._jobs_files import Files, TrainingFile
from ._reading import ReadingEngine
from ._reading_rows import Found
from ._registry import Registry
from ._registry_check import check_on
from ._registry_engine import Engines, gone_from, ready_on
from ._registry_jobs import Job, JobEvent, Jobs
from ._registry_rows import Move, Version
from ._request import (
    Answer,
    Event,
    Finish,
    Logprob,
    PromptTooLong,
    QueueFull,
    Request,
    Sampling,
    UnknownVersion,
)
from ._watch import Watcher

__all__ = [
    "Answer",
    "Engine",
    "Engines",
    "Event",
    "Files",
    "FineTuning",
    "Finish",
    "Found",
    "Job",
    "JobEvent",
    "Jobs",
    "Logprob",
    "Move",
    "PromptTooLong",
    "QueueFull",
    "ReadingEngine",
    "ReadingOnly",
    "Registry",
    "Request",
    "Sampling",
    "TrainingFile",
    "UnknownVersion",
    "Version",
    "Watcher",
    "Wish",
    "check_for",
    "check_on",
    "gone_from",
    "open_engines",
    "ready_on",
]
