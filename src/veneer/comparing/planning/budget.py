"""What every arm may use of training: equal examples, tokens or time, as it is written and as it is said."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.errors import BadOption, UnknownName, nearest

DEMO = "demonstration budget: a screen, no claims"
BUDGET_KINDS = ("published", "demo", "examples", "tokens", "minutes")


@dataclass(frozen=True)
class Budget:
    """What every arm may use. `minutes` is the equal-time kind; all others are equal trained tokens."""

    kind: str = "published"
    amount: float | None = None

    def __str__(self) -> str:
        return self.kind if self.amount is None else f"{self.kind}={self.amount:.12g}"

    @property
    def label(self) -> str:
        if self.kind == "demo":
            return DEMO
        if self.kind == "minutes":
            return f"equal time: {self.amount:g} minutes of training steps for every run, on the same machine"
        if self.kind == "published":
            return "as published: every arm sees the same examples, in the same order, equally often"
        kind = "real (unpadded) tokens" if self.kind == "tokens" else self.kind
        return f"equal {self.kind}: {self.amount:,.0f} {kind} trained on by every run"


def parse_budget(text: str | Budget) -> Budget:
    """`"demo"`, `"published"`, `"examples=20000"`, `"tokens=1e6"`, `"minutes=5"` -> Budget."""
    if isinstance(text, Budget):
        return text
    kind, equals, amount = text.partition("=")
    kind = kind.strip()
    if kind not in BUDGET_KINDS:
        raise UnknownName(
            f"no budget is called '{kind}'.",
            nearest=nearest(kind, BUDGET_KINDS) or BUDGET_KINDS,
            next_step="--budget examples=20000, tokens=1000000, minutes=5, demo or published",
        )
    needs_amount = kind in ("examples", "tokens", "minutes")
    try:
        number = float(amount) if equals else None
    except ValueError:
        number = -1.0
    if needs_amount != (number is not None) or (number is not None and number <= 0):
        expected = "a positive number after '='" if needs_amount else "no number"
        raise BadOption(
            f"the budget '{text}' cannot be read: '{kind}' takes {expected}.",
            next_step="--budget examples=20000, tokens=1000000, minutes=5, demo or published",
        )
    return Budget(kind, number)
