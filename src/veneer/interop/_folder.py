"""Putting a folder on disk at once: written beside its place, read back, compared, then moved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer._disk import sync
from veneer.engine._beside import beside
from veneer.errors import BadFile

from ._config import CARD, CONFIG, TENSORS


def put_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], method: str
) -> list[str]:
    """Config, tensors and a model card in `folder`; returns the names of the files."""
    import safetensors.torch

    if folder.exists() and not folder.is_dir():
        raise BadFile(
            f"'{folder}' is a file; an adapter is written to a folder.",
            next_step=f"veneer.export(model, name, '{folder}-peft')",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with beside(folder, (CONFIG, TENSORS, CARD)) as place:
        safetensors.torch.save_file(dict(tensors), str(place / TENSORS), metadata={"format": "pt"})
        (place / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (place / CARD).write_text(card(config, tensors, method), encoding="utf-8")
        back = safetensors.torch.load_file(str(place / TENSORS))
        if set(back) != set(tensors) or not all(torch.equal(back[k], v) for k, v in tensors.items()):
            raise BadFile(
                f"what was written to '{folder}' does not read back equal; the disk may be full.",
                next_step="df -h    shows the room that is left",
            )
        folder.mkdir(exist_ok=True)
        # The config comes last: a folder without it is no adapter.
        for name in (TENSORS, CARD, CONFIG):
            sync(place / name)
            os.replace(place / name, folder / name)
    return [CONFIG, TENSORS, CARD]


def put_file(path: Path, write: Any) -> None:
    """One file at once: `write(temporary path)`, then a move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path, (path.name,)) as place:
        write(place / path.name)
        sync(place / path.name)
        os.replace(place / path.name, path)


def card(config: Mapping[str, Any], tensors: Mapping[str, Tensor], method: str) -> str:
    """The model card: what the adapter is, for which base, how to load it."""
    base = config.get("base_model_name_or_path")
    head = [
        "---",
        "library_name: peft",
        *([f"base_model: {base}"] if base else []),
        "tags:",
        "- veneer",
        "---",
    ]
    parameters = sum(t.numel() for t in tensors.values())
    return "\n".join([
        *head,
        "",
        f"# {config['peft_type']} adapter" + (f" for {base}" if base else ""),
        "",
        f"Method: `{method}`. {len(tensors)} tensors, {parameters:,} numbers.",
        "",
        "```python",
        "from peft import PeftModel",
        "model = PeftModel.from_pretrained(base_model, folder)   # HF PEFT 0.21.2 or later",
        "```",
        "```python",
        "import veneer",
        "veneer.load(base_model, folder)",
        "```",
        "",
    ])  # fmt: skip
