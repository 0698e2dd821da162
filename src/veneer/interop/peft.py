"""HF PEFT's folders: adapter_config.json and adapter_model.safetensors, as release 0.21.2 writes and reads them.

Reading compares everything first (type, options, modules, names and shapes of tensors) and then attaches once, so
that nothing is ever half attached. Writing builds the folder beside its place, reads it back, and moves it there.
The package itself is not needed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.edits import TrainedCopy, TrainedRows, build
from veneer.engine import Adapter, attach, detach, host_of, read_tensors
from veneer.engine._attach import _plan_for, _split
from veneer.engine._plan import Plan
from veneer.engine._store import inside
from veneer.errors import BadFile, UnknownOption, Unsupported

from ._config import CONFIG, TENSORS, Config, read_json, type_of, version_of
from ._converter import Converter, Reading, Request, Tensorfile, Writing, converters, writer_for
from ._copies import (
    copy_of,
    drop_copies_of_the_base,
    rows_of,
    saved_modules,
    with_head,
    write_copies,
    write_rows,
)
from ._folder import put_folder
from ._report import ExportReport

# Types of 0.21.2 without a converter -> the nearest that has one.
OTHERS = {
    "MULTITASK_PROMPT_TUNING": "PROMPT_TUNING", "CPT": "PROMPT_TUNING",
    "CARTRIDGE": "PREFIX_TUNING", "ADAMSS": "ADALORA", "HRA": "OFT", "PSOFT": "OFT", "ROAD": "IA3",
    "BEFT": "IA3", "PVERA": "VERA", "RANDLORA": "VERA", "VBLORA": "VERA", "UNILORA": "VERA",
    "TINYLORA": "VERA", "FROD": "VERA",
    **dict.fromkeys(
        ("LILY", "POLY", "GLORA", "XLORA", "MISS", "C3A", "WAVEFT",
         "OSF", "DELORA", "GRALORA", "PEANUT", "SHADOW", "SUPERTUNING", "DEFT"), "LORA"),
}  # fmt: skip


def read(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    activate: bool = True,
    **options: Any,
) -> Adapter:
    """Attach the adapter of an HF PEFT folder; return it.

    options: of `attach` (seed, dtype, replace). Raises BadFile (unreadable), Unsupported (a type or an option that has
    no form here), NoSiteFound (modules that this base has not), ShapeDiffers (missing, unexpected or other tensors).
    """
    odd = sorted(set(options) - {"seed", "dtype", "replace"})
    if odd:
        raise UnknownOption(f"reading an HF PEFT folder has no option '{odd[0]}'; its config says the rest.",
                            nearest=("seed", "dtype"), next_step="veneer.load(model, folder, name)")  # fmt: skip
    folder = Path(folder)
    path, raw = read_json(folder)
    known = converters()
    kind = known[type_of(path, raw, OTHERS, {t: c.methods[0] for t, c in known.items()})]
    config = Config(path, raw, kind.fields)
    inside(folder, TENSORS)
    tensors = read_tensors(folder / TENSORS)
    fresh = "veneer" not in model._modules
    host = host_of(model, make=True)
    try:
        job = Reading(
            model, host, config, Tensorfile(tensors, f"'{folder}' ({config.peft_type})"), kind.prefix
        )
        request = kind.request(job)
        engine, own = _split(request.options)
        engine |= saved_modules(job)
        method = build(request.method, **own)
        plan = _plan_for(model, method, **engine)
        _check_plan(plan, request, config)
        job.plan = plan
        values = _values(kind, job, plan)
        job.file.check(type(model).__name__)
        values.update(_frozen_starts(model, method, engine, plan, values))
        adapter = attach(
            model, method, name, activate=activate, values=values, total_steps=request.total_steps,
            **{**engine, **options},
        )  # fmt: skip
    except Exception:
        if fresh and "veneer" in model._modules and not host.names:
            host.leave()
        raise
    adapter.info["peft"] = config.kept()
    return adapter


def _check_plan(plan: Plan, request: Request, config: Config) -> None:
    """The plan edits exactly the modules that the config means."""
    planned = {
        (s.module, s.parameter if s.port == "weight" else "")
        for s in (p.site for p in plan.sites if p.part == 0)
    }
    if request.places and planned != request.places:
        missing, extra = request.places - planned, planned - request.places
        raise Unsupported(
            f"'{config.path}' edits {len(request.places)} places, of which {len(missing)} cannot be chosen here and "
            f"{len(extra)} others would be: {', '.join(m for m, _ in sorted(missing | extra)[:3])}.",
            next_step="load it on the base that it was trained on; veneer anatomy MODEL    shows this one's modules",
        )


def _values(kind: Converter, job: Reading, plan: Plan) -> dict[str, Tensor]:
    """Entry key -> tensor, for all that the file holds."""
    values: dict[str, Tensor] = {}
    for sp, keys in zip(plan.sites, plan.keys):
        if not keys:  # it holds nothing
            continue
        with job.file.together(f"{job.prefix}{sp.site.module}."):
            if isinstance(sp.method, TrainedRows):
                if keys["D"] in values:
                    continue
                found = {"D": rows_of(job, sp)}
            elif isinstance(sp.method, TrainedCopy):
                found = {"W": copy_of(job, sp)}
            else:
                found = kind.take(job, sp, f"{job.prefix}{sp.site.module}.")
            values.update({keys[n]: v for n, v in found.items()})
    drop_copies_of_the_base(job)
    return values


def _frozen_starts(
    model: nn.Module, method: Any, engine: dict[str, Any], plan: Plan, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the file leaves out because it is made from the base's weights: starts that are subtracted."""
    left = [
        e for e in plan.entries
        if e.key not in values and not e.spec.seeded and not e.spec.noise and not e.spec.trained
    ]  # fmt: skip
    if not left:
        return {}
    temporary = "veneer.interop.start"
    adapter = attach(model, method, temporary, activate=False, **engine)
    found = {k: getattr(adapter, b).clone() for k, b in adapter.frozen_own.items()}
    host_of(model).drop(temporary)  # the host stays: the adapter itself comes next
    return {e.key: found[e.key] for e in left}


# -- writing --------------------------------------------------------------------------------------------------------


def write(
    model: nn.Module,
    name: str,
    folder: str | os.PathLike[str],
    *,
    probe: Mapping[str, Any] | None = None,
    task_type: str | None = None,
    base_model_name_or_path: str | None = None,
    **options: Any,
) -> ExportReport:
    """Write an adapter as an HF PEFT folder that `peft.PeftModel.from_pretrained` loads; return what was done.

    probe: a batch; the folder is read back and its outputs are compared with the adapter's. task_type: HF PEFT's
    name of the task (default: what the adapter was read with, or what the model's class tells). save_projection:
    VeRA's frozen pair in the file (True). Raises Unsupported, which names the option or the site, and writes nothing.
    """
    host = host_of(model)
    adapter = host.adapter(name)
    adapter.check_prepared()
    adapter.project()
    if name in host.merged:
        raise Unsupported(f"adapter '{name}' is merged.", next_step="veneer.unmerge(model) first")
    kind = writer_for(adapter)
    job = Writing(host, adapter, options, kind.prefix)
    fields = kind.write(job)
    kept = adapter.info.get("peft", {})
    task = task_type or kept.get("task_type") or _task(model)
    if kind.beside:
        fields.update(write_copies(job))
        fields.update(write_rows(job))
        task = with_head(job, fields, task_type, kept.get("task_type") or _task(model))
    if options:
        raise Unsupported(
            f"{kind.peft_type} has no export option '{next(iter(options))}'.",
            next_step='veneer.export(model, name, folder, format="peft")',
        )
    config = {
        "peft_type": kind.peft_type,
        "task_type": task,
        "base_model_name_or_path": base_model_name_or_path
        or kept.get("base_model_name_or_path")
        or getattr(getattr(model, "config", None), "_name_or_path", "")
        or None,
        "inference_mode": True,
        "peft_version": ".".join(map(str, (0, 21, 2))),
        **fields,
        **{k: v for k, v in kept.get("unknown", {}).items() if k not in fields},
    }
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in job.tensors.items()}
    bad = next((k for k, v in tensors.items() if v.is_floating_point() and not torch.isfinite(v).all()), None)
    if bad:
        raise BadFile(
            f"tensor '{bad}' of adapter '{name}' is not finite; nothing was written.",
            next_step="an earlier checkpoint of that run, or a lower learning rate",
        )
    report = ExportReport("peft", Path(folder), adapter.method.key, kind.peft_type, notes=job.notes)
    report.sites = len({sp.site.name for sp in adapter.plan.sites})
    report.tensors = len(tensors)
    report.parameters = sum(v.numel() for v in tensors.values())
    report.bytes = sum(v.numel() * v.element_size() for v in tensors.values())
    report.files = put_folder(Path(folder), config, tensors, str(adapter.method))
    if probe is not None:
        report.largest_difference = _measure(model, name, Path(folder), probe)
    return report


def _task(model: nn.Module) -> str | None:
    """HF PEFT's task of a transformers class; None where the class does not tell."""
    ends = {
        "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }  # fmt: skip
    name = type(model).__name__
    for base in type(model).__mro__:
        name = base.__name__
        for end, task in ends.items():
            if name.endswith(end):
                return task
    return None


@torch.no_grad()
def _measure(model: nn.Module, name: str, folder: Path, probe: Mapping[str, Any]) -> float:
    """Largest difference of outputs between the adapter and the folder read back."""
    from veneer.engine import active

    again = "veneer.interop.again"
    training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(model, folder, again, activate=False)
        found = []
        for which in (name, again):
            with active(model, which):
                y = model(**probe)
            found.append(y if isinstance(y, Tensor) else y["logits"] if "logits" in y else y[0])
        return float((found[0].double() - found[1].double()).abs().max())
    finally:
        model.train(training)
        if again in host_of(model).names:
            detach(model, again)


__all__ = ["CONFIG", "TENSORS", "read", "version_of", "write"]
