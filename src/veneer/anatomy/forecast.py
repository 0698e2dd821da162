"""Forecasts: how much memory a training step will need, before anything runs.

An estimate from formulas, not a measurement: what torch and its kernels keep besides is left out, so that a
forecast is a lower bound that is usually within a third of the truth for transformers.
"""

from __future__ import annotations

import torch

from veneer.anatomy._types import BaseFacts
from veneer.errors import BadOption, nearest

# Bytes a trained number costs in optimiser state, by the name of the optimiser.
OPTIMISERS = {"sgd": 0, "momentum": 4, "adam": 8, "adamw": 8, "adafactor": 1, "adamw-8bit": 2, "lion": 4}

# Hidden states that one block keeps for its backward, in units of (token, width): the input of each norm,
# of the projections and of the activation. With an inner width of 4: Korthikanti et al., 2022,
# arXiv:2205.05198, count 34 bytes a token and width in half precision (17 numbers), dropout masks
# included; 16 without them.
KEPT_BY_BLOCK = 16.0
WORKSPACE = 3  # gradients and outputs of the widest tensor's size that a backward has at a time
LOGITS_HELD = 3 << 24  # bytes: a piece of the logits, its softmax, and what a softmax needs beside


def memory(
    facts: BaseFacts,
    n_parameters: int,
    trainable: int,
    batch_size: int = 8,
    length: int = 256,
    *,
    dtype: torch.dtype = torch.float32,
    bytes_of_weights: int | None = None,
    trained_dtype: torch.dtype = torch.float32,
    optimiser: str = "adamw",
    checkpointing: bool = False,
    heads: int = 0,
    fused_attention: bool = True,
    lowest_block: int = 0,
    copies: int = 0,
    kept: int | None = None,
    largest: int = 0,
) -> dict[str, int]:
    """Bytes of a training step, by what they hold, and their total. A base with `n_parameters`, of which
    (or beside which) `trainable` are trained.

    With B rows, L tokens, width d, n blocks from the lowest trained one up, and b bytes a number:

        activations = n B L d b 16            a block keeps about 16 hidden states for its backward
                    + n B h L^2 b             the scores, where attention is not fused
        checkpointed: n B L d b + one block
        logits      = 2 B L vocabulary 4      the logits in float32 and their gradient; causal models only, and
                                              never more than the pieces that training makes of them

    `bytes_of_weights` is what the base really takes (quantised forms); else n_parameters times the size of
    `dtype`. `copies`: bytes that a form of the frozen matmul keeps beside them. `kept`: bytes of
    activations that were seen, in place of the formula's; `largest`: those of the largest of them, of which a backward
    holds WORKSPACE besides.
    """
    for name, value in (
        ("n_parameters", n_parameters),
        ("trainable", trainable),
        ("batch_size", batch_size),
        ("length", length),
    ):
        if value < 0:
            raise BadOption(f"{name}={value} is negative.", next_step=f"{name}=0 or more")
    if optimiser not in OPTIMISERS:
        raise BadOption(
            f"optimiser={optimiser!r} is not known to the forecast.",
            nearest=nearest(optimiser, OPTIMISERS),
            next_step="optimiser='adamw'",
        )
    size, trained_size = dtype.itemsize, trained_dtype.itemsize
    added = trainable if trainable < n_parameters else 0  # full fine-tuning trains the base's own numbers
    weights = (n_parameters * size if bytes_of_weights is None else bytes_of_weights) + added * trained_size
    blocks = max(0, sum(len(names) for _, names in facts.blocks) - lowest_block)
    state = batch_size * length * facts.width * size
    block = int(KEPT_BY_BLOCK * state)
    if not fused_attention:
        block += batch_size * heads * length * length * size
    activations = blocks * state + block if checkpointing and blocks else blocks * block
    if kept is not None:
        activations = kept
    logits = min(2 * batch_size * length * facts.vocabulary * 4, LOGITS_HELD) if facts.causal else 0
    found = {
        "weights": weights,
        "gradients": trainable * trained_size,
        "optimiser": trainable * OPTIMISERS[optimiser],
        "activations": activations if trainable else 0,
        "logits": logits,
        **({"copies": copies} if copies else {}),
        **({"workspace": WORKSPACE * largest} if kept is not None and trainable else {}),
    }
    return {**found, "total": sum(found.values())}
