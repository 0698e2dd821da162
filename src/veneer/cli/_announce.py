"""What `veneer train` says before it starts: a hook of training that looks and changes nothing."""

from __future__ import annotations

import math
from typing import Any

from veneer.cli._common import STATE, human, note
from veneer.cli._table import cut, facts, terminal_width
from veneer.training import Progress

SHOWN_ROWS = 3
OPEN, SHUT = "«", "»"  # around what is trained on, in rows of conversations


class Gather(Progress):
    """Passes everything on to another listener; keeps the notes that come before the first step."""

    def __init__(self, other: Progress) -> None:
        self.other, self.notes, self.started = other, [], False  # type: ignore[var-annotated]

    def begin(self, total: int, done: int = 0) -> None:
        self.started = True
        self.other.begin(total, done)

    def step(self, step: int, loss: float, rate: float, tokens_per_second: float) -> None:
        self.other.step(step, loss, rate, tokens_per_second)

    def note(self, text: str) -> None:
        if self.started:
            self.other.note(text)
        else:
            self.notes.append(text.removeprefix("note: "))

    def evaluated(self, step: int, split: str, metrics: dict[str, float]) -> None:
        self.other.evaluated(step, split, metrics)

    def end(self) -> None:
        self.other.end()


class Announce:
    """Prints the facts of a run when it is about to begin, and remembers what the last words need."""

    def __init__(self, splits: Any, model: str, rate_given: bool, gathered: Gather) -> None:
        self.splits, self.model, self.rate_given, self.gathered = splits, model, rate_given, gathered
        self.can_merge = False
        self.shown = False

    def phases(self, run: Any) -> tuple[()]:
        """Called once, before the first step."""
        if not self.shown:
            self.shown = True
            self.can_merge = _can_merge(run.model)
            if not STATE.quiet:
                note(facts(self.pairs(run)))
                if any("labels" in f for f in run.rows[:1]) and run.task.name in ("instruct", "lm"):
                    note("\n".join(trained_parts(run)))
                note("")
        return ()

    def pairs(self, run: Any) -> list[tuple[str, str]]:
        from veneer import engine

        (adapter,) = (
            a for a in engine.adapters(run.model).values() if a.name in engine.host_of(run.model).active
        )
        total = sum(p.numel() for n, p in run.model.named_parameters() if not n.startswith("veneer."))
        trained = sum(p.numel() for p in run.subject.parameters())
        s = run.settings
        length = max(f["length"] for f in run.rows)
        needed = adapter.plan.memory(batch_size=math.ceil(s.batch_size / s.accumulate), length=length)
        tokens = sum(f["length"] for f in run.rows)
        passes = run.total_steps / run.steps_an_epoch
        labels = cut(", ".join(run.task.labels), 60)
        fresh = ", ".join(adapter.plan.whole)
        sites = sum(sp.part >= 0 for sp in adapter.plan.sites)
        return [
            ("base", f"{self.model} ({type(run.model).__name__}, {total:,} parameters, {run.device!s})"),
            ("task", run.task.name + (f", {len(run.task.labels)} labels: {labels}" if labels else "")),
            ("data", data_line(self.splits)),
            ("head", f"fresh, trained whole and saved in the adapter: {fresh}" if fresh else "the base's own"),
            ("method", f"{adapter.method} at {sites} sites"),
            ("trained", f"{trained:,} parameters ({100 * trained / max(1, total):.3g} % of the base's)"),
            ("rate", f"{run.learning_rate:.3g}, {self.source(run, adapter)}; {s.schedule} schedule"),
            ("steps", f"{run.total_steps:,} of {s.batch_size} rows: {passes:.3g} passes, "
                      f"about {passes * tokens:,.0f} tokens"),
            ("memory", f"at least {human(needed['total'])} at the longest batch of {length} tokens"),
            *(("note", text) for text in self.gathered.notes),
        ]  # fmt: skip

    def source(self, run: Any, adapter: Any) -> str:
        """Where the learning rate is from."""
        if self.rate_given:
            return "as given"
        of_recipe = getattr(run.recipe, "rates", None)
        low, high = of_recipe or adapter.method.facts.rates
        return f"from the {'recipe' if of_recipe else 'method'}'s range {low:g} to {high:g}"


def data_line(splits: Any) -> str:
    counts = ", ".join(f"{name} {len(rows):,}" for name, rows in splits.parts.items())
    report = splits.report
    aside = (
        f"; {report.set_aside:,} bad rows set aside"
        if report is not None and report.set_aside
        else "; nothing wrong found"
    )
    notes = "".join(f"\n{text}" for text in (report.notes if report is not None else ()))
    return f"{splits.spec}: {counts}{aside}{notes}"


def trained_parts(run: Any, width: int | None = None) -> list[str]:
    """How many tokens are trained on, and three rows as the model reads them, with those tokens marked."""
    features = run.rows
    trained = sum(sum(y != -100 for y in f["labels"]) for f in features)
    tokens = sum(f["length"] for f in features)
    lines = ["", f"{trained:,} of {tokens:,} tokens are trained on, marked {OPEN}so{SHUT} in the first rows:"]
    for feature in features[:SHOWN_ROWS]:
        text = marked(feature, run.feeder).replace("\n", "⏎")
        room = 3 * (width or terminal_width()) - 6
        if len(text) > room and OPEN in text:  # keep the place where the trained part begins in sight
            at = max(0, text.index(OPEN) - room // 2)
            text = ("…" if at else "") + text[at:]
        lines.append("  " + cut(text, room))
    return lines


def marked(feature: dict[str, Any], tokenizer: Any) -> str:
    """The decoded row, with marks around every run of trained tokens."""
    pieces: list[tuple[bool, list[int]]] = []
    for token, label in zip(feature["input_ids"], feature["labels"]):
        is_trained = label != -100
        if not pieces or pieces[-1][0] != is_trained:
            pieces.append((is_trained, []))
        pieces[-1][1].append(token)
    texts = (
        (is_trained, tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for is_trained, ids in pieces
    )
    return "".join(f"{OPEN}{text}{SHUT}" if is_trained else text for is_trained, text in texts)


def _can_merge(model: Any) -> bool:
    from veneer import engine

    return all(not engine.why_not(a) for a in engine.adapters(model).values())
