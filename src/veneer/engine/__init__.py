"""The engine: attach, banks, rows, merge, save and load. The only room that touches modules; it names no method."""

from . import _attention, _blocks, _door, _site  # noqa: F401  (they register what generated classes add)
from ._adapter import Adapter
from ._api import activate, active, adapters, bare, rows
from ._attach import attach, detach, host_of, plan, read, relayout
from ._begin import begin, going_on, within
from ._cohort import alone, draws, is_still, put_draws, random_places, require_gradients, without_dropout
from ._draws import dropout_seeds
from ._fingerprint import fingerprint
from ._flat_calls import flat_tokens, why_not_flat
from ._host import Host
from ._joined import why_not_joined
from ._memory import MemoryUse, memory_budget
from ._merge import MergeReport, merge, unmerge, why_not
from ._plan import Plan
from ._prefix import Prefix, frozen_prefix, playing, record_prefix
from ._statistics import Batches
from ._store import (
    FORMATS,
    Read,
    check_folder,
    export,
    folder_of,
    load,
    read_adapter,
    read_record,
    read_tensors,
    register_format,
    save,
)
from ._swap import plain_class, rebase
from ._training import (
    Run,
    between_steps,
    check_gradients,
    parameters,
    penalty,
    prepare_training,
    restore,
    state,
    trainable,
)
from ._tuning import FormTable, tune_forms
from ._watch import facts_read

__all__ = [
    "FORMATS",
    "Adapter",
    "Batches",
    "FormTable",
    "Host",
    "MemoryUse",
    "MergeReport",
    "Plan",
    "Prefix",
    "Read",
    "Run",
    "activate",
    "active",
    "adapters",
    "alone",
    "attach",
    "bare",
    "begin",
    "between_steps",
    "check_folder",
    "check_gradients",
    "detach",
    "draws",
    "dropout_seeds",
    "export",
    "facts_read",
    "fingerprint",
    "flat_tokens",
    "folder_of",
    "frozen_prefix",
    "going_on",
    "host_of",
    "is_still",
    "load",
    "memory_budget",
    "merge",
    "parameters",
    "penalty",
    "plain_class",
    "plan",
    "playing",
    "prepare_training",
    "put_draws",
    "random_places",
    "read",
    "read_adapter",
    "read_record",
    "read_tensors",
    "rebase",
    "record_prefix",
    "register_format",
    "relayout",
    "require_gradients",
    "restore",
    "rows",
    "save",
    "state",
    "trainable",
    "tune_forms",
    "unmerge",
    "why_not",
    "why_not_flat",
    "why_not_joined",
    "within",
    "without_dropout",
]
