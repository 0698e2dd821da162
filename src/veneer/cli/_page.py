"""The page that `veneer --help` prints: every command with its line, then two real examples.

It imports nothing, so that it is there at once.
"""

from __future__ import annotations

import shutil
import sys
import textwrap

COMMANDS = {
    "methods": "the catalogue; one method's equation, paper, defaults",
    "anatomy": "the roles found in a model: every place an edit can sit",
    "plan": "sites, parameters, bytes and memory before anything runs",
    "check": "what is in some data and what is wrong with it",
    "train": "one adapter, with its head; the same command resumes",
    "compare": "several methods alike: one table, intervals, a report",
    "predict": "labels, tags or texts from an adapter's folder",
    "generate": "text behind a prompt, as it is said",
    "chat": "a conversation with an adapter",
    "serve": "many adapters on one base, behind OpenAI's routes",
    "merge": "base and adapter as one plain model",
    "export": "an adapter in another program's format",
    "laws": "run the laws that methods promise to hold",
    "bench": "side by side with HF PEFT: speed and memory",
    "doctor": "versions, devices, threads, and what is missing",
}
EXAMPLES = (
    "veneer methods loreft",
    "veneer compare --model builtin:minilm --data reviews.csv --methods lora,vera,loreft --seeds 6 --output runs/which",
)


def page(width: int) -> str:
    """The page for a terminal of so many columns."""
    wide = max(map(len, COMMANDS))
    lines = ["usage: veneer COMMAND ...", ""]
    for name, about in COMMANDS.items():
        hanging = " " * (wide + 4)
        lines += textwrap.wrap(about, width, initial_indent=f"  {name:<{wide}}  ", subsequent_indent=hanging)
    lines += ["", "veneer COMMAND --help shows the options of one command.", "", "examples:"]
    for example in EXAMPLES:
        lines += folded(example, width)
    return "\n".join(lines)


def folded(command: str, width: int) -> list[str]:
    """A command on lines of at most `width`, broken as a shell accepts it."""
    lines = textwrap.wrap(
        command, width - 2, initial_indent="  ", subsequent_indent="    ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return [line + " \\" for line in lines[:-1]] + lines[-1:]


def print_page() -> None:
    print(page(min(100, shutil.get_terminal_size().columns)), file=sys.stdout)
