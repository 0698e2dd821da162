"""What tests of the engine share: tiny bases, folders of randomised adapters, and each adapter's own answer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
import transformers as t

import veneer
from engine_tools import add
from veneer.serving import Event, Request, Sampling

WORDS = 97
COMMON = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip


def model(family: str = "llama", words: int = WORDS) -> Any:
    """A tiny causal base; logits far enough apart that the likeliest token is never in doubt."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "llama":
            made: Any = t.LlamaForCausalLM(
                t.LlamaConfig(**{**COMMON, "vocab_size": words}, num_key_value_heads=2)
            )
        elif family == "qwen3":
            made = t.Qwen3ForCausalLM(t.Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=8))
        elif family == "gpt2":
            config = t.GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1,
                                  eos_token_id=2)  # fmt: skip
            made = t.GPT2LMHeadModel(config)
        else:
            raise KeyError(family)
        for p in made.parameters():
            if p.dim() > 1:
                p.data.normal_(0, 0.3)
    return made.eval()


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes, so that characters and stop texts lie over borders of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return t.PreTrainedTokenizerFast(tokenizer_object=made)


def folders(family: str, methods: dict[str, Any], where: Path) -> dict[str, Path]:
    """{name: folder} of randomised adapters. methods: name -> key, or (key, options)."""
    base = model(family)
    made = {}
    for i, (name, what) in enumerate(methods.items()):
        key, options = what if isinstance(what, tuple) else (what, {})
        add(base, key, name, seed=i, size=0.3, **options)
        made[name] = veneer.save(base, name, where / name)
        veneer.detach(base, name)
    return made


class Alone:
    """Each adapter's answers by itself, through `generate` on a base of its own."""

    def __init__(self, family: str, folders: dict[str, Path]) -> None:
        self.model, self.folders = model(family), folders

    def __call__(self, prompt: list[int], name: str | None, count: int) -> list[int]:
        if name is not None and name not in veneer.adapters(self.model):
            veneer.load(self.model, self.folders[name], name=name, activate=False)
        ids = torch.tensor([prompt])
        more = {} if name is None else {"adapters": [name]}
        if name is None and not veneer.adapters(self.model):
            out = self.model.generate(
                ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        else:
            more = {"adapters": [name]}
            out = self.model.generate(
                ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, **more
            )
        return out[0, len(prompt) :].tolist()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(
            3, WORDS, (2 + int(torch.randint(0, 14, (), generator=generator)),), generator=generator
        ).tolist()
        for _ in range(count)
    ]


class Inbox:
    """A sink that keeps what it gets, call by call."""

    def __init__(self) -> None:
        self.calls: list[list[Event]] = []
        self.by_id: dict[str, list[Event]] = {}
        self.news = threading.Condition()

    def __call__(self, events: list[Event]) -> None:
        with self.news:
            self.calls.append(events)
            for event in events:
                self.by_id.setdefault(event.id, []).append(event)
            self.news.notify_all()

    def last(self, request: Request, timeout: float = 30) -> Event:
        def there() -> bool:
            found = self.by_id.get(request.id)
            return bool(found and found[-1].finish)

        with self.news:
            assert self.news.wait_for(there, timeout), "no finish came"
        return self.by_id[request.id][-1]

    def tokens(self, request: Request) -> list[int]:
        self.last(request)
        return [t for event in self.by_id[request.id] for t in event.tokens]


def ask(
    prompt: list[int], version: str | None = None, count: int = 8, key: str = "", **options: Any
) -> Request:
    """A greedy request that says `count` tokens, unless told otherwise."""
    options.setdefault("ignore_eos", True)
    return Request(tuple(prompt), Sampling(max_tokens=count, **options), version, key)
