"""The other half of what is written down: every parameter as a site, and the facts of the whole base."""

from __future__ import annotations

import dataclasses

from torch import nn

from veneer.anatomy._findings import Findings
from veneer.anatomy._sites import Places, block_width, weight_site
from veneer.anatomy._structure import Weight, join, tied_parameters, weights
from veneer.anatomy._types import BaseFacts, Site


def parameter_sites(model: nn.Module, known: dict[tuple[str, str], Weight], found: Findings) -> list[Site]:
    """Every parameter once: a weight of known kind as that kind, all others as they are stored."""
    places = Places(found.stacks)
    _pairs, canonical = tied_parameters(model)
    by_name = {join(*key): weight for key, weight in known.items()}
    sites = []
    for module_name, module in model.named_modules():
        for parameter, p in module.named_parameters(recurse=False):
            full = join(module_name, parameter)
            if canonical.get(full, full) != full:
                continue
            weight = by_name.get(full)
            if weight is not None:
                sites.append(weight_site(dataclasses.replace(weight, bias=""), places, "parameter", full))
                continue
            shape = tuple(p.shape)
            n_out, n_in = (shape[0] if shape else 1), (shape[-1] if len(shape) > 1 else 0)
            sites.append(Site(full, "parameter", module_name, "parameter", parameter, "", shape, n_in=n_in,
                n_out=n_out,
                              width=shape[-1] if shape else 1, **places.fields(module_name)))  # fmt: skip
    return sites


def bias_names(model: nn.Module, known: dict[tuple[str, str], Weight]) -> set[str]:
    """Full names of all bias parameters: those of known weights, and vectors called a bias."""
    names = {join(w.module, w.bias) for w in known.values() if w.bias}
    for name, p in model.named_parameters(remove_duplicate=False):
        if "bias" in name.rpartition(".")[2] and p.ndim == 1:
            names.add(name)
    return names


def build_facts(model: nn.Module, known: dict, found: Findings) -> BaseFacts:
    """What is true of the whole base, in the lead's own form."""
    pairs, _ = tied_parameters(model)
    backbones: list[str] = []
    for stack in found.stacks:
        backbones += [b for b in stack.backbones if b not in backbones]
    main = found.stacks[-1] if found.stacks else None
    token = next((s.token_embedding for s in found.stacks if s.token_embedding), found.loose_embedding)
    loose = (("", found.loose_embedding),) if found.loose_embedding else ()
    vocabulary = next((w.n_in for w in known.values() if w.module == token and w.kind == "embedding"), 0)
    last = (("", found.loose_final),) if found.loose_final else ()
    loose_width = found.widths.get(found.loose_final, 0) if found.loose_final else 0
    width = block_width(main.blocks[-1], known, found) or main.width if main else loose_width
    return BaseFacts(
        blocks=tuple((s.name, tuple(s.blocks)) for s in found.stacks if s.callable),
        backbones=tuple(backbones),
        embeddings=tuple((s.name, s.embedding) for s in found.stacks if s.embedding) or loose,
        token_embeddings=tuple((s.name,
            s.token_embedding) for s in found.stacks if s.token_embedding) or loose,
        finals=tuple((s.name, s.final) for s in found.stacks if s.final) or last,
        head=found.head, pooler=found.pooler, tied=tuple(pairs), encoder_decoder=found.encoder_decoder,
        causal=found.causal, positions=found.positions, class_token=found.class_token,
            norm_place=found.norm_place,
        width=width, vocabulary=vocabulary,
    )  # fmt: skip


def known_weights(model: nn.Module, found: Findings | None = None) -> dict[tuple[str, str], Weight]:
    """`weights`, corrected by what a trace saw: orientation of bare matrices, norms, and where a weight is
    used."""
    known = weights(model)
    if found is None:
        return known
    experts = {part.key for part in found.parts if part.role.startswith("expert.")}
    for key in [k for k, w in known.items() if w.kind == "experts" and k not in experts]:
        del known[key]  # three axes that are no experts (heads apart, as in XLNet): no matrix of any port
    for key, (module, parameter) in found.rehomed.items():
        old = known.get(key)
        if old is None:
            continue
        bias = join(parameter.rpartition(".")[0], old.bias) if old.bias else ""
        # In the place of the old one: the order of the sites stays that of the modules.
        known = {
            (module, parameter) if k == key else k: dataclasses.replace(
                w, module=module, parameter=parameter, bias=bias, kind="parameter"
            )
            if k == key
            else w
            for k, w in known.items()
        }
        for part in found.parts:
            part.key = (module, parameter) if part.key == key else part.key
    for key, transposed in found.transposed.items():
        weight = known.get(key)
        if weight is not None and transposed != weight.transposed and weight.kind in ("experts", "parameter"):
            n_in, n_out = weight.n_out, weight.n_in
            known[key] = dataclasses.replace(
                weight, transposed=transposed, shape=(n_out, n_in), n_in=n_in, n_out=n_out
            )
    return known
