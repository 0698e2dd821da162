"""`veneer compare --from`, `--across`, `--decide`: results that are there already, of others or of several runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.cli._common import note, result
from veneer.errors import BadOption


def analyse_files(given: Mapping[str, Any], contrasts: list[tuple[str, str]]) -> Any:
    """The analysis of the files that --from names. given: the parameters of `veneer compare`."""
    from veneer.comparing import from_results

    if given["model"] or given["data"] or given["methods"]:
        raise BadOption(
            "--from analyses results that are there; --model, --data and --methods make new ones.",
            next_step="give the one or the other",
        )
    return from_results(
        given["from_file"],
        output=given["output"],
        metric=given["metric"],
        higher_is_better=False if given["lower_is_better"] else None,
        columns=_columns(given["columns"]),
        items=given["items"],
        contrasts=contrasts,
        correction=given["correction"],
        smallest_effect=given["smallest_effect"],
    )


def put_together(folders: list[str], output: str | None) -> None:
    """What several finished comparisons say together; across.json in `output`, where that is given."""
    from veneer.comparing import across

    found = across(folders)
    result(found)
    if output is not None:
        from veneer.comparing.reporting.across_page import write_across

        note(f"written: {found.write(output)} and {write_across(found.to_dict(), output)}")


def decide_folder(folder: str) -> None:
    """The verdict on the claim of a finished comparison; claim.json in its folder."""
    import json
    from pathlib import Path

    from veneer.comparing import decide
    from veneer.comparing.running.ledger import write_atomic

    found = decide(folder)
    write_atomic(
        Path(folder) / "claim.json", json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n"
    )
    result(found)


def _columns(text: str | None) -> dict[str, str]:
    pairs = [part.partition("=") for part in (text or "").split(",") if part.strip()]
    for role, _, column in pairs:
        if not column.strip():
            raise BadOption(
                f"--columns: '{role.strip()}' names no column.", next_step="arm=model,score=correct"
            )
    return {role.strip(): column.strip() for role, _, column in pairs}
