"""What a design will cost and what it will be able to find, said before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from veneer.comparing.inference.statistics import Spread, sign_flip_can_decide, smallest_for
from veneer.comparing.planning.design import Comparison
from veneer.comparing.planning.halving import trials_of


@dataclass(frozen=True)
class Assumed:
    """Variances that are assumed before anything is known, for a paired difference of two arms.

    seed_deviation: standard deviation over seeds. disagreement: share of items on which two runs differ (the
    variance of an item's difference). persistent: share of it that is the same for all seeds.
    """

    seed_deviation: float = 0.01
    disagreement: float = 0.10
    persistent: float = 0.5


def smallest_findable(
    seeds: int,
    items: int,
    contrasts: int = 1,
    assumed: Assumed | None = None,
    power: float = 0.8,
    level: float = 0.05,
) -> float:
    """The difference that is found with probability `power` at `level`, corrected for `contrasts`.

    By the crossed interval of `statistics`, for the variances that are assumed.
    """
    assumed = assumed or Assumed()
    rest = assumed.disagreement * (1 - assumed.persistent) / (seeds * items)
    expected = Spread(
        0.0,
        assumed.seed_deviation**2 / seeds + rest,
        assumed.disagreement * assumed.persistent / items + rest,
        rest,
        max(1.0, seeds - 1.0),
        max(1.0, items - 1.0),
    )
    return smallest_for(expected, contrasts, power, level)


@dataclass(frozen=True)
class Forecast:
    """What a design costs and what it can find, said before it runs."""

    tuning_runs: int
    confirming_runs: int
    seconds: float | None
    time_from: str
    memory: tuple[int, str] | None
    done: int
    validation_items: int | None
    test_items: int | None
    smallest_findable: float | None
    smallest_effect: float
    contrasts: int
    assumed: Assumed
    sign_flip_decides: bool

    @property
    def runs(self) -> int:
        return self.tuning_runs + self.confirming_runs

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"runs": self.runs}

    def __str__(self) -> str:
        how = f" ({self.time_from})" if self.time_from else ""
        left = " left" if self.done else ""
        time = "" if self.seconds is None else f", about {duration(self.seconds)}{left}"
        done = f", {self.done} of them done" if self.done else ""
        lines = [
            f"{self.runs} runs: {self.tuning_runs} for learning rates, "
            f"{self.confirming_runs} to confirm{done}{time}"
        ]
        if self.seconds is not None and how:
            lines[0] += how
        elif how:
            lines.append(f"time is {self.time_from}")
        if self.memory is not None:
            size, arm = self.memory
            text = f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
            lines.append(f"memory of a step: about {text} at most ({arm})")
        if self.smallest_findable is not None:
            found = self.smallest_findable
            several = "1 contrast" if self.contrasts == 1 else f"{self.contrasts} corrected contrasts"
            points = "none" if found >= 1 else f"{100 * found:.1f} points"
            lines.append(
                f"smallest effect it can find (power 0.8, {several}, {self.test_items} test items): "
                f"{points}, if runs of one arm differ by "
                f"{100 * self.assumed.seed_deviation:g} points and two arms disagree on "
                f"{100 * self.assumed.disagreement:g} % of items"
            )
            if self.smallest_findable > self.smallest_effect:
                lines.append(
                    f"  more than the {100 * self.smallest_effect:g} points that would matter: "
                    "'not separable' will not mean 'equal'"
                )
        if self.validation_items is not None and self.validation_items < 500:
            error = 100 * (0.25 / self.validation_items) ** 0.5
            lines.append(
                f"rates are chosen on {self.validation_items} validation items "
                f"(standard error up to {error:.1f} points)"
            )
        return "\n".join(lines)


def forecast(
    design: Comparison,
    sizes: Mapping[str, int] | None = None,
    seconds: Mapping[str, float] | None = None,
    assumed: Assumed | None = None,
    *,
    time_from: str = "",
    memory: tuple[int, str] | None = None,
    done: Mapping[str, int] | None = None,
) -> Forecast:
    """Runs, time and the smallest effect, from the design and, where known, the sizes of the splits.

    seconds: of one run, by arm. memory: bytes of the largest step, and its arm. done: runs that have ended, by arm.
    """
    sizes, assumed, done = sizes or {}, assumed or Assumed(), done or {}
    trained = sum(arm.is_trained for arm in design.parsed_arms)
    ladders = {arm: trials_of(len(rates), design.halving) for arm, rates in design.rates.items()}
    trials = sum(size for ladder in ladders.values() for size, _ in ladder) * len(design.tuning_seeds)
    shares = {arm: sum(size * share for size, share in ladder) for arm, ladder in ladders.items()}
    runs, left = {}, {}  # by arm: as many as whole ones, and the part of them that has not ended
    for arm in (str(arm) for arm in design.parsed_arms if arm.is_trained):
        runs[arm] = shares.get(arm, 0) * len(design.tuning_seeds) + len(design.seeds)
        count = sum(size for size, _ in ladders.get(arm, ())) * len(design.tuning_seeds) + len(design.seeds)
        left[arm] = max(0.0, 1 - done.get(arm, 0) / count)
    contrasts = len(design.contrasts) or len(design.arms) - 1
    test = sizes.get("test")
    return Forecast(
        tuning_runs=trials,
        confirming_runs=trained * len(design.seeds) + len(design.arms) - trained,
        seconds=sum(count * left[arm] * seconds.get(arm, 0.0) for arm, count in runs.items())
        if seconds
        else None,
        time_from=time_from,
        memory=memory,
        done=sum(done.values()),
        validation_items=sizes.get("validation"),
        test_items=test,
        smallest_findable=smallest_findable(len(design.seeds), test, contrasts, assumed) if test else None,
        smallest_effect=design.smallest_effect,
        contrasts=contrasts,
        assumed=assumed,
        sign_flip_decides=sign_flip_can_decide(len(design.seeds), contrasts),
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
