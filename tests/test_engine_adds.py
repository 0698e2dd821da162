"""Low-rank edits added in place: the same numbers as each adapter alone, whichever rows and ranks stand together."""

import itertools

import pytest
import torch

import veneer
from engine_tools import add, base, inputs, out
from veneer.edits import WeightMethod, method, normal
from veneer.engine import _dense
from veneer.engine._adds import Adds, Piece
from veneer.engine._low_rank import LowRank


class Factors:
    @staticmethod
    def low_rank(t):
        return 2 * t.A, t.B


def pieces(rows_by_adapter, ranks, n_in=12, n_out=10, level=0, seed=0):
    """Adapters of these rows; those of one rank share a bank, as adapters of one plan do."""
    draw = torch.Generator().manual_seed(seed)
    found, banks = [], {}
    for rows, rank in zip(rows_by_adapter, ranks):
        low = banks.setdefault(rank, LowRank(Factors, [], [], as_one=True))
        low.tensors.append(
            veneer.edits.Tensors(
                A=torch.randn(rank, n_in, generator=draw, dtype=torch.float64),
                B=torch.randn(n_out, rank, generator=draw, dtype=torch.float64),
            )
        )
        found.append(Piece(low, len(low.tensors) - 1, rows, level, rank))
    return found


def expected(found, x, y):
    y = y.clone()
    for p in found:
        t = p.low.tensors[p.slot]
        rows = slice(None) if p.rows is None else list(p.rows)
        y[rows] = y[rows] + 2 * (x[rows] @ t.A.mT) @ t.B.mT
    return y


RUNS = {
    "one row each": [(0,), (1,), (2,), (3,)],
    "neighbours": [(0, 1), (2, 3)],
    "neighbours, bare rows around": [(1, 2), (3, 4)],
    "uneven": [(0, 1, 2), (3,), (4, 5)],
    "interleaved": [(0, 2, 4), (1, 3, 5)],
    "any order": [(5, 1), (0, 4), (2,)],
    "every other row": [(0,), (2,), (4,)],
    "a single one": [(3,)],
    "a whole batch": [None],
    "a stack of whole batches": [None, None],
}


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("ranks", [(3,), (16,), (2, 3), (2, 17), (1, 40, 80)])
@pytest.mark.parametrize("tokens", [1, 4])
def test_rows_get_their_own_products_and_others_keep_their_bits(runs, ranks, tokens):
    found = pieces(runs, list(itertools.islice(itertools.cycle(ranks), len(runs))))
    x, y = (torch.randn(6, tokens, n, dtype=torch.float64) for n in (12, 10))
    wanted, untouched = expected(found, x, y), y.clone()
    assert Adds(found, 6, 12, 10).into(x, y)
    torch.testing.assert_close(y, wanted)
    touched = {row for p in found for row in (range(6) if p.rows is None else p.rows)}
    for row in range(6):
        assert torch.equal(y[row], untouched[row]) == (row not in touched)


def test_stacks_of_adapters_on_the_same_rows_add_up():
    found = pieces([(0, 1), (2, 3)], (3, 3)) + pieces([(1, 2), (3,)], (3, 5), level=1, seed=1)
    x, y = (torch.randn(4, 2, n, dtype=torch.float64) for n in (12, 10))
    wanted = expected(found, x, y)
    assert Adds(found, 4, 12, 10).into(x, y)
    torch.testing.assert_close(y, wanted)


def test_outputs_of_one_vector_a_row_are_served():
    found = pieces([(0, 2), (1, 3)], (3, 3))
    x, y = (torch.randn(4, n, dtype=torch.float64) for n in (12, 10))
    wanted = expected(found, x, y)
    assert Adds(found, 4, 12, 10).into(x, y)
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("change", ["dtype", "rows", "strides"])
def test_tensors_that_do_not_fit_are_left_as_they_are(change):
    adds = Adds(pieces([(0,), (1, 2)], (3, 3)), 4, 12, 10)
    x, y = (torch.randn(4, 2, n, dtype=torch.float64) for n in (12, 10))
    if change == "dtype":
        y = y.float()
    if change == "rows":
        x, y = x[:3], y[:3]
    if change == "strides":
        y = y.transpose(0, 1).contiguous().transpose(0, 1)
    before = y.clone()
    assert not adds.into(x, y)
    assert torch.equal(y, before)


def test_an_adapters_neighbouring_rows_share_its_tensors_and_alike_ranks_share_a_product():
    axis = Adds(pieces([(0, 1), (2, 3)], (16, 16)), 4, 12, 10).blocks
    assert [b.down.shape for b in axis] == [(2, 12, 16)]
    alike = Adds(pieces([(0,), (1,), (2,), (3,)], (4, 5, 4, 5)), 4, 12, 10).blocks
    assert [b.down.shape[:2] for b in alike] == [(4, 5)]
    unlike = Adds(pieces([(0,), (1,), (2,), (3,)], (4, 1024, 4, 1024)), 4, 12, 10).blocks
    assert sorted(b.up.shape[1] for b in unlike) == [4, 1024]
    few_rows = Adds(pieces([tuple(range(9)), (9,)], (256, 256), 999, 999), 10, 999, 999).blocks
    assert sum(b.count for b in few_rows) == 2  # and not ten copies


def test_a_single_adapter_of_a_whole_batch_is_read_where_it_lies():
    found = pieces([None], (3,))
    block = Adds(found, 0, 12, 10).blocks[0]
    assert block.up.data_ptr() == found[0].low.tensors[0].B.data_ptr()


# -- in a model -------------------------------------------------------------------------------------------------


def mixed(double=True):
    model = base("llama", double=double)
    for i, rank in enumerate((2, 3, 16, 2)):
        add(model, "lora", f"a{i}", rank=rank, sites="linear", seed=i)
    veneer.activate(model, None)
    return model


@torch.no_grad()
def counted(monkeypatch, model, given, names):
    """The output, and how many layers added in place and how many op by op."""
    found = {"in place": 0, "op by op": 0}
    into, branches = Adds.into, _dense._add_branches

    def one(self, *args):
        done = into(self, *args)
        found["in place"] += done
        return done

    def other(*args):
        found["op by op"] += 1
        return branches(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Adds, "into", one)
        patch.setattr(_dense, "_add_branches", other)
        return out(model, given, adapters=names), found


@pytest.mark.parametrize("names", [["a0", "a1", None, "a3", "a2", "a0"], "a2", [["a0", "a2"], "a1", None]])
def test_a_model_adds_in_place_and_gives_what_gradients_mode_gives(monkeypatch, names):
    model = mixed()
    given = inputs("llama", 1 if isinstance(names, str) else len(names))
    free, found = counted(monkeypatch, model, given, names)
    assert found["in place"] > 0
    assert found["op by op"] == 0
    torch.testing.assert_close(free, out(model, given, adapters=names).detach(), atol=1e-10, rtol=1e-10)
    assert not torch.allclose(free, out(model, given, adapters=None))


def test_a_layer_with_another_edit_too_goes_op_by_op(monkeypatch):
    model = mixed()
    add(model, "ia3", "i", seed=5)
    veneer.activate(model, None)
    names, given = ["a0", "i", "a1"], inputs("llama", 3)
    free, found = counted(monkeypatch, model, given, names)
    assert found["op by op"] > 0
    for i, name in enumerate(names):
        with torch.no_grad():
            torch.testing.assert_close(free[i], out(model, given, adapters=name)[i], atol=1e-10, rtol=1e-10)


def test_a_change_of_an_adapter_is_seen_by_the_next_call():
    model = mixed()
    names, given = ["a0", "a1"], inputs("llama", 2)
    with torch.no_grad():
        before = out(model, given, adapters=names)
        veneer.adapters(model)["a0"].leaves()[0].mul_(2)
        after = out(model, given, adapters=names)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1], after[1])


def test_under_autocast_and_vmap_the_edits_are_added_op_by_op(monkeypatch):
    model = mixed(double=False)
    given = inputs("llama", 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        free, found = counted(monkeypatch, model, given, ["a0", "a1"])
        assert found["op by op"] > 0
    plain, _ = counted(monkeypatch, model, given, ["a0", "a1"])
    assert (free - plain).abs().max() < 0.1 * plain.abs().max()
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
    veneer.activate(model, "a0")
    x = torch.randn(3, 2, 5, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x), atol=1e-5, rtol=1e-5)


@method("other_branch", paper="none", family="test", registered=False)
class OtherBranch(WeightMethod):
    """A class whose `low_rank` was left as it stood when `branch` was changed."""

    sites: str = "attention.{query,value}"

    def tensors(self, site):
        return {"A": normal(0.5, 2, site.shape[1]), "B": normal(0.5, site.shape[0], 2)}

    def delta(self, t, W):
        return t.B @ t.A

    def branch(self, t, x):
        return (x @ t.A.mT).tanh() @ t.B.mT

    def low_rank(self, t):
        return t.A, t.B


def test_a_low_rank_that_is_not_the_branch_is_not_believed():
    model = base("llama")
    veneer.attach(model, OtherBranch(), "one", seed=1)
    veneer.attach(model, OtherBranch(), "two", seed=2)
    given = inputs("llama", 2)
    for names in ("one", ["one", "two"]):
        with torch.no_grad():
            free = out(model, given, adapters=names)
        torch.testing.assert_close(free, out(model, given, adapters=names).detach(), atol=1e-10, rtol=1e-10)


def test_a_low_rank_that_knows_one_adapter_alone_is_asked_adapter_by_adapter():
    class Unrowed(Factors):
        arguments = {"low_rank": ("t",), "branch": ("t", "x")}

        @staticmethod
        def low_rank(t):
            return t.A.view(3, 12), t.B.view(10, 3)

    low = LowRank(Unrowed, [p.low.tensors[p.slot] for p in pieces([(0,), (1,)], (3, 3))][:2], [0, 1], False)
    down, up = low.factors([0, 1], wide=False)
    assert down.shape == (2, 3, 12)
    assert up.shape == (2, 3, 10)
