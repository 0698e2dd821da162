"""What the owner of a server decides: limits, strictness, what is logged. Plain data with safe defaults."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Sizes are bytes, times are seconds. `None` for a limit per key means that there is none."""

    served_name: str | None = None  # how clients name the base; None: its own name, of a folder the last part
    also_named: tuple[str, ...] = ()  # what clients may call it too; never sent back
    strict: bool = False  # unknown fields are refused, not passed over
    log_prompts: bool = False  # prompts and answers are written to the log
    vllm_names: bool = False  # metrics under vLLM's names too
    max_body: int = 4 * MIB
    max_upload: int = 2048 * MIB  # of an adapter's archive
    body_seconds: float = 30.0  # until a body has arrived whole, and a second more for each MiB
    max_rows: int = 128  # prompts times n of one request
    in_flight: int | None = None  # requests of one key at a time
    tokens_per_minute: int | None = None  # of one key, prompt and answer together
    metric_labels: int = 50  # adapters with labels of their own; the others are "other"
    drain_seconds: float = 30.0  # that running requests have to finish after SIGTERM
    allow_origins: tuple[str, ...] = ()  # pages of other sites that may call from a browser
    hosts: tuple[str, ...] | None = ("localhost", "127.0.0.1", "::1")  # accepted as Host; None: any
