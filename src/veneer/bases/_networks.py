"""The built-in bases that are not transformers models: from a package's files to a network and its feeder."""

from __future__ import annotations

import math
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.bases._base import Base
from veneer.bases._convert import fill
from veneer.bases._nets import EfficientNetLite0, SpeakerLSTM, Translator
from veneer.errors import BadFile, BadOption, missing_package


def open_network(name: str, folder: Path, spec: str, task: str | None, num_labels: int | None) -> Base:
    """The network in a folder that one of the functions below has made, and what feeds it."""
    from safetensors.torch import load_file

    fits = {"efficientnet-lite0": "image-classify", "speaker-lstm": None}.get(name, "seq2seq")
    if task not in (None, fits):
        raise BadOption(
            f"{spec} has no head for task={task!r}.",
            nearest=[fits] if fits else [],
            next_step=f"task={fits!r}" if fits else "veneer doctor    lists the builtin bases",
        )
    state = load_file(folder / "model.safetensors")
    base = Base(_network(name, num_labels), name, spec, "network", task=task)
    own = base.model.state_dict()
    kept = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    base.model.load_state_dict(kept, strict=False)
    base.fresh = sorted(n for n, _ in base.model.named_parameters() if n not in kept)
    if name.startswith("bergamot"):
        base.tokenizer = _translator_tokenizer(folder)
    elif name.startswith("efficientnet"):
        base.processor = Pictures()
    else:
        base.processor = Voices()
    return base


def _network(name: str, num_labels: int | None) -> nn.Module:
    if name == "efficientnet-lite0":
        return EfficientNetLite0(num_labels or 1000)
    return SpeakerLSTM(num_labels) if name == "speaker-lstm" else Translator()


def _save(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")


def efficientnet_folder(file: Path, folder: Path) -> None:
    """The published names to ours; both list a block's layers in one order."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    renamed = {}
    for key, value in state.items():
        has_expand = "_blocks.0." not in key
        for pattern, ours in (
            (r"^_conv_stem", "stem"), (r"^_bn0", "stem_norm"), (r"^_conv_head", "head_conv"),
            (r"^_bn1", "head_norm"), (r"^_fc", "classifier"), (r"^_blocks", "blocks"),
            (r"_expand_conv", "expand"), (r"_depthwise_conv", "depthwise"), (r"_project_conv", "project"),
            (r"_bn0", "expand_norm" if has_expand else "depthwise_norm"),
            (r"_bn1", "depthwise_norm"), (r"_bn2", "project_norm"),
        ):  # fmt: skip
            key = re.sub(pattern, ours, key)
        renamed[key] = value
    model = EfficientNetLite0()
    fill(model, renamed)
    _save(model, folder)


def speaker_folder(file: Path, folder: Path) -> None:
    state = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
    model = SpeakerLSTM()
    fill(model, {k: v for k, v in state.items() if k.startswith(("lstm.", "linear."))})
    _save(model, folder)


def translator_folder(source: Path, folder: Path) -> None:
    """Marian's 8-bit file and its tokenizer."""
    model = Translator()
    fill(model, _translator_names(read_marian(next(source.glob("model*.bin")).read_bytes())))
    _save(model, folder)
    shutil.copy(source / "tokenizer.json", folder / "tokenizer.json")


def read_marian(data: bytes) -> dict[str, Tensor]:
    """The tensors of a Marian `.bin` file (version 1) in float32, matrices as (out, in).

    u64 version, u64 n; n headers of u64 name length, type, dimensions, bytes; names; i32 shapes; u64 padding
    and that many bytes; contents. Type 0x404 is float32. Type 0x4101 is 8-bit: the values, then a float32 m,
    and the weight is value / m; all of these but the embedding are stored transposed.
    """
    version, count = struct.unpack_from("<2Q", data, 0)
    if version != 1:
        raise BadFile(
            f"the file is of Marian's form {version}; veneer reads form 1.",
            next_step="the model in transformers' own form: veneer train --model FOLDER",
        )
    headers = list(struct.iter_unpack("<4Q", data[16 : 16 + 32 * count]))
    at = 16 + 32 * count
    names, shapes = [], []
    for length, *_ in headers:
        names.append(data[at : at + length].rstrip(b"\0").decode())
        at += length
    for _, _, rank, _ in headers:
        shapes.append(struct.unpack_from(f"<{rank}i", data, at))
        at += 4 * rank
    at += 8 + struct.unpack_from("<Q", data, at)[0]
    found = {}
    for name, shape, (_, kind, _, size) in zip(names, shapes, headers):
        content = bytearray(data[at : at + size])
        at += size
        if kind == 0x404:
            found[name] = torch.frombuffer(content, dtype=torch.float32)[: math.prod(shape)].reshape(shape)
        elif kind == 0x4101:
            values = torch.frombuffer(content, dtype=torch.int8)[: math.prod(shape)].float()
            (scale,) = struct.unpack_from("<f", content, math.prod(shape))
            found[name] = values.reshape(shape if name == "Wemb" else shape[::-1]) / scale
    return found


def _translator_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {"embedding.weight": found["Wemb"], "logit_bias": found["decoder_ff_logit_out_b"].view(-1)}
    letters = {"q": "query", "k": "key", "v": "value", "o": "output"}
    for name, value in found.items():
        part = re.fullmatch(r"(encoder|decoder)_l(\d+)_(self|context|ffn|rnn)_(.+)", name)
        if part is None or part[4].endswith("QuantMultA"):
            continue
        side, kind, what = part[1], part[3], part[4]
        norm = {
            "self": "attention_norm",
            "context": "cross_norm",
            "ffn": "mlp_norm",
            "rnn": "recurrence_norm",
        }[kind]
        if what.endswith(("ln_scale", "ln_bias")):
            ours = f"{norm}.{'weight' if what.endswith('scale') else 'bias'}"
        elif kind == "ffn":
            ours = f"mlp.{'up' if what[1] == '1' else 'down'}.{'weight' if what[0] == 'W' else 'bias'}"
        elif kind == "rnn":
            ours = {"W": "candidate.weight", "Wf": "forget.weight", "bf": "forget.bias"}[what]
            ours = f"recurrence.{ours}"
        else:
            module = "attention" if kind == "self" else "cross_attention"
            ours = f"{module}.{letters[what[1]]}.{'weight' if what[0] == 'W' else 'bias'}"
        is_vector = ours.endswith("bias") or "norm" in ours
        state[f"{side}.{int(part[2]) - 1}.{ours}"] = value.reshape(-1) if is_vector else value
    return state


def _translator_tokenizer(folder: Path) -> Any:
    """Its pieces, with the end behind every text."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


class Pictures:
    """Pictures for EfficientNet-Lite0: (batch, 3, 224, 224), values (byte - 127) / 128."""

    size = 224

    def __call__(self, images: Any, return_tensors: str = "pt", **options: Any) -> dict[str, Tensor]:
        """images: PIL images or arrays (height, width[, 3]) of bytes, one or several."""
        several = images if isinstance(images, (list, tuple)) else [images]
        return {"pixel_values": torch.stack([self._one(image) for image in several])}

    def _one(self, image: Any) -> Tensor:
        try:
            import numpy
        except ImportError as error:
            raise missing_package("numpy", "train", "reading pictures") from error
        grid = torch.from_numpy(numpy.array(image)).float()
        grid = grid[..., None].expand(*grid.shape, 3) if grid.ndim == 2 else grid[..., :3]
        x = grid.permute(2, 0, 1)[None]
        x = nn.functional.interpolate(
            x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
        )
        return (x[0].round().clamp(0, 255) - 127) / 128


class Voices:
    """Sound for the speaker network: (batch, frame, 40) mel energies of 25 ms every 10 ms at 16 kHz."""

    sampling_rate, window, hop, bands = 16000, 400, 160, 40
    level = -30.0  # decibels of full scale that a quieter voice is raised to

    def __call__(self, sounds: Any, return_tensors: str = "pt", **options: Any) -> dict[str, Tensor]:
        """sounds: arrays of samples in [-1, 1], one or several; shorter ones are repeated to the longest."""
        several = sounds if isinstance(sounds, (list, tuple)) else [sounds]
        frames = [self._one(torch.as_tensor(sound, dtype=torch.float32)) for sound in several]
        longest = max(len(f) for f in frames)
        return {"input_features": torch.stack([f.repeat(-(-longest // len(f)), 1)[:longest] for f in frames])}

    def _one(self, wave: Tensor) -> Tensor:
        loudness = 10 * torch.log10(wave.square().mean().clamp(min=1e-12))
        wave = wave * 10 ** (max(0.0, self.level - float(loudness)) / 20)
        shape = torch.hann_window(self.window)
        spectrum = torch.stft(
            wave, self.window, self.hop, window=shape, pad_mode="constant", return_complex=True
        ).abs().square()  # fmt: skip
        return (mel_filters(self.bands, self.window // 2 + 1, self.sampling_rate) @ spectrum).T


def mel_filters(bands: int, bins: int, rate: int) -> Tensor:
    """(bands, bins) triangles of equal area on Slaney's mel scale: linear to 1 kHz, logarithmic above."""
    step, break_at, ratio = 200 / 3, 15.0, math.log(6.4) / 27
    top = break_at + math.log(rate / 2 / 1000) / ratio
    mels = torch.linspace(0, top, bands + 2)
    hertz = torch.where(mels < break_at, mels * step, 1000 * torch.exp(ratio * (mels - break_at)))
    at = torch.linspace(0, rate / 2, bins)
    low, middle, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    triangles = torch.minimum((at - low) / (middle - low), (high - at) / (high - middle)).clamp(min=0)
    return triangles * 2 / (high - low)
