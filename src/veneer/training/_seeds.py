"""Seeds: everything random comes from the run's seed, a word and a number, never from what ran before.

A run that was killed and resumed draws at step k what the run that was not killed drew at step k.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived(seed: int, *parts: str | int) -> int:
    """A seed of 63 bits from a seed and what it is for; unlike parts give unrelated seeds."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_all(seed: int, *parts: str | int) -> None:
    """Seed torch (all devices), random, and numpy where it is loaded."""
    value = derived(seed, *parts)
    torch.manual_seed(value)
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value % 2**32)


def generator(seed: int, *parts: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derived(seed, *parts))


@contextmanager
def own_randomness() -> Iterator[None]:
    """Gives the caller's random states back as they were."""
    python_state = random.getstate()
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy_random is not None:
                numpy_random.set_state(numpy_state)
