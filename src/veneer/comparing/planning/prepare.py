"""From what a person asks to a design that can be shown, hashed and run: nothing is trained here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.comparing.inference.claims import check_claim
from veneer.comparing.planning.arms import ANCHOR, OPTIONAL_CONTROLS, Arm, parse_arm, parse_arms, split_arms
from veneer.comparing.planning.budget import parse_budget
from veneer.comparing.planning.controls import parse_controls, with_controls
from veneer.comparing.planning.design import Comparison, choose_seeds
from veneer.comparing.planning.forecast import Forecast, forecast
from veneer.comparing.planning.match import matched, parse_tolerance
from veneer.comparing.planning.measure import Measured, from_ledger, measure
from veneer.comparing.planning.rates import grids
from veneer.comparing.running.ledger import Ledger
from veneer.comparing.running.runs import RunArm
from veneer.errors import BadOption

DEMO_TRIALS, TRIALS = 3, 7


@dataclass
class Prepared:
    """A design, the trainer that runs it, and the fields of the comparison file that says it again."""

    design: Comparison
    run_arm: RunArm
    fields: Mapping[str, Any] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)
    notes: Sequence[str] = ()

    def measure(self, output: str | Path | None = None) -> Prepared:
        """What the runs cost: from those that have ended in `output`, else from a few timed steps."""
        lines = Ledger(output).of_kind("run") if output and (Path(output) / "ledger.jsonl").is_file() else []
        found = from_ledger(self.design, lines)
        if hasattr(self.run_arm, "open_base"):
            found = measure(self.run_arm, self.design.parsed_arms, found)
        self.measured = found or Measured()
        return self

    @property
    def forecast(self) -> Forecast:
        known = self.measured
        return forecast(
            self.design,
            self.design.sizes,
            known.seconds,
            time_from=known.how,
            memory=known.memory,
            done=known.done,
        )

    def to_dict(self) -> dict[str, Any]:
        expected = self.forecast
        return {
            "sha256": self.design.sha256,
            "design": self.design.to_dict(),
            "forecast": expected.to_dict(),
            "said": str(expected),
            "parameters": dict(self.measured.parameters),
            "cannot": dict(self.measured.cannot),
        }

    def __str__(self) -> str:
        design = self.design
        sizes = ", ".join(f"{count} {split}" for split, count in design.sizes.items())
        lines = [
            f"design {design.sha256}",
            f"base     {design.model}",
            f"data     {design.data}" + (f" ({sizes})" if sizes else ""),
            *(f"         {note}" for note in self.notes),
            f"metric   {design.metric} ({'higher' if design.higher_is_better else 'lower'} is better)",
            f"budget   {parse_budget(design.budget).label}",
            f"seeds    {_listed(design.seeds)}; rates are tried on {_listed(design.tuning_seeds)}"
            + (", halved from rung to rung" if design.halving else ""),
        ]
        for arm in design.arms:
            said = [arm]
            if arm in design.matched:
                said.append(f"parameters {design.matched[arm]['said']}")
            elif arm in self.measured.parameters:
                said.append(f"{self.measured.parameters[arm]:,} trained, the head apart")
            if arm in design.rates:
                said.append(f"rates {_listed(design.rates[arm])}")
            if arm in self.measured.cannot:
                said.append(f"not applicable: {self.measured.cannot[arm]}")
            lines.append("arm      " + "; ".join(said))
        lines += [f"contrast {first} - {second}" for first, second in design.contrasts]
        return "\n".join([*lines, "", str(self.forecast)])


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def prepare(
    model: Any = None,
    data: Any = None,
    methods: str | Iterable[str | Arm] = (),
    *,
    task: str | None = None,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    budget: str = "published",
    seeds: int | Sequence[int] = 6,
    tuning_seeds: int | Sequence[int] = (0,),
    trials: int | None = None,
    extend_rates: int | None = None,
    halving: bool = False,
    rates: Mapping[str, Sequence[float]] | None = None,
    contrasts: Sequence[tuple[str, str]] = (),
    correction: str = "holm",
    smallest_effect: float = 0.01,
    near_duplicates: float | None = None,
    controls: str | Iterable[str] | None = None,
    match_parameters: str | float | None = None,
    match_to: int | None = None,
    claim: Mapping[str, Any] | None = None,
    sizes: Any = None,
    run_arm: RunArm | None = None,
    known_methods: Iterable[str] | None = None,
    known_recipes: Iterable[str] | None = None,
    families: Mapping[str, str] | None = None,
    data_sha256: str = "",
    **options: Any,
) -> Prepared:
    """The design of a comparison; the arguments are those of `compare`.

    Reads the data where `run_arm` is None. Errors: those of names, options and data.
    """
    methods = methods if isinstance(methods, str) else list(methods)
    given = {
        "model": model, "data": data, "methods": methods, "task": task, "metric": metric, "budget": str(budget),
        "seeds": seeds, "tuning_seeds": tuning_seeds, "trials": trials, "extend_rates": extend_rates, "rates": rates,
        "halving": halving or None, "contrasts": contrasts,
        "correction": correction, "smallest_effect": smallest_effect, "claim": claim,
        "near_duplicates": near_duplicates,
        "controls": controls if controls is None or isinstance(controls, str) else list(controls) or "none",
        "match_parameters": match_parameters, "match_to": match_to,
        "sizes": sizes if run_arm is None else None, **options,
    }  # fmt: skip
    if claim and "rule" in claim:
        check_claim(claim)
    ranges: Mapping[str, tuple[float, float]] = {}
    reading: Mapping[str, Any] = {}
    runner = None
    if run_arm is None:
        from veneer.comparing.running.runner import default_runner

        if sizes is not None:
            options["sizes"] = sizes
        if near_duplicates is not None:
            options["near_duplicates"] = near_duplicates
        run_arm = runner = default_runner(
            model, data, task=task, budget=parse_budget(budget), options=options
        )
        sizes, options, reading = runner.sizes, runner.options, runner.reading
        data_sha256, ranges, families = runner.data_sha256, runner.ranges, runner.families
        known_methods, known_recipes = runner.families, runner.recipes
        task, metric = runner.data.task, metric or runner.task.primary_metric
        if higher_is_better is None:
            from veneer.tasks import find_metric

            higher_is_better = find_metric(metric).greater_is_better
    if halving and not hasattr(run_arm, "shared"):
        raise BadOption(
            "halving needs a trainer that takes a share of the budget; this comparison has one of its own.",
            next_step="leave halving out, or give the trainer `shared(share)` and run_arm(..., share=)",
        )
    is_demo = parse_budget(budget).kind == "demo"
    arms = parse_arms(methods, known_methods, known_recipes, families)
    wanted = parse_controls(controls) if runner is not None or controls is not None else ()
    arms = with_controls(arms, wanted, anchored=ANCHOR in (known_methods or ()) or bool(wanted))
    if runner is not None:
        for arm in arms:
            runner.check(arm)
    pairs = [(parse_arm(first), parse_arm(second)) for first, second in contrasts]
    matches: dict[str, Any] = {}
    if match_parameters is not None or match_to is not None:
        arms, pairs, matches = _matched(runner, arms, pairs, match_parameters or "2%", match_to)
    if claim and "rule" in claim:
        check_claim(claim, [str(arm) for arm in arms])
    count = trials or (DEMO_TRIALS if is_demo else TRIALS)
    design = Comparison(
        model=name_of(model),
        data=name_of(data),
        arms=tuple(str(arm) for arm in arms),
        rates=grids(arms, count, rates, ranges, families),
        task=task,
        metric=metric or "accuracy",
        higher_is_better=True if higher_is_better is None else higher_is_better,
        budget=str(parse_budget(budget)),
        seeds=choose_seeds(seeds),
        tuning_seeds=choose_seeds(tuning_seeds, first=0),
        extension=(0 if is_demo else 2) if extend_rates is None else extend_rates,
        contrasts=tuple((str(first), str(second)) for first, second in pairs),
        correction=correction,
        smallest_effect=smallest_effect,
        data_sha256=data_sha256,
        sizes=dict(sizes or {}),
        options=options,
        reading=reading,
        claim=dict(claim or {}),
        near_duplicates=runner.near.to_dict() if runner is not None else {},
        beyond=run_arm.beyond.to_dict() if hasattr(run_arm, "beyond") else {},
        match_parameters="" if not matches else str(match_parameters or "2%"),
        matched=matches,
        halving=halving,
    )
    notes = (str(runner.near),) if runner is not None else ()
    return Prepared(design, run_arm, _writable(given), notes=notes)


Pairs = list[tuple[Arm, Arm]]


def _matched(
    runner: Any, arms: Sequence[Arm], pairs: Pairs, tolerance: str | float, target: int | None
) -> tuple[tuple[Arm, ...], Pairs, dict[str, Any]]:
    """Arms and planned pairs in the sizes that were chosen, and what is to be said of each arm."""
    if runner is None:
        raise BadOption(
            "match_parameters needs a base to count on; this comparison has a trainer of its own.",
            next_step="give every arm its size: lora:rank=8",
        )
    ordinary = [arm for arm in arms if arm.method not in OPTIONAL_CONTROLS]
    found = matched(ordinary, runner.count, parse_tolerance(tolerance), target)
    runner.close_base()
    sizes = {arm: sized for arm, (sized, _) in found.items()}

    def sized(arm: Arm) -> Arm:
        if arm.method in OPTIONAL_CONTROLS:
            return sizes.get(arm.anchor, arm.anchor).as_control(arm.method)
        return sizes.get(arm, arm)

    said = {str(match.arm): match.to_dict() for _, match in found.values()}
    return tuple(map(sized, arms)), [(sized(first), sized(second)) for first, second in pairs], said


def _writable(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a comparison file can say of the arguments: objects in memory, and what was left out, it cannot."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("model", "data"):
            value = str(value) if isinstance(value, str | Path) else None
        elif name == "methods":
            value = split_arms(value) if isinstance(value, str) else [str(one) for one in value]
        if value is not None and value != () and value != {} and value != []:
            found[name] = value
    return found


def name_of(thing: Any) -> str:
    """How a model or data set is written in the design: its name, its path, or its class."""
    if thing is None or isinstance(thing, str | Path):
        return str(thing or "")
    return str(getattr(thing, "name", "") or getattr(thing, "spec", "") or type(thing).__name__)
