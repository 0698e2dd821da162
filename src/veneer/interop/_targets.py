"""Which modules an HF PEFT config means, by HF PEFT's own rules, and the selector that names the same sites here.

HF PEFT compares names: a list member is a whole name or the end of one after a dot, a text is a regular expression
for the whole name, "all-linear" every linear layer but the output layer. The list that comes out is compared with
what veneer's selectors make of the same words; where they agree the words are kept, else the modules are named.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from veneer.anatomy import Anatomy
from veneer.errors import BadFile, NoSiteFound, VeneerError, nearest

from ._config import Config


def pattern(text: str, config: Config, option: str) -> re.Pattern[str]:
    """A compiled expression, or BadFile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(text)
    except (re.error, RecursionError, OverflowError) as e:
        raise BadFile(
            f"'{config.path}': {option}={text!r:.60} is no regular expression ({e}).",
            next_step=f"correct {option} in that file",
        ) from None


def matcher(value: str | Iterable[str], config: Config, option: str) -> Callable[[str], bool]:
    """HF PEFT's rule: a text is an expression for the whole name, a list holds names or ends of names."""
    if isinstance(value, str):
        whole = pattern(value, config, option)
        return lambda key: whole.fullmatch(key) is not None
    names = set(value)
    return lambda key: key in names or any(key.endswith(f".{name}") for name in names)


def target_modules(model: nn.Module, anatomy: Anatomy, config: Config) -> list[str]:
    """Names of the modules that the config edits, in the order of the model."""
    wanted = config["target_modules"]
    if wanted is None:
        return []
    names = anatomy.module_names
    every = isinstance(wanted, str) and wanted.lower() == "all-linear"
    if every:
        chosen = set(_all_linear(model, anatomy, config))
        hit: Callable[[str], bool] = chosen.__contains__
    else:
        hit = matcher(wanted, config, "target_modules")
    layers = _layer_filter(config)
    saved = config.get("modules_to_save") or []
    kept_whole = [pattern(rf"(^|.*\.){m}($|\..*)", config, "modules_to_save") for m in saved]
    excluded = config.get("exclude_modules")
    out = matcher(excluded, config, "exclude_modules") if excluded else (lambda key: False)
    found = [
        key for key in names
        if hit(key) and not out(key) and not any(p.match(key) for p in kept_whole)
        and (layers is None or isinstance(wanted, str) or layers(key))
    ]  # fmt: skip
    if found and not isinstance(wanted, str):
        idle = [m for m in wanted if not any(map(matcher([m], config, "target_modules"), names))]
        if idle:
            warnings.warn(
                f"'{config.path}': target_modules also names {', '.join(sorted(idle))}, which no module of this "
                f"{anatomy.model_class} is called.",
                stacklevel=5,
            )
    if not found and wanted:
        raise NoSiteFound(
            f"'{config.path}': target_modules={wanted!r:.80} leaves no module of this {anatomy.model_class}.",
            nearest=_nearest(wanted, names),
            next_step="load it on the base that it was trained on",
        )
    return found


def _all_linear(model: nn.Module, anatomy: Anatomy, config: Config) -> list[str]:
    """Every linear layer (Conv1D too) but the output layer, which HF PEFT finds by the model's own word."""
    linear = [
        s.module for s in anatomy.whole_sites() if s.kind in ("linear", "conv1d") and s.parameter == "weight"
    ]
    tell: Any = getattr(model, "get_output_embeddings", None)
    head = tell() if tell else None
    if head is not None:
        left_out = {name for name, module in model.named_modules() if module is head}
    elif config.raw.get("task_type") == "SEQ_CLS":
        left_out = set([n for n in ("score", "classifier") if hasattr(model, n)][:1])
    else:
        left_out = set()
    return [name for name in linear if name not in left_out]


def _layer_filter(config: Config) -> Callable[[str], bool] | None:
    """layers_to_transform: by the first number in the name, or the first behind a name of layers_pattern."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    wanted = {layers} if isinstance(layers, int) else set(layers)
    heads = config["layers_pattern"] or []
    heads = [heads] if isinstance(heads, str) else heads
    forms = [pattern(rf"(?:^|.*?\.){h}\.(?P<idx>\d+)\.", config, "layers_pattern") for h in heads if h]
    forms = forms or [re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")]

    def inside(key: str) -> bool:
        found = next((m for m in (form.match(key) for form in forms) if m), None)
        return found is not None and int(found["idx"]) in wanted

    return inside


def by_pattern(patterns: Mapping[str, Any], key: str, default: Any, config: Config, option: str) -> Any:
    """rank_pattern and alpha_pattern: the first member that the whole name, or its end after a dot, matches."""
    for name, value in patterns.items():
        if pattern(rf"(.*\.)?({name})$", config, option).match(key):
            return value
    return default


def saved_modules(model: nn.Module, config: Config) -> list[str]:
    """Modules that modules_to_save means: HF PEFT takes every name that *ends* with a member, dot or not."""
    wanted = config["modules_to_save"] or []
    names = [
        n for n, _ in model.named_modules(remove_duplicate=False) if n and n.partition(".")[0] != "veneer"
    ]
    return [n for n in names if any(w and n.endswith(w) for w in wanted)]


def selector(anatomy: Anatomy, modules: list[str], words: Any, port: str = "weight") -> Any:
    """A selector for exactly these modules: the config's own words where they mean the same, else names."""
    own = words if isinstance(words, str) else sorted(words) if words else None
    if own and port == "weight" and _means(anatomy, own, port) == set(modules):
        return own
    return [exact(anatomy, name, port) for name in modules]


def exact(anatomy: Anatomy, name: str, port: str = "weight") -> str:
    """A selector for one module, which its name alone is not where it is a role's name too."""
    return name if _means(anatomy, name, port) == {name} else f"(?:{re.escape(name)})"


def _means(anatomy: Anatomy, words: Any, port: str) -> set[str]:
    try:
        return {s.module for s in anatomy.select(words, port=port)}
    except VeneerError:
        return set()


def words_for(host: Any, modules: list[str], saved: tuple[str, ...] = ()) -> list[str] | str:
    """`target_modules` for exactly these modules: ends of names where they will do, whole names, or an expression."""
    modules = list(dict.fromkeys(modules))
    names = host.anatomy.module_names
    wanted = set(modules)
    for words in (sorted({m.rpartition(".")[2] for m in modules}), sorted(modules)):
        if {n for n in names if any(n == w or n.endswith(f".{w}") for w in words)} == wanted:
            return words
    return expression(modules)


def expression(modules: list[str]) -> str:
    """An expression for exactly these names; one that matches nothing for no name."""
    return "(" + "|".join(re.escape(m) for m in sorted(modules)) + ")" if modules else "(?!)"


def _nearest(wanted: Any, names: list[str]) -> list[str]:
    ends = sorted({n.rpartition(".")[2] for n in names})
    members = [wanted] if isinstance(wanted, str) else list(wanted)
    return [n for m in members[:3] for n in nearest(m, ends)][:5] or ends[:5]
