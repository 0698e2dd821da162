"""Every method's training step over LoRA's, on the encoder (or the decoder where a method needs one).

Each method at its own defaults. A step is forward, backward and AdamW on the same batch; the reference is veneer's own
LoRA of rank 8 on query and value, in turn with the method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import veneer
from veneer import engine
from veneer.errors import VeneerError

from . import _bases, _drawn
from ._clock import Arm, interleaved
from ._report import Expectation, Row
from ._size import Size

PLAIN = "LoRA, rank 8, query and value"
MOST = 2.0
REASONS = {  # what a step of these has that LoRA's has not
    "boft": "it solves for and multiplies block-diagonal rotations of every linear's input, factor by factor",
    "oft": "it solves for a rotation of every linear's input, and turns the whole input",
    "adalora": "an orthogonality penalty, and the importance of every singular value after each step",
    "full": "every weight has a gradient and an update: a third product a linear, and AdamW over all numbers",
    "diff_pruning": "a dense difference and its gates for every weight: a gradient of each weight, and AdamW over them",
    "fish_mask": "the gradient of every whole weight is formed before its mask is read",
    "shira": "the change is scattered into whole weights, whose gradients are formed before they are picked",
    "fourierft": "an inverse Fourier transform of every edited weight at each step, and its gradient",
    "hira": "a dense product with the weight itself, formed and differentiated at each step",
    "loha": "two low-rank products are multiplied entry by entry: dense changes are formed and differentiated",
    "lokr": "Kronecker factors are multiplied out",
    "prefix_tuning": "longer keys in every attention",
    "prompt_tuning": "longer sequences in every block",
    "p_tuning": "longer sequences in every block",
    "llama_adapter": "a second attention over its prompts in every block",
    "q_peft": "a second attention in every block",
    "unipelt": "three methods and their gates at once",
    "mam": "prefixes and a parallel adapter at once",
    "adapter_fusion": "all its members run, and attention over them, in every block",
    "hyperformer": "its adapters are generated from task embeddings at each step",
}
GENERAL = "Its edits act on more sites, or on wider tensors, than LoRA's; what limits it has not been located"


def methods(size: Size) -> list[Row]:
    rows, beside = [], {}
    for info in veneer.methods()[:3] if size.toy else veneer.methods():
        made = None
        for shape in ("minilm", "smollm2"):
            try:
                made = _row(info.key, shape, size)
                break
            except VeneerError as error:
                beside[info.key] = str(error).splitlines()[0]
        if made is not None:
            rows.append(made)
    left_out = {key: why for key, why in beside.items() if key not in {r.setting.split(",")[0] for r in rows}}
    if rows and left_out:
        rows[-1].notes += [f"not measured: {key}: {why}" for key, why in left_out.items()]
    return rows


def _row(key: str, shape: str, size: Size) -> Row:
    tokens = 6 if size.toy else 64
    inputs = _bases.batch(shape, size.rows // 2, tokens, size.seed, size.toy)
    ours = _step(key, {}, shape, inputs, size)
    lora = _step("lora", {"rank": 8, "sites": _drawn.QUERY_VALUE}, shape, inputs, size)
    spent = interleaved({"method": Arm(ours), "lora": Arm(lora)}, max(2, size.repeats // 2))
    reason = REASONS.get(key, GENERAL)
    expected = Expectation.at_most(MOST, reason[:1].upper() + reason[1:] + ".")
    return Row.of("methods", f"{key}, {shape}, {size.rows // 2} x {tokens}", spent["method"], spent["lora"],
                  reference=PLAIN, expected=size.expects(expected))  # fmt: skip


def _step(key: str, options: dict[str, Any], shape: str, inputs: Any, size: Size) -> Any:
    model: Any = _bases.make(shape, size.seed, size.toy)
    given = dict(options)
    if getattr(veneer.method(key), "needs_members", False):
        for name in ("m0", "m1"):
            _drawn.draw(veneer.attach(model, "pfeiffer_adapter", name=name, activate=False), 7)
        given["of"] = ["m0", "m1"]
    adapter = veneer.attach(model, key, name="mine", **given)
    _drawn.draw(adapter, 1)
    model.train()
    engine.prepare_training(model, 1000)
    if not adapter.leaves():
        raise VeneerError(f"{key} trains nothing on a base without a head.", next_step="a base with one")
    optimizer = torch.optim.AdamW(veneer.parameters(model, lr=1e-6), lr=1e-6, weight_decay=0.0)
    width = model.config.hidden_size
    target = torch.linspace(-1, 1, width)

    def step() -> None:
        y = _bases.hidden(model(**inputs))
        loss = nn.functional.mse_loss(y, target.expand_as(y))
        extra = engine.penalty(model)
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    if not all(torch.isfinite(leaf).all() for leaf in adapter.leaves()):
        raise VeneerError(f"{key}: its step is not finite on this base.", next_step="another base")
    return step
