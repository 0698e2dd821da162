"""The comparison file: a question as TOML or YAML, with the fields that the flags of `veneer compare` have.

Whatever was typed, `comparison.toml` in the output folder says it again, so that any comparison can be repeated
from its folder. Names and kinds of values are checked here, before a model or a data set is opened.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.comparing.planning.kinds import KINDS
from veneer.comparing.running.ledger import write_atomic
from veneer.errors import BadFile, BadOption, UnknownOption, nearest

FIELDS: dict[str, tuple[str, str]] = {
    "model": ("text", "what is opened as a base"),
    "models": ("texts", "several bases, instead of model"),
    "data": ("data", "a data set; a list or [[data]] tables for several"),
    "methods": ("texts", "arms, method[:option=value,...][+recipe], or families"),
    "output": ("text", "the folder of the comparison"),
    "task": ("text", "default: found from the data"),
    "metric": ("text", "default: the task's"),
    "budget": ("text", "published, demo, examples=N, tokens=N, minutes=N"),
    "seeds": ("seeds", "how many runs of each arm, or the list of their seeds; default 6"),
    "tuning_seeds": ("seeds", "the list of the seeds on which rates are tried; default [0]"),
    "trials": ("count", "learning rates of each arm; default 7"),
    "extend_rates": ("count", "further rates on each side where the best lies on the edge; default 2"),
    "halving": ("flag", "try every rate on a part of the budget, and the better half on twice as much; default false"),
    "rates": ("rates", "learning rates by arm or method; default: spaced over the range that the method declares"),
    "contrasts": ("pairs", "planned pairs of arms; default: all against the best"),
    "correction": ("text", "holm (planned) or fdr_bh (screens)"),
    "smallest_effect": ("number", "the smallest difference that would matter; default 0.01"),
    "controls": ("texts", "further controls: duplicate, broken_scale; none leaves out random_direction too"),
    "match_parameters": ("share", "choose sizes so that each arm trains as many parameters as LoRA, within 2%"),
    "match_to": ("count", "trained parameters of every arm, instead of LoRA's"),
    "costs": ("flag", "measure each arm alone in a process when all is done; default true"),
    "columns": ("any", "which column is what: text=...,label=..."),
    "group": ("text", "a column whose rows stay in one split"),
    "sizes": ("any", "of the splits: validation=500,test=0.1"),
    "split": ("text", "this split of the source alone, cut anew"),
    "groups": ("text", "a column: scores by its values, the worst group and the gap"),
    "shifted": ("texts", "other test sets of the same task and labels"),
    "corrupt": ("texts", "corruptions of the test split, kind:severity, or all"),
    "forgetting": ("texts", "off-task sets on which the bare base is compared with itself after training"),
    "near_duplicates": ("number", "overlap from which on training rows that copy held-out ones are left out; "
                        "default 0.8, 1 for equal ones"),
    "device": ("text", "cpu, cuda, cuda:1, mps"),
    "dtype": ("text", "of the base: float32, bfloat16, float16"),
    "claim": ("table", "a published claim, and the rule that decides it"),
}  # fmt: skip
"""{field: (kind of value, meaning)}. Fields of training (max_length, batch_size, ...) stand beside them."""

ALIASES = {
    "arms": "methods",
    "method": "methods",
    "contrast": "contrasts",
    "base": "model",
    "bases": "models",
}


def training_fields() -> set[str]:
    """Options of every training, the same for all arms; seed and rate are the design's own."""
    from veneer.training import Settings

    taken = {"seed", "learning_rate", "identity", "evaluate_on"}
    return {*Settings.__dataclass_fields__, "max_length", "quantise", "matmul", "whole"} - taken


def read_comparison(path: str | Path) -> dict[str, Any]:
    """The fields of a comparison file, checked. Errors: BadFile (with the line), UnknownOption, BadOption."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(
            f"the comparison file {path} cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8'}.",
            next_step="veneer compare FILE.toml, or --model, --data, --methods and --output",
        ) from None
    plain = _parsed(text, path)
    if not isinstance(plain, Mapping):
        raise BadFile(
            f"{path} holds a {type(plain).__name__}: expected fields with values.",
            next_step='a line a field, as in  model = "builtin:minilm"',
        )
    return checked(plain, str(path))


def _parsed(text: str, path: Path) -> Any:
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise BadFile(
                f"{path} is no TOML: {error}.", next_step="texts are quoted, lists are [a, b]"
            ) from None
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
            said = getattr(error, "problem", None) or "it cannot be parsed"
            raise BadFile(
                f"{path} is no YAML: {said}{where}.", next_step="a line a field: model: NAME"
            ) from None
    raise BadFile(
        f"{path}: a comparison file ends in .toml, .yaml or .yml.",
        next_step="results made elsewhere are read with --from",
    )


def checked(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields under their own names, each of its kind. `source` is what the message names."""
    found: dict[str, Any] = {}
    of_training = training_fields()
    names = [*FIELDS, *ALIASES, *sorted(of_training), "options"]
    for typed, value in given.items():
        key = str(typed).replace("-", "_")
        name = ALIASES.get(key, key)
        if name == "options" and isinstance(value, Mapping):
            again = checked(value, f"{source} [options]")
        elif name not in FIELDS and name not in of_training:
            raise UnknownOption(
                f"{source}: a comparison has no field '{typed}'.",
                nearest=nearest(key, names),
                next_step="the fields are " + ", ".join(FIELDS) + ", and those of training",
            )
        else:
            again = {name: _of_kind(name, value, source) if name in FIELDS else value}
        for each in again:
            if each in found:
                raise BadOption(f"{source}: '{each}' is given twice.", next_step="give it once")
        found |= again
    for one, many in (("model", "models"),):
        if one in found and many in found:
            raise BadOption(f"{source}: '{one}' and '{many}' are both given.", next_step=f"give {many} alone")
    return found


def _of_kind(name: str, value: Any, source: str) -> Any:
    kind = FIELDS[name][0]
    try:
        return KINDS[kind][1](value)
    except (TypeError, ValueError):
        raise BadOption(
            f"{source}: {name} = {value!r:.80}: expected {KINDS[kind][0]}.",
            next_step=f"{name}: {FIELDS[name][1]}",
        ) from None


# -- writing -------------------------------------------------------------------------------------


def write_comparison(path: str | Path, fields: Mapping[str, Any], design: str = "") -> None:
    """Write `fields` as a TOML file that `read_comparison` reads back; `design` is the hash to note in it."""
    lines = ["# veneer compare comparison.toml    repeats this comparison"]
    if design:
        lines.append(f"# design {design}")
    flat = {key: value for key, value in fields.items() if not _is_table(value) and value is not None}
    lines += [f"{_key(key)} = {_toml(value)}" for key, value in flat.items()]
    for key, value in fields.items():
        if isinstance(value, Mapping) and value:
            lines += [
                "",
                f"[{_key(key)}]",
                *(f"{_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None),
            ]
        elif _is_table(value) and value:
            for table in value:
                lines += ["", f"[[{_key(key)}]]", *(f"{_key(k)} = {_toml(v)}" for k, v in table.items())]
    write_atomic(Path(path), "\n".join(lines) + "\n")


def _is_table(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and bool(value)
    return isinstance(value, Mapping) or (is_list and all(isinstance(one, Mapping) for one in value))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's too; DEL is the one character that JSON leaves as it is and TOML refuses.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return _quoted(str(value))
