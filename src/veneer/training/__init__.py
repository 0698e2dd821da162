"""Training: one loop, checkpoints that survive a kill, evaluation, and prediction from an adapter's folder.

Public: `train`, `TrainResult`, `Hooks`, `Phase`, `Run`, `Settings`, `Subject`, `TrainingProgress`.
"""

from veneer.training._loop import Run
from veneer.training._progress import Progress as TrainingProgress
from veneer.training._result import TrainResult
from veneer.training._settings import Settings
from veneer.training._subject import Adapted, Subject
from veneer.training._train import train
from veneer.training.hooks import Hooks, Phase

__all__ = [
    "Adapted",
    "Hooks",
    "Phase",
    "Run",
    "Settings",
    "Subject",
    "TrainResult",
    "TrainingProgress",
    "train",
]
