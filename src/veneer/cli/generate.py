"""`veneer generate`: text behind a prompt, as it is said."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from veneer.cli._common import STATE, AsJson, Debug, Device, Dtype, Matmul, Quiet, Seed, result, still

EXAMPLES = (
    'veneer generate --adapter runs/two "Write a line about rain."',
    'veneer generate --adapter runs/two "Once" --max-new-tokens 40 --temperature 0.8 --seed 3 --json',
)


def generate(
    prompt: Annotated[str, typer.Argument(help="a text to answer or to go on from; - reads it")],
    adapter: Annotated[str, typer.Option("--adapter", help="a folder that train wrote")],
    max_new_tokens: Annotated[int, typer.Option(help="tokens at most")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(help="of the likeliest tokens, this much probability")] = 1.0,
    top_k: Annotated[int, typer.Option(help="of the likeliest tokens, so many; 0: all")] = 0,
    chat: Annotated[
        bool | None, typer.Option("--chat/--plain", help="through the chat template, or as it is")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="another place of the base")] = None,
    task: Annotated[str | None, typer.Option(help="for folders that name no task: lm, instruct")] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    matmul: Matmul = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Text behind a prompt, streamed as it is said."""
    from veneer.training import Predictor
    from veneer.training import generate as run_generation

    still()
    opened = Predictor.open(adapter, model=model, task=task, device=device, dtype=dtype, matmul=matmul)
    asked = sys.stdin.read() if prompt == "-" else prompt

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    text = run_generation(
        opened, asked, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, chat=chat,
        seed=seed, on_text=None if STATE.stdout is not None else write,
    )  # fmt: skip
    if STATE.stdout is not None:
        result({"adapter": adapter, "prompt": asked, "text": text})
    else:
        print()
