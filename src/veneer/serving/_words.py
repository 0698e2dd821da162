"""The tokenizer's side of serving: text to token ids and back, from any thread, and what ends a text."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from veneer.errors import Unsupported


class Words:
    """tokenizer: None for a base that is asked with token ids alone."""

    def __init__(self, tokenizer: Any, model: nn.Module) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # a fast tokenizer may not be asked by two threads at once
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocabulary = int(getattr(text, "vocab_size", 0) or 0) or 1 << 31
        self.positions: int | None = getattr(text, "max_position_embeddings", None)
        self.eos = _ends(getattr(model, "generation_config", None), config, tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with what the tokenizer puts before it."""
        tokenizer = self._need()
        with self._lock:
            return list(tokenizer(text)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation, by the model's own template. options: for the template."""
        tokenizer = self._need()
        if getattr(tokenizer, "chat_template", None) is None and "chat_template" not in options:
            raise Unsupported(
                "this base has no chat template, so messages cannot be put to it.",
                next_step="give a text, or chat_template=",
            )
        options.setdefault("add_generation_prompt", True)
        with self._lock:
            made = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=True, **options)
        return list(made["input_ids"] if isinstance(made, Mapping) or hasattr(made, "keys") else made)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens and without tidying of spaces."""
        tokenizer = self._need()
        with self._lock:
            return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _need(self) -> Any:
        if self.tokenizer is None:
            raise Unsupported(
                "this engine has no tokenizer.", next_step="give token ids, or Engine(model, tokenizer)"
            )
        return self.tokenizer


def _ends(*places: Any) -> frozenset[int]:
    """Tokens that end a text: the generation's, else the config's, else the tokenizer's."""
    for place in places:
        found = getattr(place, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
