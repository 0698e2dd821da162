"""LORA of HF PEFT: methods lora and dora.

The same numbers under other names, but for five forms:

| here | in HF PEFT |
|---|---|
| a part of a fused projection | all of it, zero rows in B for the rest; two parts make one pair of both ranks |
| s (B A - B0 A0), a start that W keeps | an ordinary pair of twice the rank: [B, -B0] [A; A0] |
| an embedding's A (rank, width), B (rows, rank) | `lora_embedding_B` = A^T, `lora_embedding_A` = B^T |
| experts' A (experts, rank, in), B (experts, out, rank) | A (experts rank, in), B (out, rank experts) |
| a change of a bias | the bias itself, `base_layer.bias` |
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

from torch import Tensor

from veneer.engine._plan import SitePlan
from veneer.errors import BadFile, NoSiteFound, ShapeDiffers, Unsupported, nearest

from . import _targets
from ._config import TARGETS, Config, Field, only
from ._converter import Converter, Reading, Request, Writing, beside_default, converter
from ._copies import input_embeddings
from ._pairs import check_writable, pairs_of
from ._parameters import nesting, parameter_sites, select_parameters, take_parameter

_REWRITTEN = "its start rewrites the base's weights from data that the folder does not hold"
_VARIANTS: dict[str, Field] = {
    "megatron_config": only(None), "megatron_core": Field("megatron.core"), "loftq_config": only({}, _REWRITTEN),
    "eva_config": Field(None), "corda_config": only(None, _REWRITTEN), "lora_ga_config": only(None, _REWRITTEN),
    "velora_config": only(None), "alora_invocation_tokens": only(None), "use_qalora": only(False),
    "qalora_group_size": Field(16), "monteclora_config": only(None), "layer_replication": only(None),
    "runtime_config": Field(None), "use_bdlora": only(None), "arrow_config": only(None), "kasa_config": only(None),
    "ensure_weight_tying": only(False),
}  # fmt: skip
_START = "an adapter that was saved as an ordinary LoRA (path_initial_model_for_weight_conversion in HF PEFT)"


@converter
class Lora(Converter):
    """LORA: lora, and dora where the config says use_dora."""

    peft_type = "LORA"
    methods: tuple[str, ...] = ("lora", "dora")
    kinds: tuple[str, ...] = ("linear", "conv1d", "conv", "embedding")
    fields = {
        **TARGETS,
        **_VARIANTS,
        "r": Field(8, "whole"),
        "lora_alpha": Field(8, "number"),
        "lora_dropout": Field(0.0, "number"),
        "bias": Field("none", "text"),
        "use_rslora": Field(False, "flag"),
        "init_lora_weights": Field(True, "start"),
        "rank_pattern": Field({}, "numbers by name"),
        "alpha_pattern": Field({}, "numbers by name"),
        "use_dora": Field(False, "flag"),
        "lora_bias": Field(False, "flag"),
        "target_parameters": Field(None, "list of names"),
        "trainable_token_indices": Field(None, "tokens"),
    }

    # -- reading ------------------------------------------------------------------------------------------------

    def request(self, job: Reading) -> Request:
        config = job.config
        parameters = parameter_sites(job)
        modules = self.modules(job) if config["target_modules"] or not parameters else []
        options = self.options(job)
        keys = [(m, _targets.exact(job.anatomy, m)) for m in modules]
        own: Any = _targets.selector(job.anatomy, modules, config["target_modules"]) if modules else []
        if parameters:
            chosen = select_parameters(job, parameters)
            keys += [(name, word) for name, words in chosen for word in words]
            own = ([own] if isinstance(own, str) else list(own)) + [w for _, words in chosen for w in words]
            own = list(dict.fromkeys(own))
            if config["lora_dropout"] or config["lora_bias"] or config["use_dora"]:
                raise BadFile(
                    f"'{config.path}': target_parameters goes with neither dropout, lora_bias nor use_dora.",
                    next_step="lora_dropout=0, lora_bias=false and use_dora=false in that file",
                )
        options["sites"] = own
        options["patterns"] = _patterns(config, keys)
        places = {(m, "weight") for m in modules} | {(s.module, s.parameter) for s in parameters}
        job.nested = nesting(job.host, parameters)
        made = Request(self.method_of(config), options, places)
        token_rows(job, made, config["trainable_token_indices"])
        return made

    def method_of(self, config: Config) -> str:
        return "dora" if config["use_dora"] else "lora"

    def options(self, job: Reading) -> dict[str, Any]:
        c = job.config
        options = {
            "rank": c["r"], "alpha": c["lora_alpha"], "rank_stabilized": c["use_rslora"], "dropout": c["lora_dropout"],
        }  # fmt: skip
        options |= {"init": _start(c), "bias": c["bias"]}
        if not c["use_dora"]:
            return {**options, "lora_bias": c["lora_bias"]}
        if c["lora_bias"]:
            raise Unsupported(
                "LORA: lora_bias=True together with use_dora=True has no form here, and HF PEFT itself refuses it.",
                next_step="an adapter with use_dora=False, or with bias='lora_only'",
            )
        return options

    def take(self, job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
        m: Any = sp.method
        site, file = sp.site, job.file
        n_out, rank, inner = site.shape[0], m.rank, site.shape[1:]
        if (site.module, site.parameter) in job.nested:
            return take_parameter(job, sp, prefix)
        if site.kind == "embedding":
            B = file.take(f"{prefix}lora_embedding_A", (rank, n_out)).mT
            found = {"A": file.take(f"{prefix}lora_embedding_B", (*inner, rank)).mT, "B": B}
            if "columns" in sp.specs:
                found["columns"] = file.take(f"{prefix}lora_magnitude_vector", inner)
            return found
        if site.groups > 1:
            raise Unsupported(f"LORA at '{site.module}', a convolution in {site.groups} groups: HF PEFT's A reads all "
                              "inputs there, which no change of the weight does.", next_step="exclude it")  # fmt: skip
        found = {
            "A": file.take(f"{prefix}lora_A.weight", (rank, *inner)),
            "B": file.take(f"{prefix}lora_B.weight", (n_out, rank, *[1] * (len(inner) - 1))).flatten(1),
        }
        if "magnitude" in sp.specs:
            shapes = (n_out,), (1, n_out, *[1] * (len(inner) - 1))
            found["magnitude"] = file.take(f"{prefix}lora_magnitude_vector", *shapes).flatten()
        if "bias" in sp.specs:
            found["bias"] = file.take(f"{prefix}lora_B.bias", (n_out,))
        return found | own_bias(job, sp, prefix)

    # -- writing ------------------------------------------------------------------------------------------------

    def write(self, job: Writing) -> dict[str, Any]:
        m = job.adapter.method
        pairs = pairs_of(job)
        check_writable(job, pairs)
        ranks = {p.name: (p.rank, p.alpha(m.rank_stabilized)) for p in pairs}
        r, alpha = Counter(ranks.values()).most_common(1)[0][0]
        fields = {
            "r": r, "lora_alpha": alpha, "lora_dropout": m.dropout, "use_rslora": m.rank_stabilized,
            "bias": getattr(m, "bias", "none"), "lora_bias": getattr(m, "lora_bias", False),
            "use_dora": m.key == "dora",
            "rank_pattern": {n: v[0] for n, v in ranks.items() if v[0] != r},
            "alpha_pattern": {n: v[1] for n, v in ranks.items() if v[1] != alpha},
            "fan_in_fan_out": any(p.site.kind == "conv1d" for p in pairs),
        }  # fmt: skip
        # HF PEFT's defaults have changed before: the two that set the scale are always written.
        out = {"r": r, "lora_alpha": alpha, **beside_default(self.fields, fields)}
        modules = [p.site.module for p in pairs if not p.is_parameter]
        out["target_modules"] = _targets.words_for(job.host, modules, job.plan.whole) if modules else []
        if any(p.is_parameter for p in pairs):
            out["target_parameters"] = [p.name for p in pairs if p.is_parameter]
        nested = nesting(job.host, [p.site for p in pairs if p.is_parameter])
        for pair in pairs:
            pair.give(job, nested)
        return out


def _start(config: Config) -> str:
    """`init` of a config's init_lora_weights. Only starts that are subtracted matter to what a folder means."""
    given = config["init_lora_weights"]
    start = {True: "default", False: "none"}.get(given, str(given))
    if start.lower() in ("corda", "loftq", "lora_ga", "mica"):
        why = "half of its tensors stay frozen" if start.lower() == "mica" else _REWRITTEN
        raise Unsupported(f"LORA: init_lora_weights={given!r} has no form here: {why}.", next_step=_START)
    if start.lower().startswith("pissa_niter"):
        warnings.warn(
            f"'{config.path}': init_lora_weights={given!r} is a random approximation in HF PEFT, made at each load; "
            "the exact start is used here.",
            stacklevel=6,
        )
        return "pissa"
    return "default" if start == "eva" else start.lower()


def _patterns(config: Config, keys: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Options by site, for the modules that rank_pattern or alpha_pattern changes."""
    found: dict[str, dict[str, Any]] = {}
    if not (config["rank_pattern"] or config["alpha_pattern"]):
        return found
    for key, selector in keys:
        rank = _targets.by_pattern(config["rank_pattern"], key, config["r"], config, "rank_pattern")
        alpha = _targets.by_pattern(
            config["alpha_pattern"], key, config["lora_alpha"], config, "alpha_pattern"
        )
        if (rank, alpha) != (config["r"], config["lora_alpha"]):
            found[selector] = {"rank": rank, "alpha": alpha}
    for option in ("rank_pattern", "alpha_pattern"):
        for name in config[option]:
            if not any(_targets.pattern(rf"(.*\.)?({name})$", config, option).match(key) for key, _ in keys):
                raise NoSiteFound(
                    f"'{config.path}': {option} names '{name}', which is none of the {len(keys)} places that it edits.",
                    nearest=nearest(name, {k.rpartition(".")[2] for k, _ in keys}),
                    next_step="load it on the base that it was trained on",
                )
    return found


def own_bias(job: Reading, sp: SitePlan, prefix: str) -> dict[str, Tensor]:
    """The change of the base's own bias at an edited site, where it is trained."""
    if "base_bias" not in sp.specs:
        return {}
    bare: Any = job.host.bias(sp.site)
    found = job.file.take(f"{prefix}base_layer.bias", (sp.site.shape[0],))
    return {"base_bias": found - bare.detach().cpu()}


def token_rows(job: Reading, made: Request, given: Any) -> None:
    """The option `trainable_tokens`, and in job.rows {module that reads a table: the table's name in the file}."""
    made.options["trainable_tokens"], job.rows = _token_rows(job, given, made.places)


def _token_rows(job: Reading, given: Any, places: set[tuple[str, str]]) -> tuple[Any, dict[str, str]]:
    if not given:
        return (), {}
    main = input_embeddings(job.model)
    names = [n for n, _ in job.model.named_modules() if n.partition(".")[0] != "veneer"]
    own = next((n for n in names if main is not None and job.host.module(n) is main), "embed_tokens")
    by_name = {own: given} if isinstance(given, list) else given
    edited = {m for m, _ in places}
    option: dict[str, list[int]] = {}
    rows: dict[str, str] = {}
    for name, ids in by_name.items():
        modules = [n for n in names if n.endswith(name)]
        table = getattr(job.host.module(modules[0]), "weight", None) if modules else None
        if len(modules) != 1 or table is None or table.dim() != 2:
            raise NoSiteFound(f"'{job.config.path}': trainable_token_indices names '{name}', which is no single table "
                              "of this base.", nearest=nearest(name, job.anatomy.module_names),
                              next_step="load it on the base that it was trained on")  # fmt: skip
        if len(set(ids)) != len(ids) or (ids and max(ids) >= table.shape[0]):
            raise ShapeDiffers(f"'{job.config.path}': trainable_token_indices of '{name}' go up to {max(ids)}, the "
                               f"table has {table.shape[0]} rows, and each id stands once.",
                               next_step="model.resize_token_embeddings(len(tokenizer)) before loading")  # fmt: skip
        same = _same_table(job, modules[0])
        if edited & same:
            raise Unsupported(f"'{job.config.path}' edits '{min(edited & same)}' and trains rows of it, which HF PEFT "
                              "itself does not run.", next_step="an adapter that does one of them")  # fmt: skip
        known = next((m for m in rows if m in same), None)
        if known is not None and option[rows[known]] != ids:
            raise Unsupported(f"'{job.config.path}' trains other rows of '{modules[0]}' than of '{known}', which is "
                              "the same table in this base.",
                              next_step="load it on a base with tie_word_embeddings=False")  # fmt: skip
        if known is None:
            option[modules[0]] = ids
            rows.update(dict.fromkeys(same, modules[0]))
    tables = {s.module for s in job.anatomy.select("token_embedding", port="weight")}
    if len(option) == 1 and tables <= rows.keys():
        return next(iter(option.values())), rows
    return {_targets.exact(job.anatomy, m): ids for m, ids in option.items()}, rows


def _same_table(job: Reading, module: str) -> set[str]:
    """The module, and all that share its weight."""
    found = {module}
    for _ in range(len(job.anatomy.facts.tied)):
        for pair in job.anatomy.facts.tied:
            owners = {p.rpartition(".")[0] for p in pair}
            if owners & found:
                found |= owners
    return found
