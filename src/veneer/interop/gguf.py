"""GGUF LoRA files, as llama.cpp reads them beside a GGUF model: pairs `<tensor>.lora_a`, `<tensor>.lora_b`.

    W' = W + alpha / rank B A        A: (rank, in)   B: (out, rank)   alpha: one for the file, rank: of each pair

Any other scale goes into B. Tensors have llama.cpp's names. Its Llama models keep the rows of the query and key
weights in another order (halves of a head interleaved, for its way to rotate), so the rows of their B are put in
that order too. Nothing but LoRA pairs fits into such a file: what else an adapter holds is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.edits import TrainedCopy, TrainedRows
from veneer.engine import host_of
from veneer.errors import BadOption, UnknownName, Unsupported, missing_package, nearest

from ._converter import Writing
from ._folder import put_file
from ._pairs import Pair, pairs_of
from ._report import ExportReport

# A model's own type -> llama.cpp's architecture. Their converters change rows of query and key at most.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "phi3": "phi3", "gpt2": "gpt2",
}  # fmt: skip
INTERLEAVED = ("llama",)
DTYPES = {"f32": torch.float32, "f16": torch.float16}


def write(
    model: nn.Module, name: str, folder: str | os.PathLike[str], *, dtype: str = "f32", **options: Any
) -> ExportReport:
    """Write a LoRA adapter as one GGUF file: `folder` itself where it ends in .gguf, else folder/adapter.gguf.

    dtype: "f32" or "f16". Raises Unsupported with the tensors that such a file cannot hold, and writes nothing then.
    """
    if options:
        raise BadOption(
            f"gguf has no option '{next(iter(options))}'.",
            nearest=("dtype",),
            next_step='veneer.export(model, name, file, format="gguf", dtype="f16")',
        )
    if dtype not in DTYPES:
        raise BadOption(
            f"gguf: dtype={dtype!r} is neither 'f32' nor 'f16'.",
            nearest=nearest(dtype, DTYPES),
            next_step="dtype='f16'",
        )
    try:
        import gguf
    except ImportError:
        raise missing_package("gguf", "train", "a GGUF file") from None
    host = host_of(model)
    adapter = host.adapter(name)
    adapter.check_prepared()
    job = Writing(host, adapter, options)
    architecture = _architecture(model)
    pairs = _checked_pairs(job)
    alpha = float(pairs[0].alpha(False)) or 1.0  # llama.cpp takes 0 for "no alpha"
    tensors: dict[str, Tensor] = {}
    named = _names(gguf, architecture, pairs)
    for pair, where in zip(pairs, named):
        A, B = _file_form(pair, alpha, architecture)
        for end, value in (("lora_a", A), ("lora_b", B)):
            value = value.detach().cpu().to(DTYPES[dtype]).contiguous()
            if not torch.isfinite(value).all():
                raise Unsupported(
                    f"'{where}.weight.{end}' is not finite in {dtype}.", next_step='dtype="f32"'
                )
            tensors[f"{where}.weight.{end}"] = value
    path = Path(folder)
    path = path if path.suffix == ".gguf" else path / "adapter.gguf"
    put_file(path, lambda temporary: _put(gguf, temporary, architecture, name, alpha, tensors))
    size = sum(t.numel() for t in tensors.values())
    return ExportReport(
        "gguf", path.parent, adapter.method.key, f"lora for {architecture}", len(pairs), len(tensors), size,
        path.stat().st_size, [path.name], None, job.notes,
    )  # fmt: skip


def _architecture(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__
    if kind not in ARCHITECTURES:
        raise Unsupported(
            f"veneer writes no GGUF for a base of type '{kind}'.",
            nearest=nearest(kind, ARCHITECTURES) or sorted(ARCHITECTURES),
            next_step='veneer.export(model, name, folder, format="peft"), and llama.cpp\'s own converter',
        )
    return ARCHITECTURES[kind]


def _checked_pairs(job: Writing) -> list[Pair]:
    """The adapter's pairs; an error that names everything else that it holds."""
    m = job.adapter.method
    if m.key != "lora":
        raise Unsupported(
            f"a GGUF adapter holds LoRA pairs alone; '{job.adapter.name}' is {m.key}, with "
            f"{', '.join(e.key for e in job.plan.entries[:3])}.",
            nearest=("lora",),
            next_step="veneer.merge(model, name), and convert the whole model",
        )
    copies = [
        k for sp, keys in zip(job.plan.sites, job.plan.keys) for k in keys.values()
        if isinstance(sp.method, TrainedCopy | TrainedRows)
    ]  # fmt: skip
    biases = [k for keys in job.plan.keys for n, k in keys.items() if n in ("bias", "base_bias")]
    if copies or biases:
        left = [*copies, *biases]
        raise Unsupported(
            f"a GGUF adapter holds LoRA pairs alone; '{job.adapter.name}' also trains {', '.join(left[:4])} "
            f"({len(left)} tensors).",
            next_step="veneer.merge(model, name), and convert the whole model",
        )
    pairs = pairs_of(job)
    tied = {name for pair in job.host.anatomy.facts.tied for name in pair}
    for p in pairs:
        if p.site.kind not in ("linear", "conv1d", "embedding"):
            raise Unsupported(
                f"a GGUF adapter has no form for '{p.name}', of kind '{p.site.kind}'.",
                next_step="veneer.merge(model, name), and convert the whole model",
            )
        if f"{p.name}.weight" in tied and p.site.kind != "embedding":
            raise Unsupported(
                f"'{p.name}' shares its weight with the embedding; llama.cpp has no tensor of that name.",
                next_step="veneer.merge(model, name), and convert the whole model",
            )
    return pairs


def _names(gguf: Any, architecture: str, pairs: list[Pair]) -> list[str]:
    """llama.cpp's names of the edited weights, without ".weight"."""
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture)
    blocks = max([p.site.blocks for p in pairs] + [1])
    known = gguf.get_tensor_name_map(arch, blocks)
    found = []
    for p in pairs:
        name = known.get_name(p.name)
        if name is None:
            raise UnknownName(
                f"llama.cpp's '{architecture}' has no name for '{p.name}'.",
                next_step="veneer.merge(model, name), and convert the whole model",
            )
        found.append(name)
    return found


def _file_form(pair: Pair, alpha: float, architecture: str) -> tuple[Tensor, Tensor]:
    """lora_a and lora_b: alpha / rank B A is the change, rows in llama.cpp's order."""
    A, B = pair.A, pair.B
    factor = pair.scale * pair.rank / alpha
    B = B * factor if factor != 1 else B
    if pair.site.kind == "embedding":  # rows of the table are looked up in lora_a
        return B, A.mT
    if architecture in INTERLEAVED and pair.site.role in ("attention.query", "attention.key"):
        heads = pair.site.heads if pair.site.role == "attention.query" else pair.site.kv_heads
        B = interleave(B, heads)
    return A, B


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head, first half and second half, taken turn by turn: (heads * d, ...) -> the same shape."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def separate(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def _put(
    gguf: Any, path: Path, architecture: str, name: str, alpha: float, tensors: dict[str, Tensor]
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(name)
        for where, value in tensors.items():
            writer.add_tensor(where, value.numpy())
        steps: list[Callable[[], Any]] = [
            writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file,
        ]  # fmt: skip
        for step in steps:
            step()
    finally:
        writer.close()


__all__ = ["ARCHITECTURES", "interleave", "separate", "write"]
