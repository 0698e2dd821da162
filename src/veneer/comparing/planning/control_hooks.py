"""What controls change in the training of their anchor, as hooks: see `veneer.comparing.planning.controls`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.comparing.planning.arms import Arm
from veneer.comparing.running.ledger import write_atomic

BROKEN = -8.0
OTHER_DRAWS = 10_000
"""Added to the seed of a duplicate."""


def _updates(model: Any) -> dict[str, dict[str, Tensor]]:
    """{site: {"A", "B"}} of the adapter that is trained: views that can be written in place."""
    from veneer import engine

    found: dict[str, dict[str, Tensor]] = {}
    for name, value in engine.trainable(model).items():
        site, _, tensor = name.rpartition("/")
        if tensor in ("A", "B"):
            found.setdefault(site, {})[tensor] = value
    return {site: pair for site, pair in found.items() if len(pair) == 2}


def _norm(pair: Mapping[str, Tensor]) -> float:
    """Frobenius norm of B A, without forming it."""
    A, B = pair["A"].flatten(pair["B"].dim() - 1), pair["B"]
    return float(((A @ A.mT) * (B.mT @ B)).sum().clamp_min(0).sqrt())


class Norms:
    """A hook that keeps the norm of the update at every site, as it is behind the last step."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}

    @torch.no_grad()
    def between_steps(self, run: Any, step: int) -> None:
        self.of = {site: _norm(pair) for site, pair in _updates(run.model).items()}


def anchors_of(arms: Iterable[Arm]) -> frozenset[str]:
    """The arms whose norms a random direction among `arms` will need."""
    return frozenset(str(arm.anchor) for arm in arms if arm.method == "random_direction")


def keep_norms(norms: Norms, output: Path, seed: int, rate: float | None) -> None:
    """Beside the folder of the run that they are of, which may not stay."""
    said = {"seed": seed, "learning_rate": rate, "norms": norms.of}
    write_atomic(_norms_path(output), json.dumps(said) + "\n")


def kept_norms(arm: Arm, output: Path, seed: int, rate: float | None) -> Norms | None:
    """The norms of the anchor's own run with this seed and rate, where it kept them: it is not trained again.

    output: the folder of the random direction's run, in the same comparison.
    """
    path = _norms_path(output.parent.parent / arm.anchor.slug / output.name)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if (said.get("seed"), said.get("learning_rate")) != (seed, rate) or not said.get("norms"):
        return None
    found = Norms()
    found.of = said["norms"]
    return found


def _norms_path(output: Path) -> Path:
    return output.with_name(f"norms-{output.name}.json")


class RandomDirection:
    """A hook that keeps the update at a random direction of the given norms; all else trains."""

    def __init__(self, norms: Mapping[str, float], seed: int) -> None:
        self.norms, self.seed = norms, seed
        self.drawn: dict[str, dict[str, Tensor]] = {}

    @property
    def size(self) -> int:
        """Numbers of the adapter that do not train."""
        return sum(value.numel() for pair in self.drawn.values() for value in pair.values())

    @torch.no_grad()
    def phases(self, run: Any) -> tuple[()]:
        """Where a run begins or goes on: the same draws at every site."""
        for number, (site, pair) in enumerate(sorted(_updates(run.model).items())):
            draw = torch.Generator().manual_seed(self.seed * 100_003 + number)
            new = {n: torch.randn(v.shape, generator=draw).to(v) for n, v in sorted(pair.items())}
            new["B"] *= self.norms.get(site, 0.0) / max(_norm(new), 1e-30)
            self.drawn[site] = new
        self._put(run)
        return ()

    def on_gradients(self, run: Any, step: int) -> None:
        from veneer import engine

        adapter = engine.adapters(run.model)[run.subject.name]  # others may train beside it
        for key, gradient in adapter.gradients().items():
            if key.rpartition("/")[2] in ("A", "B"):
                gradient.zero_()

    def between_steps(self, run: Any, step: int) -> None:
        self._put(run)  # weight decay and momentum have moved it

    @torch.no_grad()
    def _put(self, run: Any) -> None:
        for site, pair in _updates(run.model).items():
            for name, value in pair.items():
                value.copy_(self.drawn[site][name])


class BrokenScale:
    """A hook that multiplies the trained update by `BROKEN` when training is over."""

    def phases(self, run: Any) -> list[Any]:
        from veneer.training import Phase

        return [Phase(exit=self._break)]

    @torch.no_grad()
    def _break(self, run: Any) -> None:
        for pair in _updates(run.model).values():
            pair["B"].mul_(BROKEN)


def changes(arm: Arm, seed: int, norms: Norms | None = None) -> dict[str, Any]:
    """What a run of a control has otherwise than one of its anchor, as options of training; nothing for other arms.

    norms: of the anchor's run with this seed, for a random direction.
    """
    if arm.method == "duplicate":
        return {"seed": seed + OTHER_DRAWS}
    if arm.method == "broken_scale":
        # Without early stopping, which would put back what was there before it broke.
        return {"hooks": [BrokenScale()], "early_stopping": None}
    if arm.method == "random_direction" and norms is not None:
        return {"hooks": [RandomDirection(norms.of, seed)]}
    return {}


def fixed_numbers(changed: Mapping[str, Any]) -> int:
    """Of a run with these options, numbers of its adapter that did not train."""
    return sum(hook.size for hook in changed.get("hooks", ()) if isinstance(hook, RandomDirection))
