"""`train_cohort`: what `train` does, for several adapters over one base that is opened once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.errors import BadOption, UnknownOption, nearest
from veneer.training import _open
from veneer.training._progress import Progress
from veneer.training._settings import Settings
from veneer.training._wanted import BESIDE, Wanted, wanted
from veneer.training.cohorts.progress import listeners
from veneer.training.cohorts.rounds import CohortResult, Rounds

OPTIONS = (
    "data", "method", "recipe", "task_options", "whole", "members", "hooks", *(n for n in BESIDE if n != "device"),
    *(n for n in Settings.__dataclass_fields__ if n != "identity"),
)  # fmt: skip


def train_cohort(
    members: Mapping[str, Mapping[str, Any]],
    *,
    model: Any,
    output: str | Path | None = None,
    tokenizer: Any = None,
    dtype: Any = None,
    quantise: str | None = None,
    matmul: str | None = None,
    device: Any = None,
    progress: bool | Progress | Callable[[str], Progress] = True,
    on_round: Callable[[Rounds], None] | None = None,
    **options: Any,
) -> CohortResult:
    """Train several adapters together: one forward and one backward of the base serve all of them.

    members: {name: options}, each with the options of `train` (method, data, recipe, task, whole, hooks, and every
    setting). options: the same, for members that have none of their own; mixed_precision and gradient_checkpointing
    are for all. output: a folder; each member's own is in it by its name, and is what `train` would have made: either
    goes on with what the other began (`base_dropout=False`). on_round is called between rounds, with the rounds, whose
    `join(name, wanted)` lets others in. Members whose heads differ in shape are trained in groups, one after the other.
    A member that fails stops alone; see `.failed`. Raises BadOption, UnknownOption, and what opening the base raises.
    """
    if not members:
        raise BadOption("a cohort without members.", next_step='{"first": {"method": "lora", "data": ...}}')
    read: dict[Any, Any] = {}
    failed: dict[str, Exception] = {}
    plans = {
        name: wanted_member(
            name, own, options, model, output, read, dtype=dtype, quantise=quantise, matmul=matmul
        )
        for name, own in members.items()
    }
    listener = listeners(progress)
    result = CohortResult(failed=failed)
    for group in _by_head(plans):
        first = next(iter(group.values()))

        def opened(seed: int, first: Wanted = first) -> Any:
            return _open.open_model(
                model,
                first.task,
                tokenizer=tokenizer,
                seed=seed,
                dtype=dtype,
                quantise=quantise,
                matmul=matmul,
            )

        base = opened(first.settings.seed)
        heads = Heads(base, opened) if isinstance(model, (str, Path)) else None
        with Rounds(
            base, device, mixed_precision=first.settings.mixed_precision, heads=heads, listener=listener,
            gradient_checkpointing=first.settings.gradient_checkpointing, keep=not isinstance(model, (str, Path)),
        ) as rounds:  # fmt: skip
            rounds.result = result
            for name, made in group.items():
                rounds.join(name, made)
            while rounds.round():
                if on_round is not None:
                    on_round(rounds)
    return result


def wanted_member(
    name: str, own: Mapping[str, Any], options: Mapping[str, Any], model: Any, output: Any, read: dict[Any, Any],
    **opens: Any,
) -> Wanted:  # fmt: skip
    """A member's options over those for all, as `train` would have them. read: rows that were read before."""
    for where, given in ((f"member '{name}'", own), ("a cohort", options)):
        for option in given:
            if option not in OPTIONS:
                raise UnknownOption(
                    f"{where} has no option {option!r}.", nearest=nearest(option, OPTIONS),
                    next_step="options of the method go into its arm: method = \"lora:rank=16\"",
                )  # fmt: skip
    for option in ("mixed_precision", "gradient_checkpointing"):
        if own.get(option) not in (None, options.get(option)):
            raise BadOption(
                f"member '{name}' has {option} = {own[option]!r}, which is one for a cohort.",
                next_step="give it beside the model",
            )
    made = {"output": _folder(output, name), "base_dropout": False, **options, **own}
    if made.get("data") is None:
        raise BadOption(f"member '{name}' has no data.", next_step='data = "rows.csv", for it or for all')
    _read_once(made, read)
    return wanted(model=model, **opens, **made)


def _folder(output: str | Path | None, name: str) -> Path | None:
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise BadOption(f"{name!r} names a member and its folder.", next_step="a name without a slash")
    return None if output is None else Path(output).expanduser() / name


def _read_once(given: dict[str, Any], read: dict[Any, Any]) -> None:
    """Rows that several members name are read once, and shared."""
    data = given["data"]
    key = (
        data if isinstance(data, str | Path) else id(data),
        given.get("task"),
        repr(given.get("data_options")),
    )
    if key not in read:
        read[key] = _open.open_rows(data, given.get("task"), **(given.get("data_options") or {}))
    given["data"] = read[key]


def _by_head(plans: Mapping[str, Wanted]) -> list[dict[str, Wanted]]:
    """Members whose tasks open one and the same model."""
    found: dict[Any, dict[str, Wanted]] = {}
    for name, made in plans.items():
        found.setdefault((made.task.name, made.task.num_labels), {})[name] = made
    return list(found.values())


class Heads:
    """What a base has where no file filled it, by the seed that it is opened with: as for a run by itself."""

    def __init__(self, base: Any, opened: Callable[[int], Any]) -> None:
        self.fresh, self.opened = list(base.fresh), opened
        self.known: dict[int, dict[str, Tensor]] = {}

    def __call__(self, seed: int) -> dict[str, Tensor]:
        if not self.fresh:
            return {}
        if seed not in self.known:
            values = dict(self.opened(seed).model.named_parameters())
            self.known[seed] = {n: values[n].detach().clone() for n in self.fresh if n in values}
        return self.known[seed]
