"""What `veneer compare` prints of a finished comparison, and the card of its winner."""

from __future__ import annotations

from typing import Any

from veneer.cli._common import note


def finish(found: Any) -> None:
    """The card of the winner."""
    from veneer.cli._card import write_card

    if found.best_folder is not None and (found.best_folder / "veneer.json").is_file():
        write_card(found.best_folder)
    else:
        note("note: the winner has no adapter to keep")


def text_of(found: Any, width: int) -> str:
    """The conclusion, the table as wide as the terminal, and where the report is."""
    import textwrap

    from veneer.cli._table import table
    from veneer.comparing.reporting.words import Scale, bytes_text, count, p_text, seconds_text

    summary = found.to_dict()
    scale = Scale(summary["analysed"], 1.0 if summary["higher_is_better"] else -1.0, summary["in_percent"])
    recommended = summary["recommendation"]["arm"]
    rows = [
        (
            arm["arm"] + (" *" if arm["arm"] == recommended else ""),
            scale.value(arm["mean"]),
            f"{scale.value(arm['low'])} to {scale.value(arm['high'])}",
            "yes" if arm["tied_with_best"] else "no",
            p_text(arm["p_adjusted"]),
            count(arm["trainable_parameters"]),
            bytes_text(arm["bytes_on_disk"]),
            seconds_text(arm["step_seconds"]),
        )
        for arm in summary["arms"]
    ]
    head = ("arm", scale.unit, "95 % interval", "tied", "p", "trained", "on disk", "step")
    lines = [
        *textwrap.wrap(found.sentence, width),
        "",
        table(head, rows, width=width, drop=("on disk", "p", "step", "tied", "trained"), right=head[1:]),
        "",
        *textwrap.wrap("* the cheapest arm that cannot be told apart from the best; tied: not separable from the best; "
                       "p: of being the best, corrected for all arms", width, subsequent_indent="  "),
    ]  # fmt: skip
    for other in summary["not_measured"]:
        status, reason = other["status"].replace("_", " "), other["reason"].rstrip(".")
        lines += textwrap.wrap(f"{other['arm']}: {status} ({reason})", width, subsequent_indent="  ")
    for told in summary.get("claims", ()):
        lines += textwrap.wrap(f"{told['id']}: {told['says']}", width, subsequent_indent="  ")
        lines += textwrap.wrap(f"{told['verdict']}: {told['because']}", width, subsequent_indent="  ")
    if summary["claim"]:
        lines.append(summary["claim"])
    lines += ["", f"report: {found.report}"]
    if found.best_folder is not None:
        lines.append(f"winner: {found.best_folder}")
    return "\n".join(lines)
