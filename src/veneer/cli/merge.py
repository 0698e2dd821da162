"""`veneer merge`: base and adapter as one plain model, in a folder that needs veneer no more."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli._common import AsJson, Debug, Device, Dtype, Quiet, result, still
from veneer.errors import BadFile, BadOption, Unsupported

EXAMPLES = (
    "veneer merge --adapter runs/one --output runs/one-merged",
    "veneer merge --adapter runs/one --output runs/one-merged --dtype bfloat16 --json",
)
REPORT = "merge.json"


def merge(
    adapter: Annotated[str, typer.Option("--adapter", help="a folder that train or compare wrote")],
    output: Annotated[str, typer.Option("--output", help="a new folder for the model")],
    model: Annotated[str | None, typer.Option("--model", help="another place of the base")] = None,
    task: Annotated[str | None, typer.Option(help="for folders that name no task")] = None,
    requantise: Annotated[
        bool, typer.Option("--requantise", help="round to the grid of a quantised base again")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="replace what is in the output folder")] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write an adapter into the weights of its base, and save the model with its tokenizer.

    The report says how far the outputs of the merged model are from those of base and adapter, before it was saved
    and after it was opened again.
    """
    from veneer import engine
    from veneer.training import Predictor

    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not force:
        raise BadOption(
            f"{target} is not empty.", next_step="another --output, or --force to replace what is there"
        )
    still()
    opened = Predictor.open(adapter, model=model, task=task, device=device, dtype=dtype)
    if not hasattr(opened.model, "save_pretrained"):
        raise Unsupported(
            f"a {type(opened.model).__name__} has no form of its own on disk, so a merged one cannot be saved.",
            next_step="in Python: veneer.merge(model, name), then torch.save(model.state_dict(), FILE)",
        )
    probe = probe_of(opened)
    attached = outputs(opened.model, probe)
    report = engine.merge(opened.model, opened.name, probe=probe, keep=False, requantise=requantise)
    _name_labels(opened.model, opened.task)
    _save(opened, target, report, adapter)
    again = _reopened(target, opened, attached, probe)
    plain = report.to_dict() | {"adapter": adapter, "output": str(target), "reopened_max_abs_error": again}
    (target / REPORT).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    lines = [str(report)]
    if again is not None:
        lines.append(f"  opened again from {target}, outputs differ by at most {again:.3g}")
    result(
        plain,
        "\n".join([*lines, f"saved    {target}: a plain {type(opened.model).__name__} of transformers"]),
    )


def probe_of(opened: Any) -> dict[str, Any] | None:
    """A small batch of token ids for the base, or None where it reads something else."""
    import torch

    given = getattr(opened.model, "dummy_inputs", None)
    if not isinstance(given, dict) or opened.task.name in ("image-classify", "speech"):
        return None
    vocabulary = getattr(opened.model.config, "vocab_size", 0) or 0
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [11, 12, 13, 14, 15, 16, 17]]) % max(1, vocabulary)
    probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(opened.model.config, "is_encoder_decoder", False):
        probe["decoder_input_ids"] = ids
    return {name: value.to(opened.device) for name, value in probe.items()}


def outputs(model: Any, probe: dict[str, Any] | None) -> Any:
    import torch

    if probe is None:
        return None
    model.eval()
    with torch.no_grad():
        found = model(**probe)
    return (found["logits"] if "logits" in found else found[0]).float().cpu()


def _name_labels(model: Any, task: Any) -> None:
    """Labels by name in the config, so that other programs print them."""
    if task.labels and getattr(model.config, "num_labels", None) == len(task.labels):
        model.config.id2label = dict(enumerate(task.labels))
        model.config.label2id = {name: i for i, name in enumerate(task.labels)}


def _save(opened: Any, target: Path, report: Any, adapter: str) -> None:
    """All files beside their place, then moved there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        opened.model.save_pretrained(beside)
        if hasattr(opened.feeder, "save_pretrained"):
            opened.feeder.save_pretrained(beside)
        (beside / "README.md").write_text(_card(opened, report, adapter), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        beside.chmod(0o755)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _card(opened: Any, report: Any, adapter: str) -> str:
    error = "not measured" if report.max_abs_error is None else f"{report.max_abs_error:.3g}"
    return (
        f"# {type(opened.model).__name__}, merged\n\n"
        f"The adapter {adapter} written into {len(report.sites)} weights of its base. "
        f"Largest difference of an output on a probe batch, merged against attached: {error}.\n\n"
        f"Task: {opened.task.name}{': ' + ', '.join(opened.task.labels) if opened.task.labels else ''}. "
        "Opens with transformers alone; how good the adapter was is in its own folder.\n"
    )


def _reopened(target: Path, opened: Any, attached: Any, probe: dict[str, Any] | None) -> float | None:
    """The largest difference of the saved model's outputs from those of base and adapter."""
    from veneer.bases import open_base

    if probe is None:
        return None
    again = open_base(str(target), task=opened.task.name, num_labels=opened.task.num_labels)
    if again.fresh:
        raise BadFile(
            f"{target} came back without {', '.join(again.fresh[:3])}; it was saved incompletely.",
            next_step="veneer merge again, to another --output",
        )
    again.model.to(opened.device)
    return float((outputs(again.model, probe) - attached).abs().max())
