"""The catalogue: what every method is, read off its file and its declared facts.

Nothing here is written a second time: name, equation, options and bounds come from the class, lines from
the file. Two tables add what no file of ours can say: which type of HF PEFT a method answers to, and which
package bears it witness.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import types
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.edits import Method, lookup, registry

# Method -> type of HF PEFT 0.21 that computes the same function, and its options where the type alone does
# not say it.
PARITY = {
    "lora": "LORA",
    "dora": "LORA (use_dora)",
    "adalora": "ADALORA",
    "vera": "VERA",
    "oft": "OFT",
    "ia3": "IA3",
    "prefix_tuning": "PREFIX_TUNING",
    "prompt_tuning": "PROMPT_TUNING",
    "llama_adapter": "ADAPTION_PROMPT",
    "loha": "LOHA",
    "lokr": "LOKR",
    "hira": "HIRA",
    "fourierft": "FOURIERFT",
    "shira": "SHIRA",
    "norm_tuning": "LN_TUNING",
    "boft": "BOFT",
}

# Method -> the package whose own code agrees with ours, or with our reference, in a test.
WITNESS = {**dict.fromkeys(PARITY, "HF PEFT"), "full": "torch", "linear_probe": "torch"}

UNWITNESSED = "unwitnessed"


@dataclass(frozen=True)
class Hyperparameter:
    """One option of a method, as its declaration tells it."""

    name: str
    default: Any
    meaning: str
    alias: tuple[str, ...] = ()  # HF PEFT's names
    bounds: dict[str, Any] = field(default_factory=dict)  # at_least, at_most, more_than, choices
    size: bool = False  # the knob that sets the number of trained parameters


@dataclass(frozen=True)
class MethodInfo:
    """One method of the catalogue."""

    key: str
    name: str
    paper: str
    family: str
    ports: tuple[str, ...]
    mergeable: bool
    certainty: str
    starts_as_identity: bool
    reason: str  # why it does not start as its base
    hyperparameters: tuple[Hyperparameter, ...]
    rates: tuple[float, float]  # learning rates to search
    doc: str  # the file's docstring: equation, shapes, what a user must know
    lines: int  # of the method's file
    shared_lines: int  # of building blocks and parts that no other method uses
    parity: str  # the type of HF PEFT that computes the same, "" where there is none
    witness: str  # the package that agrees in a test, or "unwitnessed"
    not_claimed: tuple[tuple[str, str], ...] = ()  # (law, reason)

    @property
    def sentence(self) -> str:
        """What stands between the name and the citation in the docstring's first sentence."""
        first = self.doc.split("\n\n")[0].replace("\n", " ")
        text = (first.partition(": ")[2] or first).split(". ")[0].strip().rstrip(".")
        return text[:1].upper() + text[1:]

    def to_dict(self) -> dict[str, Any]:
        return _plain(dataclasses.asdict(self)) | {"sentence": self.sentence}

    def __str__(self) -> str:
        merges = "merges" if self.mergeable else "does not merge"
        return f"{self.key}: {self.sentence} ({self.family}; {', '.join(self.ports) or 'no port'}; {merges})"


def method(key: str) -> type[Method]:
    """The class of a method. Raises UnknownMethod with the nearest keys."""
    return lookup(key)


def methods(
    *,
    family: str | None = None,
    port: str | None = None,
    mergeable: bool | None = None,
    parity: bool | None = None,
) -> list[MethodInfo]:
    """All methods, by family and key; those alone that have what is asked for.

    family: a family or its beginning ("additive", "additive/prompt"); port: one that the method uses;
    mergeable: whether it can become part of the base; parity: whether HF PEFT has it.
    """
    found = [info(key) for key in registry()]
    if family is not None:
        found = [m for m in found if f"{m.family}/".startswith(f"{family.strip('/')}/")]
    if port is not None:
        found = [m for m in found if port in m.ports]
    if mergeable is not None:
        found = [m for m in found if m.mergeable is mergeable]
    if parity is not None:
        found = [m for m in found if bool(m.parity) is parity]
    return sorted(found, key=lambda m: (m.family, m.key))


def info(key: str) -> MethodInfo:
    """What the catalogue says of one method. Raises UnknownMethod."""
    cls: Any = lookup(key)
    facts, file = cls.facts, _file(cls)
    return MethodInfo(
        key=facts.key,
        name=cls.__name__,
        paper=facts.paper,
        family=facts.family,
        ports=tuple(cls.ports),
        mergeable=merges(cls),
        certainty=facts.certainty,
        starts_as_identity=facts.starts_as_identity,
        reason=facts.reason,
        hyperparameters=tuple(_hyperparameter(f) for f in dataclasses.fields(cls)),
        rates=tuple(facts.rates),  # type: ignore[arg-type]
        doc=inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""),
        lines=_lines(file),
        shared_lines=_own_blocks().get(str(file), 0),
        parity=getattr(cls, "parity", PARITY.get(facts.key, "")),
        witness=getattr(cls, "witness", WITNESS.get(facts.key, UNWITNESSED)),
        not_claimed=tuple(facts.not_claimed),
    )


def merges(cls: Any) -> bool:
    """Weight edits merge, and edits that scale and shift; nothing else, unless the method says so itself."""
    if cls.facts.mergeable is not None:
        return bool(cls.facts.mergeable)
    affine = "affine" in cls.arguments
    return bool(cls.ports) and all(p == "weight" or (affine and p in ("input", "output")) for p in cls.ports)


def _hyperparameter(f: Any) -> Hyperparameter:
    m = f.metadata
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    meaning = m.get("meaning") or ("where it edits: roles, slices and names" if f.name == "sites" else "")
    bounds = {n: m[n] for n in ("at_least", "at_most", "more_than") if m.get(n) is not None}
    if m.get("choices"):
        bounds["choices"] = tuple(m["choices"])
    return Hyperparameter(f.name, default, meaning, tuple(m.get("alias", ())), bounds, bool(m.get("size")))


# -- size ----------------------------------------------------------------------------------------------------


def _file(cls: Any) -> Path | None:
    try:
        return Path(inspect.getsourcefile(cls) or "")
    except (OSError, TypeError):
        return None


@functools.cache
def _lines(file: Path | None) -> int:
    return len(file.read_text(encoding="utf-8").splitlines()) if file is not None and file.is_file() else 0


@functools.cache
def _own_blocks() -> dict[str, int]:
    """File of a method -> lines of what it alone imports: building blocks of the edits, parts beside the methods.

    Size is total: moving half of a method into a shared room makes nothing smaller.
    """
    import veneer.edits._blocks as blocks

    functions = {n: f for n, f in vars(blocks).items() if inspect.isfunction(f)}
    sizes = {n: len(inspect.getsource(f).splitlines()) for n, f in functions.items()}
    users: dict[str, set[str]] = {}
    for file in {str(_file(cls)) for cls in registry().values()}:
        for name in _imported(Path(file)):
            users.setdefault(name, set()).add(file)
        for part in Path(file).parent.glob("_*.py"):
            if part.stem in _imported(Path(file)):
                sizes[part.stem] = _lines(part)
    total: Counter[str] = Counter()
    for name, files in users.items():
        if len(files) == 1 and name in sizes:
            total[next(iter(files))] += sizes[name]
    return dict(total)


@functools.cache
def _imported(file: Path) -> frozenset[str]:
    if not file.is_file():
        return frozenset()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names} | {(node.module or "").rpartition(".")[2]}
    return frozenset(found)


def _plain(value: Any) -> Any:
    """Lists and dicts that JSON knows."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return [_plain(v) for v in value] if isinstance(value, Iterable) else str(value)


class _Callable(types.ModuleType):
    """The package of the methods has the name of the function: `veneer.methods()` is the catalogue either way."""

    def __call__(self, **filters: Any) -> list[MethodInfo]:
        return methods(**filters)


registry()
sys.modules["veneer.methods"].__class__ = _Callable
