"""Where arms disagree, item by item: which items one arm gets right and another does not.

Two arms with the same mean may err on different items, which no mean tells; and a reader who distrusts a
difference wants to see what it is made of. All items are counted; those that arms dispute most are shown.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from veneer.comparing.reporting.items import clean

MOST_ITEMS = 300
MOST_ARMS = 40
MOST_BYTES = 700_000  # of what is embedded, pictures included
CLEAR = 0.5  # of the seeds: by so much two arms must differ on an item whose scores are right or wrong


@dataclass(frozen=True)
class ItemScores:
    """mean: (arm, item), over the seeds. is_right_or_wrong: every score is 0 or 1, so a mean is a share of seeds.

    sign: -1 where lower scores are better.
    """

    arms: tuple[str, ...]
    items: tuple[str, ...]
    mean: np.ndarray
    seeds: int
    is_right_or_wrong: bool
    sign: float = 1.0

    @property
    def least(self) -> float:
        return CLEAR if self.is_right_or_wrong else 1e-12


def read_scores(path: Path, arms: Sequence[str], sign: float = 1.0) -> ItemScores:
    """Of the arms named, from scores.jsonl."""
    place = {arm: number for number, arm in enumerate(arms)}
    items: dict[str, int] = {}
    sums: list[Counter[int]] = [Counter() for _ in arms]
    counts: list[Counter[int]] = [Counter() for _ in arms]
    binary = True
    with open(path, encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            arm = place.get(line["arm"])
            if arm is None or "item" not in line:  # one number for a whole run
                continue
            item = items.setdefault(line["item"], len(items))
            sums[arm][item] += line["score"]
            counts[arm][item] += 1
            binary = binary and line["score"] in (0.0, 1.0)
    mean = np.array([[s[i] / max(1, c[i]) for i in range(len(items))] for s, c in zip(sums, counts)])
    seeds = max((max(count.values(), default=0) for count in counts), default=0)
    return ItemScores(tuple(arms), tuple(items), mean.reshape(len(arms), len(items)), seeds, binary, sign)


def most_disputed(mean: np.ndarray, most: int = MOST_ITEMS) -> list[int]:
    """(arm, item) -> places of the items on which the arms differ most, the most disputed first."""
    return [int(place) for place in np.argsort(-mean.var(0), kind="stable")[:most]]


def pair_counts(scores: ItemScores) -> dict[str, list[int]]:
    """{"0,1": [items that the first arm gets clearly better, that the second does]} of all pairs, over all items."""
    found = {}
    for first in range(len(scores.arms)):
        for second in range(first + 1, len(scores.arms)):
            difference = scores.sign * (scores.mean[first] - scores.mean[second])
            better, worse = difference >= scores.least, difference <= -scores.least
            found[f"{first},{second}"] = [int(better.sum()), int(worse.sum())]
    return found


def predictions_of(
    path: Path, arms: Sequence[str], items: Sequence[str]
) -> dict[tuple[str, str], tuple[str, int]]:
    """{(arm, item): (the most frequent prediction over seeds, how often)}, and under ("", item) the label."""
    wanted, found = set(items), dict[tuple[str, str], Counter[str]]()
    known = set(arms)
    with open(path, encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            if line.get("item") not in wanted or line["arm"] not in known:
                continue
            for key, name in (("prediction", line["arm"]), ("label", "")):
                if line.get(key) is not None:
                    found.setdefault((name, line["item"]), Counter())[clean(_text(line[key]), 160)] += 1
    return {key: counter.most_common(1)[0] for key, counter in found.items()}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def embedded(
    path: Path, arms: Sequence[str], shown: Mapping[str, Mapping[str, Any]], sign: float = 1.0
) -> dict[str, Any] | None:
    """What the page holds of scores.jsonl: arms, counts of all pairs, and the items that are disputed most.

    An item is {"i": id, "t": text, "g": picture, "l": label, "s": [mean score by arm], "p": [place of the
    prediction in "said", or -1, by arm]}. sign: -1 where lower scores are better. None for fewer than two arms,
    or where no items are known.
    """
    arms = list(arms)[:MOST_ARMS]
    if len(arms) < 2 or not path.is_file():
        return None
    scores = read_scores(path, arms, sign)
    if not scores.items:
        return None
    places = most_disputed(scores.mean)
    said_by = predictions_of(path, arms, [scores.items[place] for place in places])
    texts: dict[str, int] = {}
    found: list[dict[str, Any]] = []
    used = 0
    for place in places:
        item = scores.items[place]
        one: dict[str, Any] = {"i": item, "s": [round(float(v), 4) for v in scores.mean[:, place]]}
        predicted = [said_by.get((arm, item)) for arm in arms]
        one["p"] = [-1 if p is None else texts.setdefault(p[0], len(texts)) for p in predicted]
        label, known = said_by.get(("", item)), shown.get(item, {})
        one |= {
            key: value
            for key, value in (("l", label and label[0]), ("t", known.get("text")), ("g", known.get("image")))
            if value
        }
        used += len(json.dumps(one, ensure_ascii=False).encode())
        if used + sum(map(len, texts)) > MOST_BYTES:
            break
        found.append(one)
    return {
        "arms": arms,
        "seeds": scores.seeds,
        "binary": scores.is_right_or_wrong,
        "least": scores.least,
        "sign": sign,
        "items": found,
        "all": len(scores.items),
        "said": list(texts),
        "pairs": pair_counts(scores),
    }


def first_pair(summary: Mapping[str, Any], arms: Sequence[str]) -> tuple[str, str]:
    """The pair that is shown first: the recommended arm, and the highest mean or else the next."""
    chosen = summary["recommendation"]["arm"]
    other = next(arm for arm in arms if arm != chosen)
    return (chosen, other) if chosen in arms else (arms[0], arms[1])


def of_pair(data: Mapping[str, Any], first: str, second: str, most: int) -> list[dict[str, Any]]:
    """The shown items on which two arms differ clearly, the widest first: for the page without a script."""
    a, b = data["arms"].index(first), data["arms"].index(second)
    differing = [one for one in data["items"] if abs(one["s"][a] - one["s"][b]) >= data["least"]]
    differing.sort(key=lambda one: -abs(one["s"][a] - one["s"][b]))
    return differing[:most]
