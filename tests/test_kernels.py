"""Triton's kernels against the products in plain PyTorch, on the CPU by triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer.kernels import bgmv_reference, padded, ready, sgmv_reference, tiles_of

pytest.importorskip("triton")
HERE = Path(__file__).parent
IN_CHILD = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not IN_CHILD, reason="runs in the interpreter, in a process of its own: see below"
)


def drawn(ranks, n_in, n_out, vectors, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    down, up, r = padded([(draw(k, n_in), draw(n_out, k)) for k in ranks])
    for i, k in enumerate(ranks):  # what lies beyond an adapter's rank is not to be read
        down[i, k:], up[i, :, k:] = float("nan"), float("nan")
    return draw(vectors, n_out), draw(vectors, n_in), down, up, r


def close(a, b, dtype):
    error = (a.float() - b.float()).abs().max() / b.float().abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.skipif(IN_CHILD, reason="this is the child")
def test_kernels_give_what_the_reference_gives_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "test_kernels.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=HERE.parent, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ranks", "n_in", "n_out"),
    [((8,), 32, 48), ((4, 8, 16, 64), 130, 200), ((1, 3, 17), 96, 33), ((2, 2), 7, 5)],
)
def test_gathered_products_by_row(ranks, n_in, n_out, dtype):
    from veneer.kernels import bgmv

    y, x, down, up, r = drawn(ranks, n_in, n_out, 7, dtype)
    slots = torch.tensor([i % (len(ranks) + 1) - 1 for i in range(7)], dtype=torch.int32)
    expected = bgmv_reference(y, x, down, up, slots, r)
    assert not torch.equal(expected, y)
    made = y.clone()
    assert bgmv(made, x, down, up, slots, r) is made
    close(made, expected, dtype)
    assert torch.equal(made[slots < 0], y[slots < 0])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ranks", "n_in", "n_out"), [((8, 8), 32, 48), ((4, 16, 64), 130, 200), ((1, 3, 17), 40, 33)]
)
def test_products_by_segments_of_uneven_length(ranks, n_in, n_out, dtype):
    from veneer.kernels import sgmv

    starts = [0, 1, 1, 20, 36, 70]  # one of one vector, an empty one, one that fills its tiles
    slots = [0, 1, -1, len(ranks) - 1, 1]
    y, x, down, up, r = drawn(ranks, n_in, n_out, 75, dtype)
    expected = sgmv_reference(y, x, down, up, starts, slots, r)
    made = y.clone()
    assert sgmv(made, x, down, up, tiles_of(starts, slots, x.device), r) is made
    close(made, expected, dtype)
    assert torch.equal(made[70:], y[70:])
    assert torch.equal(made[1:20], y[1:20])


@interpreted
def test_nothing_to_do_is_done():
    from veneer.kernels import bgmv, sgmv

    y, x, down, up, r = drawn((4,), 16, 16, 3)
    assert torch.equal(sgmv(y.clone(), x, down, up, tiles_of([0, 3], [-1], x.device), r), y)
    none = torch.full((3,), -1, dtype=torch.int32)
    assert torch.equal(bgmv(y.clone(), x, down, up, none, r), y)
    assert bgmv(y[:0], x[:0], down, up, none[:0], r).shape == (0, 16)


@interpreted
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_engine_uses_the_kernels_where_they_are_ready(tokens, monkeypatch):
    import veneer
    import veneer.kernels
    from engine_tools import add, base, inputs, out
    from veneer.kernels import _triton

    model = base("llama", double=False)
    for name, seed in (("a", 1), ("b", 2)):
        add(model, "lora", name, seed=seed, rank=4, sites="linear")
    add(model, "lora", "c", seed=3, rank=2)
    given = {k: v[:, :tokens] for k, v in inputs("llama", 6).items()}
    given["attention_mask"][:] = 1
    names = ["a", "b", None, "c", "a", "a"]
    assert ready(torch.device("cpu"))  # tried now, and not under the eyes of the test
    calls = []
    for name in ("bgmv", "sgmv"):
        plain = getattr(_triton, name)
        monkeypatch.setattr(_triton, name, lambda *a, p=plain, n=name: calls.append(n) or p(*a))
    with torch.no_grad():
        with veneer.rows(model, names, form="bmm"):
            expected = out(model, given)
        assert not calls
        with veneer.rows(model, names, form="kernel"):
            made = out(model, given)
        assert set(calls) == {"bgmv" if tokens == 1 else "sgmv"}
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)
        with veneer.rows(model, names):  # the engine's choice, on a device with kernels
            torch.testing.assert_close(out(model, given), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(IN_CHILD, reason="the interpreter makes them ready")
def test_without_a_gpu_the_reference_serves():
    import veneer
    from engine_tools import add, base, inputs, out

    assert not ready(torch.device("cpu"))
    model = base("llama")
    add(model, "lora", "a")
    add(model, "lora", "b", seed=2)
    given = inputs("llama", 2)
    with torch.no_grad():
        with veneer.rows(model, ["a", "b"], form="bmm"):
            expected = out(model, given)
        with veneer.rows(model, ["a", "b"], form="kernel"):
            assert torch.equal(out(model, given), expected)


def test_a_kernel_that_fails_or_gives_something_else_is_not_used(monkeypatch):
    from veneer.kernels import _ready

    monkeypatch.setattr(_ready, "_agrees", lambda device: (_ for _ in ()).throw(RuntimeError("no compiler")))
    _ready._tried.cache_clear()
    assert not _ready._tried("cuda", 0)
    monkeypatch.setattr(_ready, "_agrees", lambda device: False)
    _ready._tried.cache_clear()
    assert not _ready._tried("cuda", 0)
    _ready._tried.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_are_ready_on_a_gpu():
    assert ready(torch.device("cuda", 0))
