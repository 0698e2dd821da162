"""What is trained beside the edits: whole modules (modules_to_save), biases, rows of a table; heads that tasks want.

HF PEFT keeps a copy of each such module and writes all of its parameters by their own names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.edits import TrainedCopy, TrainedRows
from veneer.engine._plan import SitePlan
from veneer.engine._weights import cut, paste
from veneer.errors import NoSiteFound, ShapeDiffers, Unsupported

from . import _targets
from ._config import TENSORS
from ._converter import Reading, Writing


def saved_modules(job: Reading) -> dict[str, Any]:
    """`whole=` for modules_to_save."""
    names = _targets.saved_modules(job.model, job.config) if "modules_to_save" in job.config.fields else []
    whole = [n for n in names if any(k.startswith(f"{job.prefix}{n}.") for k in job.file.names())]
    idle = [n for n in names if n not in whole and any(True for _ in job.host.module(n).parameters())]
    if idle:
        raise ShapeDiffers(
            f"'{job.config.path}' trains '{idle[0]}' whole (modules_to_save), and {TENSORS} has no tensor of it.",
            next_step="copy the folder again",
        )
    if not whole:
        return {}
    try:
        chosen = {s.module for n in whole for s in _whole_sites(job, n)}
    except NoSiteFound:
        shared = {p.rpartition(".")[0] for pair in job.anatomy.facts.tied for p in pair}
        name = next((n for n in whole if n in shared), whole[0])
        raise Unsupported(
            f"'{job.config.path}' trains '{name}' whole, whose weight another module shares: a copy of its own has no "
            "form here.",
            next_step="load it on a base that was loaded with tie_word_embeddings=False",
        ) from None
    asked = {
        m for n in whole for m, module in job.host.module(n).named_modules(prefix=n)
        if any(True for _ in module.named_parameters(recurse=False))
    }  # fmt: skip
    if chosen != asked:
        odd = sorted(chosen ^ asked)
        raise Unsupported(
            f"'{job.config.path}' trains '{whole[0]}' whole, and '{odd[0]}' cannot be copied apart: it shares its "
            "weight with another module, or its name is the end of another one's.",
            next_step="load it on a base that was loaded with tie_word_embeddings=False",
        )
    return {"whole": tuple(whole)}


def _whole_sites(job: Reading, name: str) -> list[Any]:
    from veneer.engine._plan import _whole_sites as sites

    return sites(job.anatomy, name)


def copy_of(job: Reading, sp: SitePlan) -> Tensor:
    """A trained copy of a parameter, in the method's shape; the base's own where HF PEFT would not have saved it."""
    site = sp.site
    base = job.host.bare(site)
    end = f"{site.module}.{site.parameter}" if site.module else site.parameter
    for key in (f"{job.prefix}{end}", f"{job.prefix}{site.module}.base_layer.{site.parameter}"):
        if job.file.has(key):
            return cut(job.file.take(key, tuple(base.shape)), site)
    if sp.part > 0 and not end.endswith("bias"):
        return cut(base.detach().clone(), site)
    return cut(job.file.take(f"{job.prefix}{end}", tuple(base.shape)), site)


ROWS = "token_adapter.trainable_tokens_delta"  # of HF PEFT: the rows themselves, not what is added to them


def rows_of(job: Reading, sp: SitePlan) -> Tensor:
    """D of rows that are trained: what the file's rows add to the base's."""
    m: Any = sp.method
    ids, table = list(m.ids), job.host.bare(sp.site).detach().cpu()
    rows = job.file.take(f"{job.prefix}{job.rows[sp.site.module]}.{ROWS}", (len(ids), table.shape[1]))
    wide = torch.promote_types(rows.dtype, table.dtype)
    return rows.to(wide) - table[ids].to(wide)


def write_rows(job: Writing) -> dict[str, Any]:
    """trainable_token_indices: rows of the table of tokens, which a head that shares it follows in HF PEFT too."""
    if not any(isinstance(sp.method, TrainedRows) for sp in job.plan.sites):
        return {}
    main = input_embeddings(job.host.root)
    edited = {sp.site.module for sp in job.plan.sites if not isinstance(sp.method, TrainedRows)}
    by_key: dict[str, tuple[list[int], Tensor, list[str]]] = {}
    for sp, t, keys in zip(job.plan.sites, job.values(), job.plan.keys):
        if isinstance(sp.method, TrainedRows):
            by_key.setdefault(keys["D"], (list(sp.method.ids), t["D"], []))[2].append(sp.site.module)
    found: dict[str, list[int]] = {}
    plain = None
    for ids, D, modules in by_key.values():
        if edited & set(modules):
            raise Unsupported(
                f"'{min(edited & set(modules))}' is edited, and rows of it are trained; HF PEFT can do one of them.",
                next_step=f"exclude={min(edited & set(modules))!r}, or no trainable_tokens",
            )
        module = next((m for m in modules if job.host.module(m) is main), None)
        if module is None and len(modules) > 1:
            raise Unsupported(
                f"rows of '{modules[0]}' are trained, which shares its weight with '{modules[1]}'; HF PEFT ties them "
                "at the model's input embeddings alone.",
                next_step="veneer.save(model, name, folder)    keeps veneer's own form",
            )
        plain = ids if module is not None else plain
        module = _first_name(job, main) if module is not None else modules[0]
        table: Any = job.host.module(module).weight
        job.tensors[f"{job.prefix}{module}.{ROWS}"] = table.detach()[ids].to(D.dtype) + D
        found[module] = ids
    return {"trainable_token_indices": plain if plain is not None and len(found) == 1 else found}


def input_embeddings(model: Any) -> Any:
    """The module that transformers takes for the table of tokens; None where it has none."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _first_name(job: Writing, module: Any) -> str:
    """The name under which HF PEFT finds a module that several names lead to."""
    return next(n for n, m in job.host.root.named_modules() if m is module)


def drop_copies_of_the_base(job: Reading) -> None:
    """HF PEFT also writes weights of the base (edited embeddings, wrapped modules): fine where they are the base's."""
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


# HF PEFT trains and expects these heads, whatever the config says.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def with_head(job: Writing, fields: dict[str, Any], asked: str | None, likely: str | None) -> str | None:
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


def write_copies(job: Writing) -> dict[str, Any]:
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
            raise Unsupported(
                "a module is edited and trained whole at once; HF PEFT can do one of them.",
                next_step="sites= without that module, or veneer.save(model, name, folder)",
            )
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
