"""Training: one loop, cohorts of adapters, checkpoints that survive a kill, evaluation, and prediction from a folder.

Public: `train` and `TrainResult`; `Cohort`, `train_cohort` and `read_cohort` for several adapters at once;
`predict`, `evaluate`, `generate`, `stream`, `Chat` and the `Predictor` that they open; `Hooks`, `Phase` and `Run`
for those that take part in training; `Sliced`, a run that another loop takes further, with what `wanted` read, and
`SlicedCohort`, several of them side by side;
`Callback` for transformers' Trainer; `Job`, which reads an arm; `progress_for`, which chooses who is told how far a
run is.
"""

from typing import Any

from veneer.training._generate import Chat, generate, stream
from veneer.training._job import Job
from veneer.training._loop import Run
from veneer.training._predict import Evaluation, Predictor, evaluate, predict
from veneer.training._progress import Progress, progress_for
from veneer.training._result import TrainResult
from veneer.training._settings import Settings
from veneer.training._sliced import Slice, Sliced
from veneer.training._subject import Adapted, Subject
from veneer.training._train import train
from veneer.training._wanted import Wanted, wanted
from veneer.training.cohorts.cohort import Cohort
from veneer.training.cohorts.file import read_cohort
from veneer.training.cohorts.rounds import CohortResult
from veneer.training.cohorts.sliced import SlicedCohort
from veneer.training.cohorts.train import train_cohort
from veneer.training.hooks import Hooks, Phase

__all__ = [
    "Adapted",
    "Callback",
    "Chat",
    "Cohort",
    "CohortResult",
    "Evaluation",
    "Hooks",
    "Job",
    "Phase",
    "Predictor",
    "Progress",
    "Run",
    "Settings",
    "Slice",
    "Sliced",
    "SlicedCohort",
    "Subject",
    "TrainResult",
    "Wanted",
    "evaluate",
    "generate",
    "predict",
    "progress_for",
    "read_cohort",
    "stream",
    "train",
    "train_cohort",
    "wanted",
]


def __getattr__(name: str) -> Any:
    """`Callback` is a class of transformers', which is imported when it is asked for."""
    if name == "Callback":
        from veneer.training.hf import Callback

        return Callback
    raise AttributeError(f"module 'veneer.training' has no attribute {name!r}")
