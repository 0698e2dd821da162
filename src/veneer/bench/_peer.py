"""The HF PEFT side: its adapters on a base of their own, and the same tensors brought over through its folders."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import veneer
from veneer.errors import missing_package

VERSION = "0.21.2"


def peft() -> Any:
    """The package, or an error with the line that installs it."""
    try:
        import peft as found
    except ImportError:
        raise missing_package("peft", "bench", "the comparison with HF PEFT") from None
    return found


def check() -> None:
    """Another version of HF PEFT is measured too; the expectations were written for this one, and that is said."""
    found = peft().__version__
    if found != VERSION:
        warnings.warn(f"the expectations are about HF PEFT {VERSION}; this is {found}.", stacklevel=3)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """HF PEFT's warnings, once a call, are not what is read here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def lora(targets: Sequence[str], rank: int, **options: Any) -> Any:
    """A LoraConfig; `init_lora_weights=False` draws both factors, so that the adapter changes something."""
    return peft().LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(targets), **options
    )


def adapted(base: nn.Module, config: Any, name: str = "default") -> Any:
    """`base` wrapped with one adapter, in evaluation mode."""
    with undisturbed():
        return peft().get_peft_model(base, config, adapter_name=name).eval()


def add(model: Any, config: Any, names: Sequence[str]) -> None:
    with undisturbed():
        for name in names:
            model.add_adapter(name, config)


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Move everything that trains away from its start, which may be the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad or "lora_" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)


@contextlib.contextmanager
def folders(model: Any, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Each adapter saved by HF PEFT, for the time of the block."""
    with tempfile.TemporaryDirectory() as work:
        with undisturbed():
            model.save_pretrained(work, selected_adapters=list(names))
        yield {n: Path(work) if n == "default" else Path(work) / n for n in names}


def copy(model: Any, base: nn.Module, names: Sequence[str]) -> None:
    """The named adapters of an HF PEFT model, loaded on `base` by veneer under the same names."""
    with folders(model, names) as found, undisturbed():
        for name, folder in found.items():
            veneer.load(base, folder, name=name)


def load(model: Any, folder: Path, name: str) -> None:
    with undisturbed():
        model.load_adapter(str(folder), adapter_name=name)


def from_folder(base: nn.Module, folder: Path, name: str) -> Any:
    """`base` wrapped with an adapter that is read from a folder."""
    with undisturbed():
        return peft().PeftModel.from_pretrained(base, str(folder), adapter_name=name)
