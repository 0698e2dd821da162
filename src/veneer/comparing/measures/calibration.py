"""Is an arm as sure as it is right? Calibration on the test split, and how much a repeated run differs.

Expected calibration error (Guo et al., 2017, arXiv:1706.04599): the mean distance of confidence (the probability of
the class that was chosen) and accuracy over bins. Bins hold equal numbers of items (Nguyen and O'Connor, 2015,
arXiv:1508.05154), because bins of equal width are nearly empty where a trained model is hardly ever unsure. The error
is never negative, so that a perfectly calibrated arm has one too, from chance alone: `by_chance` says how large. The
Brier score, a mean over items, has a crossed interval like the primary metric.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from veneer.comparing.inference.statistics import CONFIDENCE, Array, crossed_interval

BINS = 15
CHANCE_DRAWS = 200


def confidence_of(prediction: Mapping[str, Any]) -> dict[str, float]:
    """{"confidence", "brier"} of one item with class probabilities and a label, else nothing.

    brier: the sum over classes of the squared distance of probability and truth, in [0, 2].
    """
    probabilities, label, said = (prediction.get(key) for key in ("probabilities", "label", "prediction"))
    if not isinstance(probabilities, Mapping) or not isinstance(label, str) or not isinstance(said, str):
        return {}  # several labels, a number, or tags
    if label not in probabilities or said not in probabilities:
        return {}
    brier = sum((float(p) - (name == label)) ** 2 for name, p in probabilities.items())
    return {"confidence": float(probabilities[said]), "brier": brier}


def bin_edges(confidence: Array, bins: int = BINS) -> Array:
    """Inner edges of bins with equal numbers of items; equal confidences stay together, so there may be fewer."""
    return np.unique(np.quantile(confidence, np.arange(1, bins) / bins, method="lower"))


def calibration_error(confidence: Array, right: Array, bins: int = BINS) -> float:
    """(item,), (item,) -> mean |confidence - accuracy| over bins of equal numbers of items."""
    place = np.digitize(confidence, bin_edges(confidence, bins), right=True)
    return float(np.abs(np.bincount(place, confidence - right)).sum() / len(confidence))


def error_by_chance(confidence: Array, bins: int = BINS, draws: int = CHANCE_DRAWS) -> float:
    """The error to expect of an arm with these confidences that is perfectly calibrated."""
    rng = np.random.default_rng(0)
    place = np.digitize(confidence, bin_edges(confidence, bins), right=True)
    right = rng.random((draws, len(confidence))) < confidence
    gaps = np.stack([np.bincount(place, one) for one in confidence - right])
    return float(np.abs(gaps).sum(1).mean() / len(confidence))


def over_seeds(values: Sequence[float], confidence: float = CONFIDENCE) -> dict[str, float | None]:
    """{"mean", "low", "high"}: a t interval over seeds; no bounds with one seed."""
    from scipy import stats

    known = np.array([value for value in values if np.isfinite(value)])
    if not len(known):
        return {"mean": None, "low": None, "high": None}
    mean = float(known.mean())
    if len(known) == 1:
        return {"mean": mean, "low": None, "high": None}
    half = float(stats.t.ppf((1 + confidence) / 2, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _within(found: dict[str, float | None]) -> dict[str, float | None]:
    """Cut to what a share can be."""
    return {key: None if value is None else min(1.0, max(0.0, value)) for key, value in found.items()}


def reliability(confidence: Array, right: Array, bins: int = BINS) -> list[dict[str, Any]]:
    """Rows of a reliability table over (seed, item): n a seed, confidence, accuracy with its interval over seeds."""
    edges = bin_edges(confidence.ravel(), bins)
    place = np.digitize(confidence, edges, right=True)
    table = []
    for number in range(len(edges) + 1):
        inside = place == number
        counts = inside.sum(1)
        if not counts.any():
            continue
        with np.errstate(invalid="ignore"):
            accuracy = (right * inside).sum(1) / counts
        table.append(
            {
                "n": float(counts.mean()),
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(right[inside].mean()),
                **{key: _within(over_seeds(list(accuracy)))[key] for key in ("low", "high")},
            }
        )
    return table


def calibration(opened: Sequence[Mapping[str, Any] | None], distinct: bool = True) -> dict[str, Any] | None:
    """The section of one arm from its opened runs, or None where items have no confidence.

    Runs that diverged are left out and counted. distinct: False where every run is the same one.
    """
    runs = [run["items"] for run in opened if run is not None]
    if not runs or any("confidence" not in item for items in runs for item in items):
        return None
    runs = [sorted(items, key=lambda item: item["item"]) for items in (runs if distinct else runs[:1])]
    confidence, right = (_matrix(runs, key) for key in ("confidence", "score"))
    errors = [calibration_error(c, r) for c, r in zip(confidence, right, strict=True)]
    surplus = crossed_interval(confidence - right)
    score = (
        crossed_interval(_matrix(runs, "brier"))
        if all("brier" in i for items in runs for i in items)
        else None
    )
    return {
        "bins": BINS,
        "error": _within(over_seeds(errors)),
        "by_chance": float(np.mean([error_by_chance(row) for row in confidence])),
        "overconfidence": {"mean": surplus.estimate, "low": surplus.low, "high": surplus.high},
        "brier": score and {"mean": score.estimate, "low": score.low, "high": score.high},
        "reliability": reliability(confidence, right),
        "seeds": len(runs),
        "diverged": sum(run is None for run in opened),
    }


def _matrix(runs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> Array:
    """(seed, item)"""
    return np.array([[item[key] for item in items] for items in runs], dtype=np.float64)


def stability(means: Array, confidence: float = CONFIDENCE, resamples: int = 4000) -> dict[str, Any]:
    """Standard deviation over seeds of the mean test score: (seed,) -> {"deviation", "low", "high", ...}.

    low and high are the interval for normal seeds (chi-square); `bootstrap_low` and `bootstrap_high` are the
    bias-corrected and accelerated bootstrap, which from six seeds covers too seldom and is shown beside it.
    """
    from scipy import stats

    count = len(means)
    names = ("deviation", "low", "high", "bootstrap_low", "bootstrap_high")
    if count < 2:
        return dict.fromkeys(names)
    deviation = float(means.std(ddof=1))
    if deviation < 1e-12:
        return dict.fromkeys(names, 0.0)
    tails = stats.chi2.ppf([(1 + confidence) / 2, (1 - confidence) / 2], count - 1)
    low, high = deviation * np.sqrt((count - 1) / tails)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):  # a resample may hold one seed alone
        warnings.simplefilter("ignore")
        found = stats.bootstrap(
            (means,), lambda x, axis: np.std(x, ddof=1, axis=axis), vectorized=True, n_resamples=resamples,
            confidence_level=confidence, method="BCa", rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    bounds = [deviation, low, high, found.low, found.high]
    return {
        name: float(value) if np.isfinite(value) else None for name, value in zip(names, bounds, strict=True)
    }
