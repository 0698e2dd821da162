"""Text from a decoder with an adapter: at once, in pieces as it is said, or in a conversation."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from veneer.errors import BadOption, Unsupported
from veneer.tasks._chat import Message, encode_prompt
from veneer.training._predict import Predictor
from veneer.training._seeds import own_randomness, seed_all


def generate(
    adapter: str | Path | Predictor,
    prompt: str | list[Message],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    chat: bool | None = None,
    on_text: Callable[[str], Any] | None = None,
    **opening: Any,
) -> str:
    """What the model says behind the prompt.

    adapter: a folder, or an open `Predictor`. prompt: a text or messages. temperature 0 takes the likeliest
    token; above, tokens are drawn from the seed. chat: through the chat template (None: where the adapter
    was trained on conversations, or the prompt is messages). on_text: is given every piece as it is said.
    """
    opened = adapter if isinstance(adapter, Predictor) else Predictor.open(adapter, **opening)
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise BadOption(
            f"temperature={temperature!r}, top_p={top_p!r}, max_new_tokens={max_new_tokens!r}: expected "
            "at least 0, above 0 and up to 1, at least 1.",
            next_step="temperature=0.7, top_p=0.9, max_new_tokens=256",
        )
    ids = _prompt_ids(opened, prompt, chat)
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    inputs = torch.tensor([ids], device=opened.device)
    streamer = _streamer(opened.feeder, on_text) if on_text is not None else None
    opened.model.eval()
    with own_randomness(), torch.no_grad():
        seed_all(seed, "generate")
        out = opened.model.generate(  # type: ignore[operator]
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens,
            streamer=streamer, pad_token_id=opened.feeder.pad_token_id, **drawn,
        )  # fmt: skip
    return opened.feeder.decode(out[0, len(ids) :], skip_special_tokens=True)


def stream(adapter: str | Path | Predictor, prompt: str | list[Message], **options: Any) -> Iterator[str]:
    """The pieces of `generate` as they are said; an error of the model is raised here."""
    pieces: queue.Queue[Any] = queue.Queue()

    def work() -> None:
        try:
            generate(adapter, prompt, on_text=pieces.put, **options)
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    threading.Thread(target=work, daemon=True).start()
    while (piece := pieces.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        yield piece


class Chat:
    """A conversation: `say` answers, and remembers what was said."""

    def __init__(self, adapter: str | Path | Predictor, *, system: str | None = None, **opening: Any) -> None:
        self.predictor = adapter if isinstance(adapter, Predictor) else Predictor.open(adapter, **opening)
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def say(self, text: str, **options: Any) -> str:
        """The answer to `text`; options are those of `generate`. An answer that failed is not remembered."""
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = generate(self.predictor, asked, **options)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer


def _prompt_ids(opened: Predictor, prompt: str | list[Message], chat: bool | None) -> list[int]:
    if (
        opened.feeder is None
        or not hasattr(opened.model, "generate")
        or opened.task.head != "AutoModelForCausalLM"
    ):
        raise Unsupported(
            f"an adapter of the task {opened.task.name!r} does not write text from a prompt.",
            next_step="veneer predict reads it; generate needs an adapter of the tasks lm or instruct",
        )
    if isinstance(prompt, list):
        return encode_prompt(opened.feeder, prompt)
    if chat or (chat is None and opened.task.name == "instruct"):
        return encode_prompt(opened.feeder, [{"role": "user", "content": prompt}])
    ids = opened.feeder(prompt)["input_ids"]
    eos = opened.feeder.eos_token_id
    ids = ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids
    if not ids:
        raise BadOption("the prompt is empty.", next_step="give some words to go on from")
    return ids


def _streamer(tokenizer: Any, on_text: Callable[[str], Any]) -> Any:
    """transformers' streamer of whole words, to a function in place of the standard output."""
    from transformers import TextStreamer

    class ToFunction(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return ToFunction(tokenizer, skip_prompt=True, skip_special_tokens=True)
