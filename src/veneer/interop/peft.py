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

from veneer.edits import TrainedCopy, build
from veneer.engine import Adapter, attach, detach, host_of, read_tensors
from veneer.engine._attach import _plan_for, _split
from veneer.engine._plan import Plan, SitePlan
from veneer.engine._store import inside
from veneer.engine._weights import cut, paste
from veneer.errors import BadFile, ShapeDiffers, Unsupported

from . import _targets
from ._config import CONFIG, TENSORS, Config, read_json, type_of, version_of
from ._converter import Converter, Reading, Request, Tensorfile, Writing, converters, writer_for
from ._folder import put_folder
from ._report import ExportReport

# Types of 0.21.2 without a converter -> the nearest that has one.
OTHERS = {
    "MULTITASK_PROMPT_TUNING": "PROMPT_TUNING", "P_TUNING": "PROMPT_TUNING", "CPT": "PROMPT_TUNING",
    "CARTRIDGE": "PREFIX_TUNING", "ADAMSS": "ADALORA", "BOFT": "OFT", "HRA": "OFT", "PSOFT": "OFT", "ROAD": "IA3",
    "BEFT": "IA3", "LN_TUNING": "IA3", "PVERA": "VERA", "RANDLORA": "VERA", "VBLORA": "VERA", "UNILORA": "VERA",
    "TINYLORA": "VERA", "FROD": "VERA", "TRAINABLE_TOKENS": "LORA",
    **dict.fromkeys(
        ("LILY", "LOHA", "LOKR", "POLY", "FOURIERFT", "GLORA", "XLORA", "MISS", "HIRA", "SHIRA", "C3A", "WAVEFT",
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

    options: of `attach` (seed, dtype). Raises BadFile (unreadable), Unsupported (a type or an option that has no
    form here), NoSiteFound (modules that this base has not), ShapeDiffers (missing, unexpected or other tensors).
    """
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
        job.rows = request.rows
        engine, own = _split(request.options)
        engine |= _add_saved_modules(job)
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
            f"{len(extra)} others would be: {', '.join(m for m, _ in sorted(missing | extra)[:3])}."
        )


def _values(kind: Converter, job: Reading, plan: Plan) -> dict[str, Tensor]:
    """Entry key -> tensor, for all that the file holds."""
    values: dict[str, Tensor] = {}
    for sp, keys in zip(plan.sites, plan.keys):
        with job.file.together(f"{job.prefix}{sp.site.module}."):
            if isinstance(sp.method, TrainedCopy):
                found = {"W": _copy(job, sp)}
            else:
                found = kind.take(job, sp, f"{job.prefix}{sp.site.module}.")
            values.update({keys[n]: v for n, v in found.items()})
    _drop_copies_of_the_base(job)
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


# -- modules trained whole, biases ----------------------------------------------------------------------------------


def _add_saved_modules(job: Reading) -> dict[str, Any]:
    """`whole=` for modules_to_save and trained token rows."""
    names = _targets.saved_modules(job.model, job.config) if "modules_to_save" in job.config.fields else []
    whole = [n for n in names if any(k.startswith(f"{job.prefix}{n}.") for k in job.file.names())]
    idle = [n for n in names if n not in whole and any(True for _ in job.host.module(n).parameters())]
    if idle:
        raise ShapeDiffers(
            f"'{job.config.path}' trains '{idle[0]}' whole (modules_to_save), and {TENSORS} has no tensor of it.",
            next_step="copy the folder again",
        )
    whole += [m for m in job.rows if m not in whole]
    if not whole:
        return {}
    chosen = {s.module for n in whole for s in _whole_sites(job, n)}
    asked = {
        m for n in whole for m, module in job.host.module(n).named_modules(prefix=n)
        if any(True for _ in module.named_parameters(recurse=False))
    }  # fmt: skip
    if chosen != asked:
        odd = sorted(chosen ^ asked)
        raise Unsupported(
            f"'{job.config.path}' trains '{whole[0]}' whole, and '{odd[0]}' cannot be copied apart: it shares its "
            "weight with another module, or its name is the end of another one's.",
        )
    return {"whole": tuple(whole)}


def _whole_sites(job: Reading, name: str) -> list[Any]:
    from veneer.engine._plan import _whole_sites as sites

    return sites(job.anatomy, name)


def _copy(job: Reading, sp: SitePlan) -> Tensor:
    """A trained copy of a parameter, in the method's shape; the base's own where HF PEFT would not have saved it."""
    site = sp.site
    base = job.host.bare(site)
    if site.module in job.rows and site.parameter == "weight":
        ids = job.rows[site.module]
        delta = job.file.take(
            f"{job.prefix}{site.module}.token_adapter.trainable_tokens_delta", (len(ids), base.shape[1])
        )
        return base.detach().cpu().index_copy(0, torch.tensor(ids), delta.to(base.dtype))
    end = f"{site.module}.{site.parameter}" if site.module else site.parameter
    for key in (f"{job.prefix}{end}", f"{job.prefix}{site.module}.base_layer.{site.parameter}"):
        if job.file.has(key):
            return cut(job.file.take(key, tuple(base.shape)), site)
    if sp.part > 0 and not end.endswith("bias"):
        return cut(base.detach().clone(), site)
    return cut(job.file.take(f"{job.prefix}{end}", tuple(base.shape)), site)


def _drop_copies_of_the_base(job: Reading) -> None:
    """HF PEFT also writes weights of the base (targeted embeddings, wrapped modules): fine where they are the base's."""
    for key in job.file.names():
        if ".original_module." in key or ".modules_to_save." in key:
            job.file.pop(key)
            continue
        path = key.removeprefix(job.prefix).replace(".base_layer", "")
        module, _, parameter = path.rpartition(".")
        try:
            base = getattr(job.host.module(module), parameter)
        except (KeyError, AttributeError):
            continue
        if not isinstance(base, Tensor):
            continue
        value = job.file.pop(key)
        if (
            value is None
            or value.shape != base.shape
            or not torch.equal(value, base.detach().cpu().to(value.dtype))
        ):
            raise Unsupported(
                f"'{job.config.path.parent}' holds '{key}', which is not what this base has: it was trained on a base "
                "whose weights (or vocabulary) were changed.",
                next_step="load it on that base",
            )


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
    kind = writer_for(adapter.method.key)
    job = Writing(host, adapter, options, kind.prefix)
    fields = kind.write(job)
    fields.update(_write_copies(job, kind))
    kept = adapter.info.get("peft", {})
    task = _with_head(job, fields, task_type, kept.get("task_type") or _task(model))
    if options:
        raise Unsupported(f"{kind.peft_type} has no export option '{next(iter(options))}'.")
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
        raise BadFile(f"tensor '{bad}' of adapter '{name}' is not finite; nothing was written.")
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


# HF PEFT trains and expects these heads, whatever the config says.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _with_head(job: Writing, fields: dict[str, Any], asked: str | None, likely: str | None) -> str | None:
    """The task to write. Tasks with a head want its tensors: the base's own are added where the task was asked for."""
    task = asked or likely
    heads = [n for n in job.host.anatomy.module_names if n.endswith(_HEADS.get(task or "", ()))]
    heads = [
        n
        for n in heads
        if not any(n == r or n.startswith(r + ".") for r in fields.get("modules_to_save", []))
    ]
    if not heads:
        return task
    if asked is None:
        job.note(f"task_type is left out: HF PEFT's {task} would want a trained '{heads[0]}'")
        return None
    for n in heads:
        for key, value in job.host.module(n).state_dict(prefix=f"{job.prefix}{n}.").items():
            job.tensors.setdefault(key, value)
    fields["modules_to_save"] = sorted({*fields.get("modules_to_save", []), *heads})
    job.note(f"'{heads[0]}' is written as the base has it, since {task} wants a head")
    return task


def _write_copies(job: Writing, kind: Converter) -> dict[str, Any]:
    """Modules trained whole, and biases: their parameters by their own names."""
    fields: dict[str, Any] = {}
    targets = {sp.site.module for sp in job.plan.sites if sp.part == 0 and sp.site.port == "weight"}
    saved: list[str] = []
    for sp, t in zip(job.plan.sites, job.values()):
        if not isinstance(sp.method, TrainedCopy):
            continue
        site = sp.site
        layer = ".base_layer" if sp.part > 0 and site.module in targets else ""
        bare = job.host.bare(site)
        key = f"{job.prefix}{site.module}{layer}.{site.parameter}"
        job.tensors[key] = paste(torch.zeros_like(bare, dtype=t["W"].dtype), t["W"], site)
        if sp.part < 0:
            saved.append(site.module)
    if job.plan.whole:
        roots = _saved_roots(job, saved)
        if targets & {m for m in targets if any(m == r or m.startswith(r + ".") for r in roots)}:
            raise Unsupported("a module is edited and trained whole at once; HF PEFT can do one of them.")
        fields["modules_to_save"] = roots
    return fields


def _saved_roots(job: Writing, saved: list[str]) -> list[str]:
    """The modules to name in modules_to_save: HF PEFT wraps whole modules, so all of their parameters are written."""
    roots: list[str] = []
    modules = dict(job.host.root.named_modules())
    for module in dict.fromkeys(saved):
        root = module
        for asked in job.plan.whole:  # the module that was asked for, where it holds this one
            parts = module.split(".")
            for i in range(len(parts), 0, -1):
                path = ".".join(parts[:i])
                if path == asked or path.endswith("." + asked):
                    root = path
        if root not in roots:
            roots.append(root)
    for root in roots:
        for n, value in modules[root].state_dict(prefix=f"{job.prefix}{root}.", keep_vars=True).items():
            job.tensors.setdefault(n, value)  # what stays the base's: buffers, tied parameters
    return roots


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
