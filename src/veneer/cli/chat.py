"""`veneer chat`: a conversation with an adapter."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from veneer.cli._common import Debug, Device, Dtype, Matmul, Quiet, Seed, note, still

EXAMPLES = (
    "veneer chat --adapter runs/two",
    'veneer chat --adapter runs/two --system "Answer in one sentence."',
)
WORDS = "/again forgets what was said, /quit or Ctrl-D ends"


def chat(
    adapter: Annotated[str, typer.Option("--adapter", help="a folder that train wrote")],
    system: Annotated[str | None, typer.Option(help="what the model is told first")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens of an answer at most")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(help="of the likeliest tokens, this much probability")] = 1.0,
    model: Annotated[str | None, typer.Option("--model", help="another place of the base")] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    matmul: Matmul = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """A conversation with an adapter; it remembers what was said. Lines on standard input work too."""
    from veneer.training import Chat

    still()
    opening = {"model": model, "device": device, "dtype": dtype, "matmul": matmul}
    talk = Chat(adapter, system=system, **opening)
    is_person = sys.stdin.isatty()
    if is_person:
        note(WORDS)
    while (said := _line(is_person)) is not None:
        if said in ("/quit", "/exit"):
            break
        if said == "/again":
            talk.messages = talk.messages[:1] if system is not None else []
            note("forgotten")
        elif said:
            talk.say(
                said,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                on_text=_write,
            )
            print()


def _line(is_person: bool) -> str | None:
    """What the person says; None at the end."""
    if not is_person:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
