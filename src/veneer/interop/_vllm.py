"""Folders that vLLM and SGLang load: any change of weights as LoRA of one rank, or a refusal with the reason.

Those engines read HF PEFT's LoRA with explicit module names, one rank for all, no bias, no magnitude and no modules
that are trained whole. What a method adds to W is written as B A exactly where its rank allows, else as the nearest of
the rank that was asked for, with the error of each module said; too large an error is refused.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.engine import Host, active, detach, host_of
from veneer.errors import BadFile, BadOption, Unsupported

from . import peft
from ._config import VERSION
from ._folder import put_folder
from ._report import ExportReport
from ._vllm_factors import EXACT, Spectrum, changes, spectrum

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
MOST = RANKS[-1]
MAX_ERROR = 0.05  # relative, of a module's change


@dataclass
class EngineReport(ExportReport):
    """errors: relative Frobenius error of each module's change. divergence: KL from the adapter to what was written."""

    rank: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    exact: bool = True
    divergence: float | None = None
    command: str = ""

    def __str__(self) -> str:
        worst = max(self.errors.items(), key=lambda e: e[1], default=("-", 0.0))
        how = "exactly" if self.exact else f"with an error of at most {worst[1]:.3g} (at {worst[0]})"
        lines = [super().__str__(), f"  rank {self.rank}, {how}"]
        if self.divergence is not None:
            lines.append(f"  the next token's distribution differs by {self.divergence:.3g} nats on a probe")
        return "\n".join([*lines, f"  run: {self.command}"])


def write(model: nn.Module, name: str, folder: Path, **options: Any) -> EngineReport:
    """Write an adapter for vLLM; see `write_for`."""
    return write_for("vllm", model, name, folder, **options)


def write_for(
    engine: str,
    model: nn.Module,
    name: str,
    folder: Path,
    *,
    rank: int | None = None,
    max_error: float = MAX_ERROR,
    probe: Mapping[str, Any] | None = None,
    base_model_name_or_path: str | None = None,
) -> EngineReport:
    """Write an adapter as LoRA of one rank that HF PEFT, vLLM and SGLang load; return what was done.

    rank: None takes the smallest that is exact, up to 512, or else the smallest within max_error. max_error: the
    largest relative error of a module's change that is written. probe: a batch that the folder is compared on when it
    is read back; token ids are drawn where none is given. Raises Unsupported (no change of linear weights, or too large
    an error; nothing is written), BadOption.
    """
    host = host_of(model)
    adapter = host.adapter(name)
    adapter.project()
    if name in host.merged:
        raise Unsupported(f"adapter '{name}' is merged.", next_step="veneer.unmerge(model) first")
    if rank is not None and not 1 <= rank <= MOST:
        raise BadOption(f"rank={rank}: these engines take 1 to {MOST}.", next_step="rank=64")
    found = {c.module: (spectrum(c.delta, rank or MOST), c) for c in changes(host, adapter)}
    found = {m: (s, c) for m, (s, c) in found.items() if s.norm > 0}
    if not found:
        raise Unsupported(
            f"adapter '{name}' ({adapter.method.key}) changes no linear layer.", next_step="train it first"
        )
    spectra = {m: s for m, (s, _) in found.items()}
    chosen = rank or _rank(spectra, max_error)
    errors = {m: _error(s, chosen) for m, s in spectra.items()}
    _check_errors(adapter.method.key, errors, chosen, max_error, spectra)
    targets, silent = _targets(host, list(found))
    tensors: dict[str, Tensor] = {}
    for module in [*found, *silent]:
        A, B = spectra[module].pair(chosen) if module in spectra else _zero_pair(host, module, chosen)
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.float().cpu().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.float().cpu().contiguous()
    config = _config(model, adapter, chosen, targets, found, base_model_name_or_path)
    report = EngineReport(
        engine, Path(folder), adapter.method.key, "LORA", sites=len(found), tensors=len(tensors)
    )
    report.rank, report.errors = chosen, errors
    report.exact = max(errors.values()) <= EXACT
    report.parameters = sum(v.numel() for v in tensors.values())
    report.bytes = sum(v.numel() * v.element_size() for v in tensors.values())
    report.command = _command(engine, name, Path(folder), chosen, targets)
    report.notes = _notes(host, found, silent, chosen)
    report.files = put_folder(Path(folder), config, tensors, str(adapter.method))
    _measure(model, name, report, probe)
    return report


def _rank(spectra: Mapping[str, Spectrum], max_error: float) -> int:
    """The smallest rank that is exact everywhere; where the engines take none, the smallest that loses no more."""
    for tolerance in (EXACT, max_error):
        ranks = [s.rank(tolerance) for s in spectra.values()]
        if all(r is not None and r <= MOST for r in ranks):
            return max(1, *(r or 1 for r in ranks))
    return MOST


def _error(found: Spectrum, rank: int) -> float:
    """Below what squares in float64 can tell, the singular values that are left out say it."""
    exact = found.rank()
    return 0.0 if exact is not None and exact <= rank else found.error(rank)


def _check_errors(
    method: str, errors: Mapping[str, float], rank: int, most: float, spectra: Mapping[str, Spectrum]
) -> None:
    bad = sorted((m for m in errors if errors[m] > most), key=lambda m: -errors[m])
    if not bad:
        return
    ranks = [s.rank(most) for s in spectra.values()]
    enough = None if any(r is None for r in ranks) else max(r or 0 for r in ranks)
    fits = enough is not None and enough <= MOST
    raise Unsupported(
        f"{method} as LoRA of rank {rank} loses {errors[bad[0]]:.1%} of its change at '{bad[0]}' ({len(bad)} of "
        f"{len(errors)} modules lose more than {most:.1%}); nothing was written.",
        next_step=f"rank={enough} loses less" if fits
        else f"max_error={math.ceil(errors[bad[0]] * 100) / 100:.2f} writes it all the same; veneer merge is exact",
    )  # fmt: skip


def _targets(host: Host, modules: list[str]) -> tuple[list[str], list[str]]:
    """(target_modules, modules that those names mean too): ends of names, which all of these engines take.

    A module that is meant and not changed gets a pair of zeros, so that every reader finds what it looks for.
    """
    linear = {s.module: s for s in host.anatomy.whole_sites() if s.parameter == "weight"}
    ends = sorted({m.rpartition(".")[2] for m in modules})
    meant = [n for n in host.anatomy.module_names if n.rpartition(".")[2] in ends]
    if all(n in linear and linear[n].kind in ("linear", "conv1d") for n in meant):
        return ends, [n for n in meant if n not in modules]
    return sorted(modules), []


def _zero_pair(host: Host, module: str, rank: int) -> tuple[Tensor, Tensor]:
    site = next(s for s in host.anatomy.whole_sites() if s.module == module and s.parameter == "weight")
    n_out, n_in = site.shape
    return torch.zeros(rank, n_in), torch.zeros(n_out, rank)


def _config(
    model: nn.Module, adapter: Any, rank: int, targets: list[str], found: Mapping[str, Any], base: str | None
) -> dict[str, Any]:
    kept = adapter.info.get("peft", {})
    opened = adapter.info.get("opens") or {}
    named = getattr(getattr(model, "config", None), "_name_or_path", "")
    return {
        "peft_type": "LORA", "task_type": kept.get("task_type") or peft._task(model) or "CAUSAL_LM",
        "base_model_name_or_path": base or kept.get("base_model_name_or_path") or opened.get("spec") or named or None,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "target_modules": targets, "bias": "none",
        "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
        "fan_in_fan_out": all(c.transposed for _, c in found.values()), "init_lora_weights": True,
        "inference_mode": True, "peft_version": VERSION,
    }  # fmt: skip


def _command(engine: str, name: str, folder: Path, rank: int, targets: list[str]) -> str:
    if engine == "sglang":
        return (
            f"python -m sglang.launch_server --model-path BASE --enable-lora --max-lora-rank {rank} "
            f"--lora-target-modules {' '.join(targets)} --lora-paths {name}={folder}"
        )
    allowed = next(r for r in RANKS if r >= rank)
    return f"vllm serve BASE --enable-lora --max-lora-rank {allowed} --lora-modules {name}={folder}"


def _notes(host: Host, found: Mapping[str, tuple[Spectrum, Any]], silent: list[str], rank: int) -> list[str]:
    notes = []
    if silent:
        notes.append(f"{len(silent)} modules of the same names are not changed, and have zeros")
    sizes = [(min(c.delta.shape), m) for m, (_, c) in found.items()]
    narrow, module = min(sizes)
    if 2 * rank >= narrow:
        notes.append(
            f"at '{module}' a pair of rank {rank} is as large as the weight: merging costs less to serve, one adapter "
            "at a time"
        )
    if {c.transposed for _, c in found.values()} == {True, False}:
        notes.append(
            "modules store their weights in both orientations; HF PEFT corrects fan_in_fan_out by itself"
        )
    return notes


@torch.no_grad()
def _measure(model: nn.Module, name: str, report: EngineReport, probe: Mapping[str, Any] | None) -> None:
    """Read the folder back and compare outputs on a probe."""
    config = getattr(model, "config", None)
    if probe is None:
        words = getattr(config, "vocab_size", None)
        if not isinstance(words, int) or getattr(config, "is_encoder_decoder", False):
            return
        draw = torch.Generator().manual_seed(0)
        probe = {
            "input_ids": torch.randint(0, words, (2, 12), generator=draw).to(next(model.parameters()).device)
        }
    again, training = "veneer.interop.again", model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.read(model, report.folder, again, activate=False)
        own, other = (_output(model, which, probe) for which in (name, again))
    finally:
        model.train(training)
        if again in host_of(model).names:
            detach(model, again)
    report.largest_difference = float((own - other).abs().max())
    if not math.isfinite(report.largest_difference):
        raise BadFile(
            f"what was written to '{report.folder}' does not give finite outputs.",
            next_step="write it in float32, or keep the adapter in its own form: veneer export --for peft",
        )
    p, q = own.log_softmax(-1), other.log_softmax(-1)
    report.divergence = max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))


def _output(model: nn.Module, name: str, probe: Mapping[str, Any]) -> Tensor:
    with active(model, name):
        y = model(**probe)
    return (y if isinstance(y, Tensor) else y["logits"] if "logits" in y else y[0]).double()
