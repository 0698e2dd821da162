"""Tasks: what rows become, what is minimised, what is predicted, and how well.

Public: `find_task`, `make_task`, `task_from_dict`, `TASKS`, `Task`, `Batch`, `Encoded`, and `metrics` with
`METRICS`, `find_metric`. A task is a small value that an adapter's folder holds.
"""

from veneer.tasks import _answer, _image, _language, _seq2seq, _tag, _text  # noqa: F401  (they enter their tasks)
from veneer.tasks._collate import IGNORED, forward_names, positions, takes, wants_positions
from veneer.tasks._language import shown
from veneer.tasks._task import (
    TASKS,
    Batch,
    Encoded,
    Task,
    find_task,
    make_task,
    task,
    task_from_dict,
)
from veneer.tasks.metrics import METRICS, Metric, find_metric, metric

__all__ = [
    "IGNORED",
    "METRICS",
    "TASKS",
    "Batch",
    "Encoded",
    "Metric",
    "Task",
    "find_metric",
    "find_task",
    "forward_names",
    "make_task",
    "metric",
    "positions",
    "shown",
    "takes",
    "task",
    "task_from_dict",
    "wants_positions",
]
