"""SGLang's folders: those of vLLM, with the command that SGLang is started by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ._vllm import EngineReport, write_for


def write(model: nn.Module, name: str, folder: Path, **options: Any) -> EngineReport:
    """Write an adapter for SGLang; options as for `_vllm.write_for`."""
    return write_for("sglang", model, name, folder, **options)
