"""Weight methods whose update is a product of another kind: worked by hand, and what their papers claim of them."""

import pytest
import torch

from test_methods_weight import conv, delta_of, draw, linear, randomized
from veneer.edits import Tensors, build

torch.set_num_threads(1)


def matrix(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(found, expected, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-12, check_dtype=False)


# ---- LoHa


def test_loha_by_hand():
    """(1; 2) (3 4) = (3 4; 6 8) times (1; -1) (5 1) = (5 1; -5 -1), times 4 / 1: (60 16; -120 -32)."""
    t = Tensors(B1=matrix([1], [2]), A1=matrix([3, 4]), B2=matrix([1], [-1]), A2=matrix([5, 1]))
    method = build("loha", rank=1, alpha=4)
    close(method.delta(t, matrix([0, 0], [0, 0])), matrix([60, 16], [-120, -32]))
    close(method.branch(t, matrix([1, 2])), matrix([92, -184]))


def test_the_update_of_loha_has_the_rank_of_a_product():
    D = delta_of(m := build("loha", rank=3), randomized(m, linear(20, 15)), draw(15, 20))
    assert torch.linalg.matrix_rank(D) == 9


def test_a_kernel_by_a_core_is_three_products():
    method = build("loha", rank=2, alpha=2, tucker=True)
    t, W = randomized(method, conv(3, 4)), draw(4, 3, 3, 3)
    halves = [torch.zeros(4, 3, 3, 3, dtype=torch.float64) for _ in "12"]
    for i, half in enumerate(halves, start=1):
        T, B, A = (getattr(t, f"{name}{i}") for name in "TBA")
        for k in range(2):
            for j in range(2):
                half += B[:, k, None, None, None] * A[j, :, None, None] * T[k, j]
    close(method.delta(t, W), halves[0] * halves[1])
    assert "T1" not in build("loha", tucker=True).tensors(linear(4, 3))


@pytest.mark.parametrize("key", ["loha"])
def test_rows_of_the_update_are_dropped_in_training_and_what_stays_grows(key):
    method = build(key, rank=2, rank_dropout=0.5)
    assert method.tensors(linear(5, 4))["u"].noise
    t, W, x = randomized(method, linear(5, 4)), draw(4, 5), draw(2, 3, 5)
    whole = method.delta(t, W)
    u = torch.tensor([0.2, 0.9, 0.6, 0.7], dtype=torch.float64)
    dropped = t.with_(u=u)
    expected = whole * matrix([0], [4 / 3], [4 / 3], [4 / 3])
    close(method.delta(dropped, W), expected)
    close(method.branch(dropped, x), x @ expected.mT)
    rows = Tensors({n: torch.stack([v, v]) for n, v in t.items()}).with_(
        u=torch.stack([u, u.flip(0)])[:, None]
    )
    close(method.delta(rows, W)[0], expected)
    close(method.branch(rows, x)[0], x[0] @ expected.mT)


@pytest.mark.parametrize("key", ["loha"])
def test_the_whole_update_is_dropped_at_times(key):
    method = build(key, rank=2, module_dropout=0.5)
    t, W, x = randomized(method, linear(5, 4)), draw(4, 5), draw(2, 3, 5)
    assert not method.branch(t.with_(u_whole=torch.tensor(0.4)), x).any()
    close(method.delta(t.with_(u_whole=torch.tensor(0.6)), W), method.delta(t, W))
