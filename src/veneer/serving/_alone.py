"""A row with a cache of its own, as `generate` would run it: for methods and bases that slots cannot hold.

Methods that keep a history or make conditions from their input; bases whose layers or masks are of other kinds,
encoder-decoders, and bases without any cache, which read everything again for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.engine import begin, going_on, host_of, within
from veneer.errors import Unsupported


class Alone:
    """One prompt and what was said behind it. `read` once, then `say` for each token."""

    def __init__(self, model: nn.Module, name: str | None) -> None:
        self.model, self.name = model, name
        self.device = host_of(model).device
        self.two_stacks = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.prompt: list[int] = []
        self.said: list[int] = []
        self.session: Any = None
        self.cache: Any = None
        self.given: dict[str, Any] = {}  # with every call: what an encoder made
        self.length = 0  # tokens in the cache, added ones included

    def read(self, prompt: Sequence[int]) -> Tensor:
        """(vocabulary,): logits of the first token of the answer."""
        self.prompt = list(prompt)
        ids = torch.tensor([self.prompt], device=self.device)
        self.session, inputs = begin(
            self.model, [self.name], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        )
        self.length = inputs["attention_mask"].shape[1]
        if self.two_stacks:
            encoder: Any = self.model.get_encoder()  # type: ignore[operator]
            with within(self.session):
                self.given = {
                    "encoder_outputs": encoder(**inputs),
                    "attention_mask": inputs["attention_mask"],
                }
            return self._call({"decoder_input_ids": torch.tensor([[self._start()]], device=self.device)})
        return self._call(inputs)

    def say(self, token: int) -> Tensor:
        """Logits of what follows `token`."""
        self.said.append(token)
        self.length += 1
        ids = torch.tensor([[token]], device=self.device)
        if self.two_stacks:
            if self.cache is None:
                ids = torch.tensor([[self._start(), *self.said]], device=self.device)
            return self._call({"decoder_input_ids": ids})
        if self.cache is not None:
            mask = torch.ones(1, self.length, dtype=torch.long, device=self.device)
            return self._call({"input_ids": ids, "attention_mask": mask})
        ids = torch.tensor([[*self.prompt, *self.said]], device=self.device)
        inputs: dict[str, Any] = {"input_ids": ids}
        if self.name is not None:
            inputs["prompt_mask"] = (torch.arange(ids.shape[1], device=self.device) < len(self.prompt))[None]
        self.session = going_on(self.model, [self.name], False)
        return self._call(inputs)

    @torch.no_grad()
    def _call(self, inputs: dict[str, Any]) -> Tensor:
        more = {} if self.cache is None else {"past_key_values": self.cache}
        with within(self.session):
            out = self.model(**self.given, **inputs, **more, use_cache=True)
        self.cache = out.get("past_key_values")
        return out.logits[0, -1]

    def _start(self) -> int:
        for place in (getattr(self.model, "generation_config", None), getattr(self.model, "config", None)):
            for key in ("decoder_start_token_id", "bos_token_id"):
                found = getattr(place, key, None)
                if found is not None:
                    return int(found)
        raise Unsupported(
            f"this {type(self.model).__name__} names no token with which its answers begin.",
            next_step="set generation_config.decoder_start_token_id",
        )
