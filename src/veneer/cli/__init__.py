"""The command line: one thin file a command, found by its name and imported when it is typed.

`python -m veneer.cli.demo` and `python -m veneer.cli.docs` are what `make demo` and `make docs` run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `veneer ARGUMENTS` (default: those of the process) and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):  # the page needs no library at all
        from veneer.cli._page import print_page

        print_page()
        sys.exit(0)
    try:
        from veneer.cli._app import app
    except ImportError as error:
        print(
            f"MissingPackage: the command line needs the package '{error.name}', which is not installed.\n"
            "  next:    pip install 'veneer[train]'",
            file=sys.stderr,
        )
        sys.exit(1)
    app(args=given, prog_name="veneer")
