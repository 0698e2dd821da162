"""Servers of others beside `veneer serve`, where they are installed: the same texts at the same time, one adapter.

A peer has the adapter merged into its weights, which costs it nothing; here it stays an adapter. Each server's cost is
the CPU time of its own process; the load comes from a third one. Answers are compared before anything is timed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

import veneer
from veneer.errors import VeneerError

from . import _bases, _drawn
from ._clock import Quartiles
from ._report import Row
from ._serve import Version, _child, _server
from ._size import Size

NEW, AT_ONCE = 8, 8
LEAST_EQUAL = 0.75  # of greedy texts: rounding may turn a near tie, and then the rest of a text
STARTS = 300.0  # seconds that a peer may take until it answers


@dataclass(frozen=True)
class Peer:
    """A server that speaks OpenAI's completions. options: of its command, behind the folder and the port."""

    name: str
    options: tuple[str, ...] = ()

    def command(self, folder: Path, port: int) -> list[str]:
        begin = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
        given = ["serve", str(folder), "--device", "cpu", "--dtype", "float32", "--port", str(port)]
        return [sys.executable, "-c", begin, *given, *self.options]

    def request(self, prompt: str, new: int, folder: Path) -> dict[str, Any]:
        """It knows no `ignore_eos`; as many tokens as were asked for come by its generation config."""
        config = {"min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return {
            "model": str(folder),
            "prompt": prompt,
            "max_tokens": new,
            "generation_config": json.dumps(config),
        }


PEERS = (
    Peer("transformers serve"),
    Peer(
        "transformers serve --continuous-batching",
        (
            "--continuous-batching",
            "--cb-num-blocks",
            "64",
            "--cb-block-size",
            "32",
            "--cb-max-batch-tokens",
            "512",
        ),
    ),
)


class Running:
    """A server and its cost so far. spent: CPU seconds of its process."""

    def __init__(self, name: str, url: str, process: Any, requests: list[dict[str, Any]]) -> None:
        self.name, self.url, self.process, self.requests = name, url, process, requests
        self.fields: dict[str, Any] = {"stream": True, "temperature": 0}
        self.costs: list[float] = []
        self.clock: list[float] = []  # tokens a second

    @property
    def spent(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def texts(self) -> list[str]:
        with httpx.Client(timeout=STARTS) as web:
            answers = [
                web.post(self.url + "/v1/completions", json={**r, **self.fields, "stream": False})
                for r in self.requests
            ]
        for answer in answers:
            if answer.status_code != 200:
                raise VeneerError(
                    f"{self.name} answered {answer.status_code}: {answer.text[:200]}",
                    next_step="look at its log",
                )
        return [answer.json()["choices"][0]["text"] for answer in answers]

    def serve(self, child: Any) -> None:
        """All requests from the other process, and what they cost this server."""
        before = self.spent
        plan = {"url": self.url, "at_once": AT_ONCE, "requests": self.requests, "fields": self.fields}
        child.stdin.write(json.dumps(plan) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
        if not line:
            raise VeneerError("the load generator ended.", next_step="its own error stands above")
        tokens = NEW * len(self.requests)
        self.costs.append((self.spent - before) / tokens)
        self.clock.append(tokens / json.loads(line)["seconds"])

    @property
    def speed(self) -> str:
        return f"{self.name}: {statistics.median(self.clock):.1f} tokens/s"


def peers(size: Size) -> list[Row]:
    """A row for each peer that is installed; of one that is not, a line on standard error."""
    import psutil

    with contextlib.ExitStack() as open_:
        place = Path(open_.enter_context(tempfile.TemporaryDirectory()))
        model, merged, tokenizer, title = _bases_of(size)
        folder = _adapter(model, merged, tokenizer, place)
        prompts = _prompts(tokenizer, size)
        found = [open_.enter_context(_started(p, folder["merged"], prompts, psutil)) for p in PEERS]
        others = [peer for peer in found if peer is not None]
        if not others:
            return []
        engine, shelf, url = open_.enter_context(_server(model, tokenizer, AT_ONCE))
        engine.add("one", folder["adapter"])
        shelf.found["one"] = Version("one", "lora")
        ours = Running("veneer", url, psutil.Process(), [
            {"model": "one", "prompt": p, "max_tokens": NEW} for p in prompts
        ])  # fmt: skip
        ours.fields |= {"ignore_eos": True}
        wanted = ours.texts()
        unlike = {peer.name: _unlike(peer, wanted) for peer in others}
        child = open_.enter_context(_child())
        for i in range(size.repeats):
            for server in [ours, *others] if i % 2 == 0 else [*reversed(others), ours]:
                server.serve(child)
    setting = f"{title}, 1 LoRA, {len(prompts)} texts, {AT_ONCE} at once"
    return [
        Row("serve_peers", setting, Quartiles.of(ours.costs), Quartiles.of(p.costs),
            Quartiles.of([a / b for a, b in zip(ours.costs, p.costs)]), error=unlike[p.name],
            reference=f"{p.name}, merged", notes=[f"by the clock: {ours.speed}, {p.speed}"])
        for p in others
    ]  # fmt: skip


def _bases_of(size: Size) -> tuple[Any, Any, Any, str]:
    """Ours as the server multiplies by default, another of the same weights, a tokenizer, and a title."""
    if size.toy:
        return _bases.causal(0, True), _bases.causal(0, True), _toy_words(), "a toy"
    from veneer.bases import open_base

    ours = open_base("builtin:smollm2", task="lm", matmul="packed")
    return ours.model, open_base("builtin:smollm2", task="lm").model, ours.tokenizer, "builtin:smollm2"


def _toy_words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(_bases.TOY_VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def _adapter(model: Any, merged: Any, tokenizer: Any, place: Path) -> dict[str, Path]:
    """One drawn adapter: as a folder of its own, and within a folder of whole weights."""
    adapter = veneer.attach(model, "lora", name="one", sites="attention.{query,value}", rank=8)
    _drawn.draw(adapter, 0)
    found = {"adapter": veneer.save(model, "one", place / "adapter"), "merged": place / "merged"}
    veneer.detach(model, "one")
    veneer.load(merged, found["adapter"], name="one")
    veneer.merge(merged, "one")
    merged.save_pretrained(found["merged"])
    tokenizer.save_pretrained(found["merged"])
    return found


def _prompts(tokenizer: Any, size: Size) -> list[str]:
    """Texts of some 16 tokens."""
    generator = torch.Generator().manual_seed(size.seed)
    vocabulary = _bases.TOY_VOCABULARY if size.toy else _bases.VOCABULARY["smollm2"]
    ids = torch.randint(3, vocabulary, (4 if size.toy else 16, 16), generator=generator).tolist()
    # Once over, so that a text is what its tokens say: drawn tokens may stand for parts of characters.
    return [tokenizer.decode(row).replace("\ufffd", "").strip() for row in ids]


@contextlib.contextmanager
def _started(peer: Peer, folder: Path, prompts: Sequence[str], psutil: Any) -> Iterator[Running | None]:
    """The peer's server, once it answers; None, with the reason said, where it cannot be started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            peer.command(folder, port), stdout=log, stderr=log, env={**os.environ, **threads}
        ) as process,
    ):
        try:
            if _answers(process, port):
                requests = [peer.request(p, NEW, folder) for p in prompts]
                yield Running(peer.name, f"http://localhost:{port}", psutil.Process(process.pid), requests)
            else:
                log.seek(0)
                last = [line for line in log.read().splitlines() if line.strip()][-1:]
                print(f"bench: {peer.name} is not compared: {' '.join(last)}", file=sys.stderr, flush=True)
                yield None
        finally:
            process.kill()


def _answers(process: subprocess.Popen[Any], port: int) -> bool:
    until = time.monotonic() + STARTS
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://localhost:{port}/health", timeout=5).status_code == 200:
                return True
        time.sleep(0.2)
    return False


def _unlike(peer: Running, wanted: Sequence[str]) -> float:
    """The part of greedy texts that are not ours. Raises VeneerError where they are too many."""
    got = peer.texts()
    unlike = sum(a != b for a, b in zip(got, wanted, strict=True)) / len(wanted)
    if 1 - unlike < LEAST_EQUAL:
        raise VeneerError(
            f"serve_peers: {1 - unlike:.2f} of the texts of {peer.name} are those of veneer; nothing was timed.",
            next_step="a speed of other answers is no speed: look at the merged weights first",
        )
    return unlike
