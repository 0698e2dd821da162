"""Opening a base by what a person types: a folder, a hub id, a GGUF file, timm, a builtin, a function.

One idea: the task decides the class of the head, the spec decides the rest. What a file did not fill is
read from the loader's own report and named in `Base.fresh`, so that nobody takes a random head for a trained
one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.bases._base import Base
from veneer.bases._builtin import BUILTINS, builtin, builtin_folder
from veneer.bases._convert import gguf_options, quiet
from veneer.bases._others import from_function, from_timm
from veneer.bases.matmul import check_form, set_matmul
from veneer.errors import (
    BadFile,
    BadOption,
    UnknownName,
    VeneerError,
    missing_package,
    nearest,
)

HEADS = {
    "classify": "AutoModelForSequenceClassification",
    "multilabel": "AutoModelForSequenceClassification",
    "regress": "AutoModelForSequenceClassification",
    "rank": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
    "qa": "AutoModelForQuestionAnswering",
    "lm": "AutoModelForCausalLM",
    "instruct": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classify": "AutoModelForImageClassification",
    "speech": "AutoModelForSpeechSeq2Seq",
}
PROBLEM_TYPES = {
    "classify": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regress": "regression",
    "rank": "regression",
}
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float64": torch.float64, "fp64": torch.float64,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip


def open_base(
    spec: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    task: str | None = None,
    num_labels: int | None = None,
    quantise: str | None = None,
    matmul: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> Base:
    """The base that `spec` names, in evaluation mode.

    spec: a folder, a hub id, a file.gguf, "timm:NAME", "builtin:NAME", "module:path.py:function".
    dtype: None keeps that of the file. task: one of `HEADS`; None takes the class that the files name.
    quantise: "nf4" or "int8". matmul: how its frozen weights multiply, "plain" (float32), "packed", "bf16" or "int8";
    see `veneer.bases.matmul`, which measures the error of each. seed: of a fresh head's values; None draws from
    torch's generator.
    options: for the loader (`from_pretrained`, `timm.create_model`, or the function).
    Raises UnknownName, BadOption, BadFile, MissingPackage.
    """
    spec = str(spec)
    if task is not None and task not in HEADS:
        raise UnknownName(
            f"no task is called {task!r}.",
            nearest=nearest(task, HEADS),
            next_step=f"one of {', '.join(HEADS)}",
        )
    if quantise not in (None, "nf4", "int8"):
        raise BadOption(
            f"quantise={quantise!r} is not a form that veneer knows.",
            nearest=("nf4", "int8"),
            next_step="quantise='nf4', quantise='int8', or leave it out",
        )
    matmul = check_form(matmul)
    with _seeded(seed):
        base = _by_kind(spec, task, num_labels, torch_dtype(dtype), options)
    if base.kind != "transformers" and dtype is not None:
        base.model.to(torch_dtype(dtype))
    if quantise is not None:
        from veneer.bases.quantised import quantise_model

        quantise_model(base.model, quantise, skip=_heads_of(base))
    if device is not None:
        base.model.to(device)
    base.model.eval()
    if matmul != "plain":
        base.notes.append(str(set_matmul(base.model, matmul)))
    return base


def _by_kind(
    spec: str, task: str | None, num_labels: int | None, dtype: torch.dtype | None, options: dict[str, Any]
) -> Base:
    prefix, _, rest = spec.partition(":")
    if prefix == "builtin":
        row = builtin(rest)
        folder = builtin_folder(rest)
        if row.kind == "network":
            from veneer.bases._networks import open_network

            base = open_network(rest, folder, spec, task, num_labels)
        else:
            base = _from_transformers(folder, spec, rest, task, num_labels, dtype, options)
        base.notes.extend(row.notes)
        return base
    if prefix == "timm":
        return from_timm(spec, rest, task, num_labels, options)
    if prefix == "module":
        return from_function(spec, rest, task, options)
    path = Path(spec).expanduser()
    if spec.endswith(".gguf"):
        if not path.is_file():
            raise BadFile(
                f"there is no file {spec}.",
                next_step="ls    shows what is there; a hub id has the form OWNER/NAME",
            )
        return _from_transformers(path, spec, path.stem, task or "lm", num_labels, dtype, options)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadFile(
                f"the folder {spec} holds no config.json, so it is not a model in transformers' form.",
                next_step="save one with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)",
            )
        return _from_transformers(path, spec, path.resolve().name, task, num_labels, dtype, options)
    return _from_transformers(None, spec, spec, task, num_labels, dtype, options)


def _from_transformers(
    path: Path | None,
    spec: str,
    name: str,
    task: str | None,
    num_labels: int | None,
    dtype: torch.dtype | None,
    options: dict[str, Any],
) -> Base:
    """A model and what feeds it, through transformers; `path` None is a hub id."""
    try:
        import transformers
    except ImportError as error:
        raise missing_package("transformers", "train", f"opening {spec!r}") from error

    place = spec if path is None else str(path)
    where: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    if path is not None and path.suffix == ".gguf":
        place, where, extra = str(path.parent), {"gguf_file": path.name}, gguf_options(path)
    with quiet(), _in_words(spec, path):
        config = transformers.AutoConfig.from_pretrained(place, **where)
        loader = _auto_class(transformers, config, task, spec)
        head: dict[str, Any] = {}
        if task in ("classify", "multilabel", "regress", "rank", "tag", "image-classify"):
            config.num_labels = num_labels or (1 if task in ("regress", "rank") else config.num_labels)
            config.problem_type = PROBLEM_TYPES.get(task)
            head = {"ignore_mismatched_sizes": True}
        model, report = loader.from_pretrained(
            place, config=config, dtype=dtype or "auto", output_loading_info=True, **extra, **head, **options
        )
        feeder = _feeder(transformers, place, where)
    fresh = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    base = Base(model, name, spec, "transformers", task=task, fresh=_parameters_of(model, fresh))
    if _is_tokenizer(transformers, feeder):
        base.tokenizer = feeder
    elif feeder is not None:
        base.processor, base.tokenizer = feeder, getattr(feeder, "tokenizer", None)
    _let_pad(base)
    return base


def _auto_class(transformers: Any, config: Any, task: str | None, spec: str) -> Any:
    """The class that opens the model: by the task, else by the name in the config, else without a head."""
    if task is not None:
        auto = getattr(transformers, HEADS[task])
        if type(config) not in auto._model_mapping:
            raise BadOption(
                f"task={task!r} asks for {HEADS[task]}, which transformers does not have for "
                f"{config.model_type!r}, the architecture of {spec!r}.",
                nearest=[
                    t for t, n in HEADS.items() if type(config) in getattr(transformers, n)._model_mapping
                ],
                next_step="another task, or a base of another architecture",
            )
        return auto
    for named in getattr(config, "architectures", None) or ():
        if hasattr(transformers, named):
            return getattr(transformers, named)
    return transformers.AutoModel


def _feeder(transformers: Any, place: str, where: dict[str, Any]) -> Any:
    """The tokenizer, or else the processor of images or sound; None where the folder has neither."""
    folder = Path(place)
    local = folder.is_dir() and not where
    has_processor = not local or any(
        (folder / n).is_file() for n in ("preprocessor_config.json", "processor_config.json")
    )
    order = [transformers.AutoProcessor, transformers.AutoTokenizer] if local and has_processor else []
    for auto in [*order, transformers.AutoTokenizer, transformers.AutoFeatureExtractor]:
        try:
            found = auto.from_pretrained(place, **where)
            if not _is_tokenizer(transformers, found) or len(found) > len(found.added_tokens_decoder):
                return found  # else: a folder without files gives a tokenizer that knows no word
        except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError):
            continue  # the folder has none of this kind
    return None


def _is_tokenizer(transformers: Any, feeder: Any) -> bool:
    return isinstance(feeder, transformers.PreTrainedTokenizerBase)


def _let_pad(base: Base) -> None:
    """Decoders often have no padding token; batches need one, and a classifying decoder looks for it."""
    tokenizer, config = base.tokenizer, getattr(base.model, "config", None)
    if tokenizer is None or config is None:
        return
    if tokenizer.pad_token_id is not None:
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
        return
    if tokenizer.eos_token is None:
        base.notes.append("the tokenizer has no padding and no end token: batches of one length only")
        return
    tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    base.notes.append(f"the tokenizer had no padding token; the end token {tokenizer.eos_token!r} pads")


def _parameters_of(model: nn.Module, keys: list[str]) -> list[str]:
    """Those of `keys` that are parameters or buffers of the model under exactly this name."""
    known = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {
        n for n, _ in model.named_buffers()
    }
    return [key for key in keys if key in known]


def _heads_of(base: Base) -> tuple[str, ...]:
    """What stays in full precision: modules with fresh parameters, and all that stands beside the body."""
    heads = {name.rsplit(".", 1)[0] for name in base.fresh if "." in name}
    body = getattr(base.model, "base_model_prefix", "")
    if base.kind == "transformers" and hasattr(base.model, body):
        heads |= {name for name, _ in base.model.named_children() if name != body}
    return tuple(sorted(heads | {"classifier"}))


def torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its name, or as it is."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if str(dtype) not in DTYPES:
        raise BadOption(
            f"dtype={dtype!r} is not a floating type that veneer knows.",
            nearest=nearest(dtype, DTYPES),
            next_step="dtype='bfloat16', or leave it out to keep that of the file",
        )
    return DTYPES[str(dtype)]


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _in_words(spec: str, path: Path | None) -> Iterator[None]:
    """Errors of the loader as one line that names the spec and the next step."""
    try:
        yield
    except VeneerError:
        raise
    except ImportError as error:
        raise VeneerError(
            f"{spec!r} needs a package that is not installed: {error}",
            next_step="pip install    the package that the message names",
        ) from error
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if path is None:
            raise UnknownName(
                f"{spec!r} is no folder, no file and could not be opened as a hub id: {first}",
                nearest=[f"builtin:{n}" for n in nearest(spec, BUILTINS)],
                next_step="a folder, a hub id, FILE.gguf, timm:NAME, builtin:NAME or module:path.py:function",
            ) from error
        raise BadFile(
            f"{spec!r} could not be opened: {first}",
            next_step="veneer anatomy SPEC    says more; a folder wants config.json and model.safetensors",
        ) from error
