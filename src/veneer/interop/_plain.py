"""What types have in common that edit a module's weight by tensors of their own, one set a module.

Such a converter says which hyperparameter is which field, which of them differ by pattern, and how tensors are
called (`take`, `give`). Choosing modules, patterns and refusals are the same for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from veneer.anatomy import Site
from veneer.engine._plan import SitePlan
from veneer.errors import NoSiteFound, Unsupported, nearest

from . import _targets
from ._config import TARGETS, Field
from ._converter import OWN_FORM, Converter, Reading, Request, Writing, beside_default

PLAIN = {k: v for k, v in TARGETS.items() if k != "fan_in_fan_out"}
BY_PATTERN = {"rank_pattern": Field({}, "numbers by name"), "alpha_pattern": Field({}, "numbers by name")}


class Plain(Converter):
    """A weight edit with the same options at all sites, but for those in `patterned`."""

    same: ClassVar[Mapping[str, str]] = {}  # hyperparameter -> field
    patterned: ClassVar[Mapping[str, str]] = {}  # hyperparameter -> its field; "rank_pattern" for field "r"
    kernels: ClassVar[int] = 2  # axes of the largest kernel that HF PEFT holds

    def options(self, job: Reading) -> dict[str, Any]:
        return {name: job.config[field] for name, field in {**self.same, **self.patterned}.items()}

    def request(self, job: Reading) -> Request:
        made = super().request(job)
        made.options["patterns"] = self._patterns(job, sorted(m for m, _ in made.places))
        return made

    def check_sites(self, job: Reading, modules: list[str]) -> None:
        super().check_sites(job, modules)
        for site in job.anatomy.whole_sites():
            if site.module in modules and site.parameter == "weight":
                self.check_site(site)

    def check_site(self, site: Site) -> None:
        """Raise Unsupported for a site that HF PEFT cannot hold, or holds as another function."""
        if site.kind not in self.kinds or len(site.shape) > 2 + self.kernels:
            what = f"a kernel of {site.shape[2:]}" if site.kind in self.kinds else f"of kind '{site.kind}'"
            raise Unsupported(
                f"{self.peft_type} at '{site.name}', {what}, has no form in HF PEFT.", next_step=OWN_FORM
            )

    def check_whole(self, site: Site) -> None:
        """Raise Unsupported for a part of a fused projection, where zero rows have no form."""
        if site.ranges:
            raise Unsupported(f"{self.peft_type} at '{site.name}', a part of a fused projection, has no form in HF "
                              "PEFT.", next_step="edit all of it, by its module name")  # fmt: skip

    def _patterns(self, job: Reading, modules: list[str]) -> dict[str, dict[str, Any]]:
        """Options by site, for the modules whose value a pattern changes."""
        config, found = job.config, {}
        for name in modules:
            own = {}
            for option, field in self.patterned.items():
                pattern = pattern_of(field)
                value = _targets.by_pattern(config[pattern], name, config[field], config, pattern)
                if value != config[field]:
                    own[option] = value
            if own:
                found[_targets.exact(job.anatomy, name)] = own
        for pattern in map(pattern_of, self.patterned.values()):
            for key in config[pattern]:
                if not any(_targets.by_pattern({key: True}, n, False, config, pattern) for n in modules):
                    raise NoSiteFound(
                        f"'{config.path}': {pattern} names '{key}', which is none of the {len(modules)} modules that "
                        "it edits.",
                        nearest=nearest(key, {n.rpartition(".")[2] for n in modules}),
                        next_step="load it on the base that it was trained on",
                    )
        return found

    def write(self, job: Writing) -> dict[str, Any]:
        methods: dict[str, Any] = {}
        sites = []
        for sp, t in zip(job.plan.sites, job.values()):
            if sp.part != 0:
                continue
            site = sp.site
            self.check_site(site)
            if site.module in methods:
                raise Unsupported(f"{self.peft_type} at '{site.name}', two parts of one fused projection, has no form "
                                  "in HF PEFT.", next_step="edit all of it, by its module name")  # fmt: skip
            methods[site.module] = sp.method
            sites.append(site)
            self.give(job, sp, t, f"{job.prefix}{site.module}.")
        fields = {field: self._one(field, {getattr(m, name) for m in methods.values()})
                  for name, field in self.same.items()}  # fmt: skip
        usual = {"r": fields["r"]} if "r" in fields else {}
        for name, field in self.patterned.items():
            values = {module: getattr(own, name) for module, own in methods.items()}
            usual[field] = Counter(values.values()).most_common(1)[0][0]
            fields[pattern_of(field)] = {n: v for n, v in values.items() if v != usual[field]}
        if "fan_in_fan_out" in self.fields:
            fields["fan_in_fan_out"] = any(site.kind == "conv1d" for site in sites)
        words = _targets.words_for(job.host, list(methods), job.plan.whole)
        # HF PEFT's defaults have changed before: sizes are always written.
        return {**usual, **beside_default(self.fields, fields), "target_modules": words}

    def _one(self, field: str, values: set[Any]) -> Any:
        if len(values) > 1:
            raise Unsupported(
                f"{self.peft_type}: HF PEFT has one {field} for all sites; these are {sorted(values)}.",
                next_step=OWN_FORM,
            )
        return next(iter(values))

    def give(self, job: Writing, sp: SitePlan, t: dict[str, Tensor], prefix: str) -> None:
        """Put a site's tensors into job.tensors, as HF PEFT calls them. prefix: "base_model.model.a.b."."""
        raise NotImplementedError


def pattern_of(field: str) -> str:
    return {"r": "rank_pattern"}.get(field, f"{field}_pattern")
