"""`veneer compare --self-test`: the statistics, tried on scores whose truth is known."""

from __future__ import annotations

import typer

from veneer.cli._common import note, result


def run_self_test() -> None:
    """Print what was measured; exit status 1 where a bound is broken."""
    from veneer.comparing import self_test

    note("simulating comparisons (about two minutes)")
    found = self_test()
    result(found)
    if not found.passed:
        raise typer.Exit(1)
