"""Tables of the report as data, and those about the arms: results, differences, fronts, costs, tuning.

A row may name an arm: the page then filters and lights it together with the arm's marks in the charts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.comparing.inference.tuning import Tuned
from veneer.comparing.planning.forecast import duration
from veneer.comparing.reporting.published import Published
from veneer.comparing.reporting.words import Scale, bytes_text, count, p_text, seconds_text

SYMBOLS = {"recommended": "◆", "tied": "●", "worse": "○"}


@dataclass(frozen=True)
class Column:
    """is_text: words, aligned to the left. is_minor: hidden on narrow screens until it is asked for."""

    title: str
    is_text: bool = False
    is_minor: bool = False
    falls: bool = False  # the first click sorts downwards


@dataclass(frozen=True)
class Cell:
    """text as shown; order as sorted ("" is last); extra: what a narrow screen leaves out."""

    text: str
    order: Any = ""
    is_dim: bool = False
    extra: str = ""


@dataclass(frozen=True)
class Row:
    name: str
    cells: Sequence[Cell]
    arm: str = ""
    kind: str = ""

    @property
    def symbol(self) -> str:
        return SYMBOLS.get(self.kind, "")


@dataclass(frozen=True)
class Table:
    """columns: the first is of the rows' names."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row] = field(default_factory=tuple)

    @property
    def wide(self) -> int:
        """Columns that a narrow screen shows beside the name."""
        return min(4, max(1, sum(not column.is_minor for column in self.columns[1:])))


def number(value: float | None, text: Callable[[Any], str], is_dim: bool = False) -> Cell:
    """A cell that sorts by its number; one that was not measured is a dash, and last."""
    return Cell("–", "", is_dim) if value is None else Cell(text(value), value, is_dim)


def kind_of(page: Published, name: str) -> str:
    if name == page.chosen:
        return "recommended"
    arm = next((arm for arm in page.arms if arm["arm"] == name), None)
    return "" if arm is None else "tied" if arm["tied_with_best"] else "worse"


def signed(value: float, scale: Scale) -> str:
    text = f"{100 * value:+.1f}" if scale.is_share else f"{value:+.3g}"
    return text.replace("-", "−")


def arms_table(page: Published) -> Table:
    scale, s = page.scale, page.summary
    other = "" if s["analysed"] == s["metric"] else s["metric"]
    columns = [
        Column("Arm", True),
        Column("Mean", falls=True),
        Column("95 % interval", falls=True),
        *([Column(other, is_minor=True, falls=True)] if other else []),
        Column("Trained"),
        Column("Verdict", True),
        Column("p (is best)", is_minor=True, falls=True),
        Column("Front", is_minor=True, falls=True),
        Column("Spread of seeds", is_minor=True),
    ]
    rows = []
    for arm in page.arms:
        cells = [
            number(arm["mean"], scale.value),
            Cell(f"{scale.value(arm['low'])} to {scale.value(arm['high'])}", arm["low"], True),
            *([number(arm["metric_mean"], lambda value: f"{value:.4g}")] if other else []),
            number(arm["trainable_parameters"], count),
            Cell("tied" if arm["tied_with_best"] else "worse", "tied" if arm["tied_with_best"] else "worse"),
            number(arm["p_adjusted"], p_text),
            number(arm["front_probability"], lambda value: f"{value:.2f}"),
            number(arm["seed_deviation"], lambda value: scale.size(value).removesuffix(" points")),
        ]
        rows.append(Row(arm["arm"], cells, arm["arm"], kind_of(page, arm["arm"])))
    unit = scale.unit[0].upper() + scale.unit[1:]
    over = "seeds and items" if s["items"] else "runs"
    return Table(f"{unit}: mean over {over} with 95 % intervals", columns, rows)


def contrasts_table(page: Published) -> Table:
    scale, s = page.scale, page.summary
    decides = all(contrast["sign_flip_can_decide"] for contrast in s["contrasts"])
    columns = [
        Column("Difference", True),
        Column("Points" if scale.is_share else "Size", falls=True),
        Column("95 % interval"),
        Column("p, corrected"),
        Column("Sign-flip p" + ("" if decides else " (cannot decide)"), is_minor=True),
    ]
    rows = []
    for one in s["contrasts"]:
        interval = f"{signed(one['low'], scale)} to {signed(one['high'], scale)}"
        cells = [
            number(one["difference"], lambda value: signed(value, scale)),
            Cell(interval, one["difference"], True),
            number(one["p_adjusted"], p_text),
            number(one["sign_flip_p"], p_text, is_dim=True),
        ]
        rows.append(Row(f"{one['first']} − {one['second']}", cells, one["second"]))
    over = "the same seeds and items" if s["items"] else "runs"
    return Table(f"Differences of means over {over}", columns, rows)


def controls_table(page: Published) -> Table | None:
    """Arms whose result was known beforehand: what was expected, what was found, and whether that is as it should."""
    found = page.summary.get("controls") or []
    if not found:
        return None
    columns = [
        Column("Control", True),
        Column("Expected", True),
        Column("Found", True),
        Column("Difference", is_minor=True, falls=True),
        Column("As expected", True),
    ]
    rows = []
    for one in found:
        gap = one.get("difference")
        cell = Cell("–")
        if gap is not None:
            bounds = f"({signed(one['low'], page.scale)} to {signed(one['high'], page.scale)})"
            cell = Cell(signed(gap, page.scale), gap, extra=bounds)
        verdict = {True: "yes", False: "NO", None: "cannot be said"}[one["behaved"]]
        cells = [
            Cell(one["expected"], one["expected"]),
            Cell(one["said"], one["said"]),
            cell,
            Cell(verdict, verdict),
        ]
        rows.append(Row(one["arm"], cells, one["arm"], kind_of(page, one["arm"])))
    return Table("Controls: the other arm less the control", columns, rows)


def sensitivity_table(page: Published, found: Sequence[Tuned], text: Callable[[float], str]) -> Table:
    """text: a value of the metric."""
    columns = [
        Column("Arm", True),
        Column("Rate"),
        Column("Validation", falls=True),
        Column("Lost beside it", falls=True),
        Column("Range", is_minor=True, falls=True),
        Column("At the edge", True),
        Column("Trials", is_minor=True),
        Column("Diverged", is_minor=True, falls=True),
    ]
    rows = []
    for one in found:
        known = [value for value in one.means.values() if value is not None]
        edge = "yes" if one.at_edge else "no"
        cells = [
            number(one.chosen, lambda value: f"{value:.3g}"),
            number(one.means[one.chosen], text),
            number(one.neighbour_loss, text),
            number(max(known) - min(known) if known else None, text),
            Cell(edge, edge),
            number(one.trials, str),
            number(one.diverged, str),
        ]
        rows.append(Row(one.arm, cells, one.arm, kind_of(page, one.arm)))
    return Table("The chosen rate among those tried", columns, rows)


CostColumn = tuple[str, str, Callable[[Any], str], bool]

OF_TRAINING: tuple[CostColumn, ...] = (
    ("trainable_parameters", "Trained", count, False),
    ("bytes_on_disk", "Stored", bytes_text, False),
    ("step_seconds", "Step", seconds_text, False),
    ("peak_memory_bytes", "Memory", bytes_text, False),
    ("cpu_seconds", "CPU a step", seconds_text, True),
    ("tokens_per_second", "Tokens/s", count, True),
    ("flops_per_step", "FLOPs a step", count, True),
    ("energy_joules", "Energy a step, J", lambda value: f"{value:.3g}", True),
    ("tuning_seconds", "Tuning", duration, True),
)
OF_USE: tuple[CostColumn, ...] = (
    ("runs_in_bytes", "Trains in", bytes_text, False),
    ("latency_seconds", "Latency", seconds_text, False),
    ("merged_latency_seconds", "Merged", seconds_text, False),
    ("items_per_second", "Items/s", count, True),
)


ALONE = ("peak_memory_bytes", "step_seconds", "tokens_per_second")


def costs_of(page: Published) -> dict[str, dict[str, Any]]:
    """{arm: what is known of its costs}: measured apart where that was done, else by the training workers.

    Where some arms were measured apart, what the workers say of the others is another quantity, and left out.
    """
    section = page.summary.get("costs") or {}
    found = {}
    for arm in page.arms:
        apart = section.get("arms", {}).get(arm["arm"], {})
        known = {**arm, **{key: value for key, value in apart.items() if value is not None}}
        if section.get("measured") and apart.get("status") != "measured":
            known |= dict.fromkeys(ALONE)
        found[arm["arm"]] = known
    return found


def costs_tables(page: Published, costs: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """What training takes and, where it was measured, what using it takes."""
    tuned = {name: {"tuning_seconds": page.tuning_seconds(name), **cost} for name, cost in costs.items()}
    if not page.made_here:  # nothing was tuned here
        tuned = {name: {**cost, "tuning_seconds": None} for name, cost in tuned.items()}
    found = [
        _costs_table(page, tuned, "What training takes", OF_TRAINING),
        _costs_table(page, tuned, "What fits and how fast it answers", OF_USE),
    ]
    return [table for table in found if len(table.columns) > 1]


def _costs_table(
    page: Published, costs: Mapping[str, Mapping[str, Any]], caption: str, known: Sequence[CostColumn]
) -> Table:
    shown = [column for column in known if any(cost.get(column[0]) is not None for cost in costs.values())]
    rows = [
        Row(name, [_cost(cost, key, text) for key, _, text, _ in shown], name, kind_of(page, name))
        for name, cost in costs.items()
    ]
    columns = [Column(title, is_minor=minor, falls=title.endswith("/s")) for _, title, _, minor in shown]
    return Table(caption, [Column("Arm", True), *columns], rows)


def _cost(cost: Mapping[str, Any], key: str, text: Callable[[Any], str]) -> Cell:
    """A cost, with its quartiles where there are any: 136 ms (132-145)."""
    cell = number(cost.get(key), text)
    low, high = cost.get(f"{key}_low"), cost.get(f"{key}_high")
    if low is None or high is None or text(low) == text(high):
        return cell
    unit = cell.text.partition(" ")[2]
    least, most = (text(value).removesuffix(" " + unit) for value in (low, high))
    return Cell(cell.text, cell.order, extra=f"({least}–{most})")
