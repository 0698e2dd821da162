"""Forms of a mixed batch: the same numbers in each, and under one form the same bits whoever is beside."""

import json

import pytest
import torch

import veneer
from engine_tools import add, base, inputs, out
from veneer.edits import OutputMethod, WeightMethod, method, normal, zeros
from veneer.engine import _forms, _tuning
from veneer.errors import BadOption

FORMS = ("bmm", "packed", "segments", "vmap")
MANY = ("lora", "dora", "vera", "ia3", "bitfit", "serial_adapter", "loreft", "hira", "shira", "prefix_tuning")


def mixed(*methods, double=True, family="llama", size=0.2):
    model = base(family, double=double)
    for key in methods:
        for suffix, seed in (("a", 1), ("b", 2)):
            add(model, key, f"{key}.{suffix}", seed=seed, size=size)
    veneer.activate(model, None)
    return model


@torch.no_grad()
def under(model, form, names, given):
    with veneer.rows(model, names, form=form):
        return out(model, given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_every_form_gives_what_the_engines_choice_gives(form, family):
    many = [m for m in MANY if not (m == "bitfit" and family == "llama")]
    model = mixed(*many, family=family)
    names = [*(f"{m}.{s}" for m in many for s in "ab"), None, "lora.a"]
    given = inputs(family, len(names))
    free, fixed = under(model, None, names, given), under(model, form, names, given)
    torch.testing.assert_close(fixed, free, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(free, under(model, None, [None] * len(names), given))


@pytest.mark.parametrize("form", ["bmm", "segments", "vmap"])  # packed columns are those of all: see below
@pytest.mark.parametrize("tokens", [1, 9])
def test_rows_have_the_same_bits_alone_and_mixed_under_one_form(form, tokens):
    model = mixed("lora", "ia3", "serial_adapter", "loreft", double=False)
    given = {k: v for k, v in inputs("llama", 6, tokens=9).items() if k != "position_ids"}
    given = {k: v[:, :tokens] for k, v in given.items()}
    given["attention_mask"][:] = 1
    names = ["lora.a", "ia3.a", "lora.b", "serial_adapter.b", "lora.a", "loreft.a"]
    together = under(model, form, names, given)
    for name in set(names):
        mine = [i for i, n in enumerate(names) if n == name]
        alone = under(model, form, [n if n == name else None for n in names], given)
        assert torch.equal(together[mine], alone[mine]), name


def test_under_bmm_a_whole_batch_of_one_adapter_has_the_bits_of_its_rows_in_a_mixed_one():
    model = mixed("lora", "vera", double=False)
    given = inputs("llama", 4)
    together = under(model, "bmm", ["lora.a", "lora.b", "vera.a", "lora.a"], given)
    for name, mine in (("lora.a", [0, 3]), ("lora.b", [1])):
        assert torch.equal(under(model, "bmm", name, given)[mine], together[mine])
        assert torch.equal(under(model, "bmm", [name] * 4, given)[mine], together[mine])


def test_free_choice_and_fixed_forms_differ_by_rounding_alone_in_single_precision():
    model = mixed("lora", "dora", double=False)
    names = ["lora.a", "dora.b", "lora.b", None, "dora.a"]
    given = inputs("llama", 5)
    free = under(model, None, names, given)
    for form in FORMS:
        error = (under(model, form, names, given) - free).abs().max() / free.abs().max()
        assert error < 1e-5, form


def test_packed_rows_alone_and_mixed_differ_by_rounding_alone():
    model = mixed("lora", double=False)
    names, given = ["lora.a", "lora.b", None, "lora.a"], inputs("llama", 4)
    together = under(model, "packed", names, given)
    alone = under(model, "packed", ["lora.a", None, None, "lora.a"], given)
    torch.testing.assert_close(together[[0, 3]], alone[[0, 3]], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_starts_and_biases_of_low_rank_adapters_mix(form):
    model = base("llama")
    add(model, "lora", "r2", rank=2, sites="linear")
    add(model, "lora", "r4", rank=4, sites="linear", seed=2)
    add(model, "lora", "r4 too", rank=4, sites="linear", seed=3)
    add(model, "lora", "olora", rank=2, init="olora", seed=4)
    add(model, "lora", "pissa", rank=2, init="olora", seed=5)
    add(model, "lora", "bias", rank=2, lora_bias=True, seed=6)
    add(model, "lora", "bias too", rank=2, lora_bias=True, seed=7)
    names = ["r2", "r4", "olora", None, "r4 too", "bias", "pissa", "bias too"]
    given = inputs("llama", 8)
    together = under(model, form, names, given)
    for i, name in enumerate(names):
        with torch.no_grad():
            torch.testing.assert_close(together[i], out(model, given, adapters=name)[i], atol=1e-9, rtol=1e-9)


def test_gradients_flow_in_every_form():
    model = mixed("lora")
    for a in veneer.adapters(model).values():
        a.leaves()[0].requires_grad_(True)
    given = inputs("llama", 4)
    found = []
    for form in (None, *FORMS):
        with veneer.rows(model, ["lora.a", None, "lora.b", "lora.a"], form=form):
            out(model, given).square().sum().backward()
        found.append([a.leaves()[0].grad for a in veneer.adapters(model).values()])
        for a in veneer.adapters(model).values():
            a.leaves()[0].grad = None
    for grads in found[1:]:
        torch.testing.assert_close(grads, found[0])
    assert all(g.abs().sum() > 0 for g in found[0])


@pytest.mark.parametrize("form", [None, "bmm", "segments"])
def test_generation_takes_a_form(form):
    model = mixed("lora", "prefix_tuning", size=0.5)
    given = {k: v for k, v in inputs("llama", 3, padding="left").items() if k != "position_ids"}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    names = ["lora.a", "prefix_tuning.a", "lora.b"]
    with veneer.rows(model, names, form=form):
        mixed_tokens = model.generate(**given, **options)
    for i, name in enumerate(names):
        alone = model.generate(**{k: v[i : i + 1] for k, v in given.items()}, **options, adapters=name)
        n = alone.shape[1]
        assert torch.equal(mixed_tokens[i, :n], alone[0])


def test_a_form_that_is_none_is_refused():
    model = mixed("lora")
    with pytest.raises(BadOption, match="bmm"), veneer.rows(model, ["lora.a"], form="bm"):
        pass


# -- definitions that do not broadcast -------------------------------------------------------------------------


@method("unrowed_branch", paper="none", family="test", registered=False)
class UnrowedBranch(WeightMethod):
    """A low-rank update written for one adapter: `.T` and `outer` know no row axis."""

    sites: str = "attention.{query,value}"

    def tensors(self, site):
        return {"A": normal(0.3, 2, site.shape[1]), "v": zeros(site.shape[0])}

    def delta(self, t, W):
        return torch.outer(t.v, t.A.sum(0))

    def branch(self, t, x):
        return (x @ t.A.T).sum(-1)[..., None] * t.v


@method("wrong_branch", paper="none", family="test", registered=False)
class WrongBranch(UnrowedBranch):
    """It meets a row axis without an error, and mixes the rows."""

    sites: str = "attention.{query,value}"

    def branch(self, t, x):
        return (x @ t.A.flatten(0, -2).sum(0))[..., None] * t.v.reshape(-1, t.v.shape[-1])[0]


@method("unrowed_output", paper="none", family="test", registered=False)
class UnrowedOutput(OutputMethod):
    sites: str = "mlp"

    def tensors(self, site):
        return {"u": normal(0.3, site.width), "v": zeros(site.width)}

    def output(self, t, x, y):
        return y + torch.outer(t.v, t.u).matmul(y.reshape(-1, y.shape[-1]).T).T.reshape(y.shape)


@method("delta_alone", paper="none", family="test", registered=False)
class DeltaAlone(WeightMethod):
    sites: str = "attention.{query,value}"

    def tensors(self, site):
        return {"v": zeros(site.shape[0]), "u": normal(0.3, site.shape[1])}

    def delta(self, t, W):
        return torch.outer(t.v, t.u)


@pytest.mark.parametrize("cls", [UnrowedBranch, WrongBranch, UnrowedOutput, DeltaAlone])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_a_definition_that_does_not_broadcast_is_right_in_a_mixed_batch(cls, form):
    model = base("llama")
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        add(model, cls, name, seed=seed)
    given = inputs("llama", 5)
    names = ["a", "b", None, "c", "a"]
    together = under(model, form, names, given)
    with torch.no_grad():
        for i, name in enumerate(names):
            alone = out(model, given, adapters=name)[i]
            torch.testing.assert_close(together[i], alone, atol=1e-9, rtol=1e-9)
        assert not torch.allclose(together[0], out(model, given, adapters=None)[0])


@pytest.mark.parametrize("cls", [UnrowedBranch, WrongBranch, UnrowedOutput])
def test_a_definition_that_does_not_broadcast_is_mapped_in_one_call(cls, monkeypatch):
    model = base("llama")
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        add(model, cls, name, seed=seed)
    calls = []
    plain = _forms.over_rows
    monkeypatch.setattr("veneer.engine._facts.over_rows", lambda *a: calls.append(1) or plain(*a))
    under(model, None, ["a", "b", None, "c"], inputs("llama", 4))
    assert len(calls) == len(model.veneer.adapter("a").plan.sites)


def test_a_definition_that_broadcasts_is_not_mapped(monkeypatch):
    model = mixed("lora", "ia3", "loreft")
    monkeypatch.setattr("veneer.engine._facts.over_rows", lambda *a: pytest.fail("mapped"))
    under(model, None, ["lora.a", "lora.b", "ia3.a", "ia3.b", "loreft.a", "loreft.b"], inputs("llama", 6))


def test_trying_whether_a_definition_broadcasts_draws_no_number_of_the_global_generator():
    _forms._PROBED.clear()
    model = mixed("lora")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    under(model, None, ["lora.a", "lora.b"], inputs("llama", 2))
    assert torch.equal(torch.rand(3), expected)


# -- the table --------------------------------------------------------------------------------------------------


def test_the_choice_follows_the_table_and_the_table_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    model = mixed("lora")
    given, names = inputs("llama", 4), ["lora.a", "lora.b", None, "lora.a"]
    free = under(model, None, names, given)
    taken = []
    fastest = {"form": "packed"}

    def measure(size, dtype, device):
        taken.append(size)
        return {f: 0.5 if f == fastest["form"] else 1.0 for f in ("bmm", "packed", "segments")}

    monkeypatch.setattr(_tuning, "measure", measure)
    table = veneer.tune_forms(model)
    assert taken
    assert set(table.seconds) == set(taken)
    assert "packed" in str(table)
    torch.testing.assert_close(under(model, None, names, given), free)
    assert any(op.low is not None for op in _ops(model))
    del taken[:]
    other = mixed("lora")
    assert veneer.tune_forms(other).seconds == table.seconds
    assert not taken  # read from the file
    fastest["form"] = "segments"
    veneer.tune_forms(model, again=True)
    torch.testing.assert_close(under(model, None, names, given), free)
    assert not any(op.rowed for op in _ops(model))


def _ops(model):
    return [op for p, _ in model.veneer._programs.values() for at in p.values() for op in at.weight]


def test_a_measurement_is_of_every_form_and_a_spoilt_file_counts_as_none(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    found = _tuning.measure((32, 48, 4, 6, 3, 4), torch.float32, torch.device("cpu"))
    assert set(found) == {"bmm", "packed", "segments"}
    assert all(0 < s < 1 for s in found.values())
    model = mixed("lora")
    for text in ("{", "[]", '{"a": 3}', '{"a": {"x": {}}}'):
        (tmp_path / "forms.json").write_text(text)
        veneer.tune_forms(model)
        assert json.loads((tmp_path / "forms.json").read_text())


class _Convolutions(torch.nn.Module):
    """Two kernels, one without a bias, and a linear layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.near = torch.nn.Conv1d(3, 4, 3, padding=1)
        self.far = torch.nn.Conv1d(4, 5, 1, bias=False)
        self.last = torch.nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.far(torch.tanh(self.near(x))).mT)


@torch.no_grad()
def test_biases_trained_beside_a_kernel_s_update_are_those_of_their_rows_and_merge():
    torch.manual_seed(0)
    model = _Convolutions().double().eval()
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    sites = ("near", "last")
    for name, key, own in (
        ("lora", "lora", {"rank": 1, "lora_bias": True, "bias": "lora_only", "sites": sites}),
        ("dora", "dora", {"rank": 1, "bias": "lora_only", "sites": sites}),
        ("added", "lora", {"rank": 1, "lora_bias": True, "sites": ("far",)}),
        ("biases", "bitfit", {"sites": sites}),
    ):
        veneer.attach(model, key, name, **own)
        for view in veneer.trainable(model).values():
            view.copy_(torch.randn_like(view))
    alone = {}
    for name in ("lora", "dora", "added", "biases", None):
        veneer.activate(model, name)
        alone[name] = model(x)
    names = ["dora", None, "lora", "added", "biases"]
    with veneer.rows(model, names):
        together = model(x)
    for i, name in enumerate(names):
        torch.testing.assert_close(together[i], alone[name][i], rtol=0, atol=1e-12)
        if name is not None:
            assert not torch.allclose(alone[name], alone[None])

    with veneer.rows(model, names, form="segments"):
        torch.testing.assert_close(model(x), together, rtol=0, atol=1e-12)
    veneer.activate(model, ["lora", "dora"])
    stacked = model(x)
    shift = model.veneer.adapter("lora").named()
    assert any(k.endswith("/base_bias") for k in shift)
    veneer.merge(model, "lora")
    veneer.activate(model, "dora")
    torch.testing.assert_close(model(x), stacked, rtol=0, atol=1e-12)
