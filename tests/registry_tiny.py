"""Tiny adapters on disk for the tests of the registry: any method, random values, in either form."""

from __future__ import annotations

import torch

import veneer
from training_tiny import llama

SIZES = {"lora": {"rank": 2}, "vera": {"rank": 4}}


def base(seed=0, vocabulary=32, **options):
    return llama(vocabulary, seed, **options)


def adapter(folder, method="lora", seed=1, model=None, format=None, **options):
    """Write one adapter with random values to `folder`; return the folder."""
    model = model if model is not None else base()
    made = veneer.attach(model, method, "made", **{**SIZES.get(method, {}), **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in made.leaves():
            leaf.copy_(0.3 * torch.randn(leaf.shape, generator=generator))
    if format is None:
        veneer.save(model, "made", folder)
    else:
        veneer.export(model, "made", folder, format=format)
    veneer.detach(model, "made")
    return folder
