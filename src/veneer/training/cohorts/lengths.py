"""Which batches share a forward, by the length of their rows: what is filled up is computed for nothing.

A batch has rows of like length already, but the batches of several members at one step do not. The cost of a forward
is taken as its tokens, those that are filled up among them, and a constant for the call.
"""

from __future__ import annotations

from collections.abc import Sequence

ONE_MORE = 64
"""Tokens that cost, forward and backward, about what one more call of the base does by itself; on a CPU."""


def of_like_length(sizes: Sequence[tuple[int, int]], one_more: int) -> list[list[int]]:
    """Places of batches in groups of the smallest sum of padded tokens and `one_more` a group.

    sizes: (rows, tokens of a row) of each batch. A group takes its batches from neighbours by length, since any other
    choice pads more; which neighbours is found exactly. Longest group first; within a group in the order given.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i][1], i))
    best: list[tuple[float, int]] = [(0.0, 0)]  # (cost, start of the last group) of the first n of `order`
    for end in range(1, len(order) + 1):
        rows, found = 0, (float("inf"), 0)
        for start in reversed(range(end)):
            rows += sizes[order[start]][0]
            cost = best[start][0] + rows * sizes[order[start]][1] + one_more
            if cost <= found[0]:
                found = (cost, start)
        best.append(found)
    groups, end = [], len(order)
    while end:
        start = best[end][1]
        groups.append(sorted(order[start:end]))
        end = start
    return groups[::-1]
