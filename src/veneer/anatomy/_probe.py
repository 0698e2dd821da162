"""The probe: tiny inputs for one forward of any model, and a guard that gives the model back as it was.

Inputs come from the forward's signature and the config where there is one, else from the first layers of
the model. Several guesses are tried in turn; the first that runs is taken.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.anatomy._trace import Tape, record, tensors_in
from veneer.errors import BadOption

TOKENS = 5
_IMAGE_SIDE = 32
_FLAGS = {"use_cache": False}


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards mode, buffers, plain attributes and random state are what they
    were."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    buffers = [
        (module, name, b, b.detach().clone())
        for module in model.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]):
        try:
            for module in model.modules():
                module.__dict__["training"] = False
            yield
        finally:
            for module, name, buffer, copy in buffers:
                if not _same(buffer, copy):
                    buffer.data.copy_(copy)
                module._buffers[name] = buffer
            for module, attributes in before:
                for key in [k for k in module.__dict__ if k not in attributes]:
                    del module.__dict__[key]
                for key, value in attributes.items():
                    if module.__dict__.get(key) is not value:
                        module.__dict__[key] = value


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device.type == "meta" or torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _noise(*shape: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Normal numbers from a generator of their own: the caller's random state stays where it is."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return numbers.to(device=device, dtype=dtype)


def run_probe(
    model: nn.Module, probe: Mapping[str, Any] | Tensor | tuple | None
) -> tuple[Tape | None, Any, list[str]]:
    """(tape of a probe forward or None, its arguments, notes that say why there is none)"""
    if any(p.device.type == "meta" for p in model.parameters()):
        return (
            None,
            None,
            ["parameters are on the meta device: no probe could run, roles come from names and structure"],
        )
    given = probe is not None
    guesses = [_as_arguments(probe)] if given else list(_guesses(model))
    problems: list[str] = []
    for arguments in guesses:
        with untouched(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return record(model, arguments), arguments, []
            except Exception as problem:  # whatever a stranger's forward raises
                problems.append(f"{type(problem).__name__}: {problem}".splitlines()[0][:160])
    if given:
        raise BadOption(
            f"the forward of {type(model).__name__} fails on the probe that was given ({problems[-1]}).",
            next_step="probe=dict(name=tensor, ...) with arguments that model(**probe) accepts",
        )
    why = problems[0] if problems else "no input could be made for its forward"
    return (
        None,
        None,
        [f"no probe forward ran ({why}): roles come from names and structure; pass probe=dict(...)"],
    )


def causal_by_trial(model: nn.Module, arguments: dict[str, Any] | tuple) -> bool:
    """Whether a change of the last token leaves the output at all earlier tokens as it was.

    For models without attention, whose masks cannot be read off: state-space and recurrent ones.
    """
    tensors = list(tensors_in(arguments))
    if len(tensors) != 1 or tensors[0].is_floating_point() or tensors[0].ndim != 2 or tensors[0].shape[1] < 2:
        return False
    ids = tensors[0]

    def output() -> Tensor | None:
        with untouched(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model(**arguments) if isinstance(arguments, dict) else model(*arguments)
        states = [t for t in tensors_in(out) if t.is_floating_point() and t.ndim == 3]
        return next((t.clone() for t in states if t.shape[1] == ids.shape[1]), None)

    before, last = output(), ids[:, -1].clone()
    try:
        ids[:, -1] = ids[:, 0]
        after = output()
    finally:
        ids[:, -1] = last
    if before is None or after is None or torch.equal(before[:, -1], after[:, -1]):
        return False
    return torch.allclose(before[:, :-1], after[:, :-1], atol=1e-6)


def _as_arguments(probe: Any) -> dict[str, Any] | tuple:
    if isinstance(probe, Tensor):
        return (probe,)
    if isinstance(probe, Mapping):
        return dict(probe)
    if isinstance(probe, tuple | list):
        return tuple(probe)
    raise BadOption(
        f"probe={type(probe).__name__}: a dict of arguments or a tensor was expected.",
        next_step="probe={'input_ids': ids}, or the tensor that forward takes first",
    )


def _guesses(model: nn.Module) -> Iterator[dict[str, Any] | tuple]:
    names = _signature(model)
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "main_input_name"):
        yield from _from_config(model, config, names)
    yield from _from_layers(model, names)


def _signature(model: nn.Module) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return {}


# ---------------------------------------------------------------- models with a config


def _setting(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these settings that the config, or a part of it, has."""
    parts = [
        config,
        *(
            getattr(config, p, None)
            for p in ("text_config", "vision_config", "audio_config", "encoder", "decoder")
        ),
    ]
    for part in parts:
        for name in names:
            try:
                value = part.get(name) if isinstance(part, dict) else getattr(part, name, None)
            except Exception:  # a setting that differs from layer to layer refuses to be one number
                continue
            if value is not None and not callable(value):
                return value
    return default


def _ids(config: Any, device: torch.device, length: int = TOKENS) -> Tensor:
    """Distinct token ids that are not special, the last one the end of the text (heads look for it)."""
    size = int(_setting(config, "vocab_size", default=32))
    named = ("pad", "bos", "eos", "decoder_start", "image", "video", "audio")
    special: set[int] = set()
    for name in named:
        value = _setting(config, f"{name}_token_id")
        special |= set(value) if isinstance(value, tuple | list) else {value}
    usable = [i for i in range(3, min(size, 1000)) if i not in special] or list(range(size))
    ids = [usable[i % len(usable)] for i in range(length)]
    end = _setting(config, "eos_token_id")
    end = end[0] if isinstance(end, tuple | list) and end else end
    if isinstance(end, int) and 0 <= end < size:
        ids[-1] = end
    return torch.tensor([ids], device=device)


def _grid(config: Any, name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Patches of one 4 x 4 image, flattened, as the vision towers of Qwen-VL and its kin take them."""
    patch = int(_setting(config, "patch_size", default=14))
    depth = int(_setting(config, "temporal_patch_size", default=1))
    channels = int(_setting(config, "in_channels", "num_channels", "in_chans", default=3))
    patches = _noise(16, channels * depth * patch * patch, device=device, dtype=dtype)
    return {name: patches, "grid_thw": torch.tensor([[1, 4, 4]], device=device)}


def _from_config(
    model: nn.Module, config: Any, names: dict[str, inspect.Parameter]
) -> Iterator[dict[str, Any]]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    flags = {k: v for k, v in _FLAGS.items() if k in names}
    decoder = {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        decoder = {"decoder_input_ids": _ids(config, device)[:, :-1]}
    main = getattr(model, "main_input_name", "input_ids")
    inputs: list[dict[str, Any]] = []
    images = _images(config, device, dtype) if "pixel_values" in names else []
    text = {"input_ids": _ids(config, device)} if "input_ids" in names else {}
    if "grid_thw" in names:
        inputs.append(_grid(config, next(iter(names)), device, dtype))
    if images and text:
        inputs += [text | image for image in images]
    if text:
        inputs.append(text)
    inputs += images
    if main == "input_features":
        mels = int(_setting(config, "num_mel_bins", "feature_size", "input_feat_per_channel", default=80))
        frames = 2 * int(_setting(config, "max_source_positions", default=20))
        inputs += [{main: _noise(1, mels, frames, device=device, dtype=dtype)}]
        inputs += [{main: _noise(1, 24, mels, device=device, dtype=dtype)}]
    if main == "input_values":
        inputs.append({main: _noise(1, 1600, device=device, dtype=dtype)})
        inputs.append({main: _noise(1, int(_setting(config, "max_length", default=64)),
            int(_setting(config, "num_mel_bins", default=16)),
                                         device=device, dtype=dtype)})  # fmt: skip
    width = int(_setting(config, "hidden_size", "d_model", default=32))
    for given in inputs or [{main: _noise(1, TOKENS, width, device=device, dtype=dtype)}]:
        arguments = {**given, **decoder, **flags}
        yield arguments
        if "bbox" in names and "input_ids" in given:
            yield {
                **arguments,
                "bbox": torch.zeros(1, given["input_ids"].shape[1], 4, dtype=torch.long, device=device),
            }


def _images(config: Any, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    channels = int(_setting(config, "num_channels", "in_channels", "in_chans", default=3))
    size = _setting(config, "image_size", "img_size", "input_size")
    size = (
        [int(s) for s in size][-2:]
        if isinstance(size, tuple | list)
        else [int(size)] * 2
        if isinstance(size, int)
        else []
    )
    sides = [size] if size else [[_IMAGE_SIDE] * 2, [4 * _IMAGE_SIDE] * 2, [224, 224]]
    frames = _setting(config, "num_frames", default=0)
    shapes = [(1, channels, *side) for side in sides]
    if isinstance(frames, int) and frames:  # video: (batch, frame, channel, height, width)
        shapes = [(1, frames, channels, *side) for side in sides] + shapes
    return [{"pixel_values": _noise(*shape, device=device, dtype=dtype)} for shape in shapes]


# ---------------------------------------------------------------- models without


def _from_layers(model: nn.Module, names: dict[str, inspect.Parameter]) -> Iterator[dict[str, Any] | tuple]:
    """One tensor for each argument without a default, of the kind that the first layers take."""
    needed = [
        p
        for p in names.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if not needed and names:
        needed = [next(iter(names.values()))]
    count = max(1, len(needed))
    for kind in _kinds(model):
        yield tuple(kind.clone() for _ in range(count))
        if count > 1:
            yield (kind,)


def _kinds(model: nn.Module) -> Iterator[Tensor]:
    p = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(1))
    make: dict[str, Any] = {"device": p.device, "dtype": p.dtype}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield (torch.arange(TOKENS, device=p.device) % module.num_embeddings)[None]
        elif isinstance(module, nn.Conv2d):
            yield from (
                _noise(1, module.in_channels, side, side, **make)
                for side in (_IMAGE_SIDE, 2 * _IMAGE_SIDE, 224)
            )
        elif isinstance(module, nn.Conv1d):
            yield _noise(1, module.in_channels, 4 * _IMAGE_SIDE, **make)
        elif isinstance(module, nn.Conv3d):
            yield _noise(1, module.in_channels, 8, _IMAGE_SIDE, _IMAGE_SIDE, **make)
        elif isinstance(module, nn.RNNBase):
            yield _noise(1, TOKENS, module.input_size, **make)
        elif isinstance(module, nn.RNNCellBase):
            yield _noise(1, module.input_size, **make)
        elif isinstance(module, nn.MultiheadAttention):
            yield _noise(1, TOKENS, module.embed_dim, **make)
        elif hasattr(module, "in_features") and isinstance(module.in_features, int):
            yield _noise(1, module.in_features, **make)
            yield _noise(1, TOKENS, module.in_features, **make)
        else:
            continue
        return
