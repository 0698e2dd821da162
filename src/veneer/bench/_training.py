"""One training step (forward, backward, AdamW) of four methods, and its peak memory in a child process.

LoRA, DoRA and (IA)3 train on the encoder, prefix tuning on the decoder, which HF PEFT's prefixes need. Both sides
start at the same values, see the same batch and loss, and use torch's AdamW as it comes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import veneer
from veneer.errors import VeneerError

from . import _bases, _peer
from ._clock import GRADIENT_TOLERANCE, Arm, check_equal, check_moved, interleaved
from ._report import Expectation, Row
from ._size import Size

SPEED = Expectation(0.95, "What limits it has not been located.")
LORA_SPEED = Expectation.at_most(0.95, "The products are the same; packing them is a form of the matmul.")
LORA_MEMORY = Expectation.at_most(0.70, "What limits it has not been located.")
MEMORY = Expectation(1.0, "What limits it has not been located.")
CHILD = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
METHODS = ("lora", "dora", "ia3", "prefix_tuning")


@dataclass(frozen=True)
class Setting:
    """One method on one base, with a batch of rows x tokens."""

    method: str
    shape: str
    which: str
    rows: int
    tokens: int

    @property
    def words(self) -> str:
        return f"{self.shape}, {self.which}, {self.rows} x {self.tokens}"


def setting_of(method: str, all_linears: bool, size: Size) -> Setting:
    shape = "smollm2" if method == "prefix_tuning" else "minilm"
    which = {"ia3": "key, value, down", "prefix_tuning": "16 positions"}.get(
        method, "all linears, rank 16" if all_linears else "query, value, rank 8"
    )
    tokens = 128 if all_linears else 64
    return Setting(method, shape, which, size.rows // 2, 6 if size.toy else tokens)


def config_of(setting: Setting) -> Any:
    """HF PEFT's config of the same adapter."""
    peft = _peer.peft()
    if setting.method == "prefix_tuning":
        return peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=16)
    if setting.method == "ia3":
        down = r".*\d\.output\.dense"  # the last linear of a block, not that of its attention
        return peft.IA3Config(target_modules=rf".*\.(key|value)|{down}", feedforward_modules=down)
    everywhere = setting.which.startswith("all")
    targets = (_bases.LINEARS if everywhere else _bases.QUERY_VALUE)[setting.shape]
    return _peer.lora(targets, 16 if everywhere else 8, use_dora=setting.method == "dora")


class Sides:
    """The same adapter of one method on both sides, in training mode, with an optimiser each."""

    def __init__(self, setting: Setting, size: Size) -> None:
        self.setting, self.size = setting, size
        self.inputs = _bases.batch(setting.shape, setting.rows, setting.tokens, size.seed, size.toy)
        base = _bases.make(setting.shape, size.seed, size.toy)
        with torch.no_grad():
            self.bare = _bases.hidden(base(**self.inputs))
        self.theirs = _peer.adapted(base, config_of(setting))
        _peer.randomise(self.theirs)
        self.ours = _bases.make(setting.shape, size.seed, size.toy)
        _peer.copy(self.theirs, self.ours, ["default"])
        self.ours.train()
        self.theirs.train()
        generator = torch.Generator().manual_seed(size.seed)
        self.target = torch.randn(self.bare.shape, generator=generator)

    def loss(self, model: Any) -> Tensor:
        """Mean squared distance of the last hidden state from a fixed random one."""
        return nn.functional.mse_loss(_bases.hidden(model(**self.inputs)), self.target)

    def step(self, model: Any, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def run() -> None:
            self.loss(model).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def check(self) -> float:
        """Outputs, and the norm of all gradients, compared."""
        what = f"{self.setting.method}, {self.setting.words}"
        with torch.no_grad():
            ours, theirs = (_bases.hidden(m(**self.inputs)) for m in (self.ours, self.theirs))
        check_moved(what, ours, self.bare)
        error = check_equal(what, ours, theirs)
        norms = []
        for model in (self.ours, self.theirs):
            self.loss(model).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(torch.cat([g.reshape(-1) for g in grads]).norm().reshape(1))
            for p in model.parameters():
                p.grad = None
        check_equal(f"{what}, norm of the gradients", norms[0], norms[1], GRADIENT_TOLERANCE)
        return error

    def arms(self) -> dict[str, Arm]:
        groups = veneer.parameters(self.ours, lr=1e-4)
        trained = [p for p in self.theirs.parameters() if p.requires_grad]
        ours = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.0)
        theirs = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
        return {"veneer": Arm(self.step(self.ours, ours)), "peft": Arm(self.step(self.theirs, theirs))}


def step(method: str, size: Size) -> list[Row]:
    """The time of a step, at the default sites and, for LoRA, on all linears."""
    rows = []
    for everywhere in (False, True) if method == "lora" else (False,):
        setting = setting_of(method, everywhere, size)
        sides = Sides(setting, size)
        error = sides.check()
        found = interleaved(sides.arms(), size.repeats)
        rows.append(
            Row.of(
                method,
                setting.words,
                found["veneer"],
                found["peft"],
                error=error,
                expected=size.expects(LORA_SPEED if method == "lora" else SPEED),
            )
        )
    return rows


# -- memory -----------------------------------------------------------------------------------------------------


def memory(size: Size) -> list[Row]:
    """The high-water mark of a first step over the loaded, adapted model: a child process for each sample.

    Both sides run with glibc's threshold for mapped blocks pinned, so that the mark is what the tensors need: left
    alone, the threshold moves with what was freed before, and holes in the heap are counted (up to a fifth, by luck
    of the order of allocations).
    """
    rows = []
    for method in METHODS:
        setting = setting_of(method, method in ("lora", "dora"), size)
        error = Sides(setting, size).check()
        found: dict[str, list[float]] = {"veneer": [], "peft": []}
        counts = set()
        for _ in range(size.children):
            for side in found:
                job = {"side": side, "method": method, "size": asdict(size)}
                spent, trained = in_child(child, job, f"measures {side}")
                found[side].append(spent)
                counts.add(trained)
        if len(counts) > 1:
            raise VeneerError(
                f"memory, {method}: the two sides train different numbers of values, {sorted(counts)}.",
                next_step="veneer bench --help    shows the rows that can be left out",
            )
        rows.append(
            Row.of("memory", f"{method}, {setting.words}", found["veneer"], found["peft"], unit="bytes",
                   error=error, expected=size.expects(LORA_MEMORY if method == "lora" else MEMORY))
        )  # fmt: skip
    return rows


def in_child(child: Callable[[], None], job: dict[str, Any], what: str) -> Any:
    """What `child` prints, as JSON on its last line, in a process of its own that reads `job` from standard input."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {child.__module__} import {child.__name__} as child; child()"],
        input=json.dumps(job), capture_output=True, text=True, env={**os.environ, **CHILD}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise VeneerError(
            f"the child process that {what} failed: {done.stderr.strip()[-800:]}",
            next_step="veneer doctor    says what is installed",
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def child() -> None:
    """Read one job from standard input; print by how many bytes a step passed what was resident, and what trains."""
    job = json.loads(sys.stdin.read())
    torch.set_num_threads(1)
    size = Size(**{**job["size"], "adapters": tuple(job["size"]["adapters"])})
    setting = setting_of(job["method"], job["method"] in ("lora", "dora"), size)
    inputs = _bases.batch(setting.shape, setting.rows, setting.tokens, size.seed, size.toy)
    model: Any = _bases.make(setting.shape, size.seed, size.toy)
    width = model.config.hidden_size
    if job["side"] == "peft":
        model = _peer.adapted(model, config_of(setting)).train()
        parameters: Any = [p for p in model.parameters() if p.requires_grad]
    else:
        _attach(model, setting)
        model.train()
        parameters = veneer.parameters(model, lr=1e-4)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    target = torch.randn(*inputs["input_ids"].shape, width)

    def step(rows: int, tokens: int) -> None:
        y = _bases.hidden(model(**{k: v[:rows, :tokens] for k, v in inputs.items()}))
        nn.functional.mse_loss(y, target[:rows, :tokens]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(1, 2)  # libraries load their code and the optimiser its state; both stay resident
    trim()
    before = resident(anew=True)
    step(*inputs["input_ids"].shape)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(json.dumps([resident(peak=True) - before, trained]))


def _attach(model: nn.Module, setting: Setting) -> None:
    options: dict[str, Any] = {}
    if setting.method in ("lora", "dora"):
        rank = 16 if setting.which.startswith("all") else 8
        everywhere = ["attention.{query,key,value,output}", "mlp.{up,down}"]
        options = {
            "rank": rank,
            "alpha": 2 * rank,
            "sites": everywhere if rank == 16 else "attention.{query,value}",
        }
    if setting.method == "prefix_tuning":
        options = {"length": 16}
    veneer.attach(model, setting.method, name="mine", **options)


def trim() -> None:
    """Give back what importing left free in the heap, or a step would find room there that nobody counts."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident(anew: bool = False, peak: bool = False) -> int:
    """Bytes that this process holds; anew: its high-water mark begins again there. peak: that mark."""
    if peak:
        return _status("VmHWM")
    found = _status("VmRSS")
    if anew:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    return found


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise VeneerError(
        f"this system does not tell a process its {field}; memory is measured on Linux alone.",
        next_step="veneer bench --help    shows how to leave memory out",
    )
