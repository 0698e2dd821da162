"""The laws can fail: for each one a method or an engine that is broken on purpose, and a sound one."""

import contextlib
import types

import pytest
import torch

from veneer import engine, testing
from veneer.edits import (
    AttentionMethod,
    OutputMethod,
    Sites,
    WeightMethod,
    before,
    hyper,
    kaiming,
    method,
    normal,
    open_before,
    zeros,
)
from veneer.engine import _adapter, _dense, _door, _forms, _merge, _program
from veneer.errors import UnknownName
from veneer.testing import Broken, Trial

torch.set_num_threads(1)


def status(what, law, base="llama", **more):
    """(status, detail) of one law on one base."""
    report = testing.check_method(what, laws=law, bases=[base], **more)
    row = next(r for r in report.rows if r.law == law)
    return row.status, row.detail


def broken(what, law, *words, base="llama", **more):
    found, detail = status(what, law, base, **more)
    assert found == "failed", (found, detail)
    for word in words:
        assert word in detail, detail


def sound(what, law, base="llama", **more):
    found, detail = status(what, law, base, **more)
    assert found == "passed", (found, detail)


# ---- a sound method of each kind; what follows breaks them


@method("sound_delta", paper="", family="test", registered=False)
class Sound(WeightMethod):
    rank: int = hyper(4, "width of the update", at_least=1, size=True)
    sites: Sites = "attention.{query,value}"

    def tensors(self, site):
        return {"A": kaiming(self.rank, site.n_in), "B": zeros(site.n_out, self.rank)}

    def delta(self, t, W):
        return t.B @ t.A

    def branch(self, t, x):
        return (x @ t.A.mT) @ t.B.mT


@method("sound_output", paper="", family="test", registered=False)
class SoundOutput(OutputMethod):
    width: int = hyper(2, "width inside", at_least=1, size=True)
    sites: Sites = "mlp"

    def tensors(self, site):
        return {"D": kaiming(self.width, site.width), "U": zeros(site.width, self.width)}

    def output(self, t, y):
        return y + torch.tanh(y @ t.D.mT) @ t.U.mT


def variant(base, key, register=False, **functions):
    """A subclass under a key of its own with some functions or facts replaced."""
    facts = functions.pop("facts", {})
    made = type(
        key, (base,), {"__module__": __name__, "__annotations__": {}, "sites": base.sites, **functions}
    )
    made = method(key, paper="", family="test", registered=register, **facts)(made)
    globals()[key] = made  # so that a pickle finds it
    return made


ALL = [n for n in testing.LAWS if n not in ("compile", "equation")]


@pytest.mark.parametrize("law", [n for n in ALL if n not in ("quantised", "save", "precision")])
def test_sound_methods_pass_what_others_fail(law):
    sound(Sound, law) if law != "merge" else sound(Sound, law, "bert")
    if law not in ("merge", "one_form"):
        sound(SoundOutput, law)


# ---- 1 identity


def test_identity_catches_a_start_that_is_not_the_base():
    def tensors(self, site):
        return {"A": kaiming(self.rank, site.n_in), "B": normal(1e-3, site.n_out, self.rank)}

    broken(variant(Sound, "starts_elsewhere", tensors=tensors), "identity", "at the start, against the base")


def test_identity_wants_a_reason_for_another_start():
    made = variant(SoundOutput, "without_reason", facts={"starts_as_identity": False},
                   output=lambda self, t, y: y + 1 + torch.tanh(y @ t.D.mT) @ t.U.mT)  # fmt: skip
    broken(made, "identity", "no reason")


def test_identity_catches_a_modest_declaration():
    broken(
        variant(SoundOutput, "modest", facts={"starts_as_identity": False, "reason": "so it says"}),
        "identity",
        "all the same",
    )


def test_identity_is_declared_away_with_a_reason():
    made = variant(SoundOutput, "declared", facts={"starts_as_identity": False, "reason": "it adds one"},
                   output=lambda self, t, y: y + 1 + torch.tanh(y @ t.D.mT) @ t.U.mT)  # fmt: skip
    assert status(made, "identity") == ("not claimed", "it adds one")


# ---- 2 equation


def low_rank(factor=1.0, slope=1.0):
    """A reference of W' = W + B A, right where factor and slope are 1."""
    draw = torch.Generator().manual_seed(0)

    def normal_(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    case = {
        "name": "one", "options": {"rank": 2}, "base": {"W": normal_(3, 4), "bias": normal_(3)},
        "tensors": {"A": normal_(2, 4), "B": normal_(3, 2)}, "trained": ("A", "B"),
        "inputs": {"x": normal_(2, 3, 4)}, "cotangent": normal_(2, 3, 3),
    }  # fmt: skip

    def output(tensors):
        W = case["base"]["W"] + factor * tensors["B"] @ tensors["A"]
        return case["inputs"]["x"] @ W.mT + case["base"]["bias"]

    def gradients(case):
        leaves = {n: v.clone().requires_grad_() for n, v in case["tensors"].items()}
        found = torch.autograd.grad((output(leaves) * case["cotangent"]).sum(), list(leaves.values()))
        return {n: slope * g for n, g in zip(leaves, found)}

    return types.SimpleNamespace(
        cases=lambda: [case], reference=lambda case: {"output": output(case["tensors"])}, gradients=gradients
    )


def test_equation_holds_the_method_against_its_reference():
    sound(Sound, "equation", references={"sound_delta": low_rank()})
    assert status(Sound, "equation") == ("does not apply", "no reference given")


def test_equation_catches_a_wrong_scale_and_a_wrong_gradient():
    broken(
        Sound, "equation", "output against the reference", references={"sound_delta": low_rank(factor=2.0)}
    )
    broken(Sound, "equation", "gradient of", references={"sound_delta": low_rank(slope=1.01)})


def test_equation_catches_a_gradient_that_the_method_cuts():
    made = variant(Sound, "cut", branch=lambda self, t, x: (x @ t.A.detach().mT) @ t.B.mT)
    broken(made, "equation", "gradient of A", references={"cut": low_rank()})


def test_equation_says_so_where_no_case_is_a_layer():
    found, detail = status(Sound, "equation", references={"sound_delta": low_rank()}, place=lambda case: None)
    assert (found, "none of the reference's 1 cases" in detail) == ("does not apply", True)


def test_equation_takes_the_names_that_it_is_told():
    reference = low_rank()

    def place(case):
        tensors = {"up": case["tensors"]["B"], "down": case["tensors"]["A"]}
        return Trial(
            tensors,
            case["base"]["W"],
            case["base"]["bias"],
            case["inputs"]["x"],
            {"rank": 2},
            names={"A": "down", "B": "up"},
        )

    sound(Sound, "equation", references={"sound_delta": reference}, place=place)


# ---- 3 one form


def test_one_form_catches_a_branch_of_another_scale():
    broken(
        variant(Sound, "scaled", branch=lambda self, t, x: 1.01 * (x @ t.A.mT) @ t.B.mT),
        "one_form",
        "`branch` against the dense form",
    )


def test_one_form_catches_a_branch_of_another_gradient():
    made = variant(Sound, "detached", branch=lambda self, t, x: (x @ t.A.mT) @ t.B.detach().mT)
    broken(made, "one_form", "gradient of B")


# ---- 4 trains


def test_trains_catches_a_tensor_that_nothing_reads():
    def tensors(self, site):
        return {**Sound.tensors(self, site), "idle": zeros(3)}

    broken(variant(Sound, "idle", tensors=tensors), "trains", "idle", "no gradient")


def test_trains_catches_a_start_from_which_nothing_moves():
    def tensors(self, site):
        return {"A": zeros(self.rank, site.n_in), "B": zeros(site.n_out, self.rank)}

    broken(variant(Sound, "stuck", tensors=tensors), "trains", "no gradient within two steps")


def test_trains_catches_a_null_gradient_that_is_not():
    def tensors(self, site):
        return {
            "A": kaiming(self.rank, site.n_in),
            "B": zeros(site.n_out, self.rank, null_gradient="so it says"),
        }

    broken(variant(Sound, "not_null", tensors=tensors), "trains", "declares a zero gradient")


def test_trains_catches_an_engine_that_opens_the_base(monkeypatch):
    def opened(model, *args, **options):
        adapter = attach(model, *args, **options)
        next(iter(model.parameters())).requires_grad_(True)
        return adapter

    attach = engine.attach
    monkeypatch.setattr(engine, "attach", opened)
    broken(Sound, "trains", "trained numbers disagree")


def test_trains_catches_a_base_that_changes():
    def output(self, t, y):
        with torch.no_grad():
            HELD[0].add_(1e-9)
        return SoundOutput.output(self, t, y)

    made, base = variant(SoundOutput, "writes_to_the_base", output=output), testing.bases.get("llama")
    subject = testing.Subject(made, base)
    model = base.model()
    HELD[0] = model.lm_head.weight
    subject.model = lambda *args: model
    with pytest.raises(Broken, match=r"lm_head\.weight.* after training"):
        testing.LAWS["trains"].check(subject)


HELD = [torch.zeros(1)]


# ---- 5 detach


def test_detach_catches_what_is_left_behind(monkeypatch):
    detach = engine.detach

    def leaves_a_hook(model, name):
        detach(model, name)
        model.register_forward_hook(lambda *args: None)

    monkeypatch.setattr(engine, "detach", leaves_a_hook)
    broken(Sound, "detach", "hooks")


def test_detach_catches_flags_that_do_not_come_back(monkeypatch):
    detach = engine.detach

    def opens_all(model, name):
        detach(model, name)
        model.requires_grad_(True)

    monkeypatch.setattr(engine, "detach", opens_all)
    broken(Sound, "detach", "requires_grad")


def test_detach_catches_a_changed_bit(monkeypatch):
    detach = engine.detach

    def changes_a_bit(model, name):
        detach(model, name)
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1e-15

    monkeypatch.setattr(engine, "detach", changes_a_bit)
    broken(Sound, "detach", "lm_head.weight")


def test_detach_catches_an_attach_that_moves_the_random_state(monkeypatch):
    attach = engine.attach

    def draws(*args, **options):
        torch.rand(1)
        return attach(*args, **options)

    monkeypatch.setattr(engine, "attach", draws)
    broken(Sound, "detach", "random state")


# ---- 6 merge


def test_merge_catches_a_delta_that_is_not_what_the_branch_adds():
    broken(
        variant(Sound, "two_deltas", delta=lambda self, t, W: 1.001 * t.B @ t.A),
        "merge",
        "merged a against attached",
    )


def test_merge_catches_deltas_that_do_not_add(monkeypatch):
    real = _merge._changed

    def on_top(op, bare, now):
        return real(op, now, now) if op.adapter.name == "a" else real(op, bare, bare)

    monkeypatch.setattr(_merge, "_changed", on_top)
    broken(Sound, "merge", "of two")


def test_merge_catches_an_unmerge_that_subtracts(monkeypatch):
    def subtracts(model):
        host = engine.host_of(model)
        bare = {key: W.clone() for key, W in host.kept.items()}
        names = unmerge(model)
        for (module, parameter), W in bare.items():
            with torch.no_grad():
                getattr(host.module(module), parameter).copy_(
                    W + 1e-17 + (W - 1e-3) - (W - 1e-3) + 1e-16 * W.sign()
                )
        return names

    unmerge = engine.unmerge
    monkeypatch.setattr(engine, "unmerge", subtracts)
    broken(Sound, "merge", "after unmerge")


def test_merge_catches_a_report_that_is_silent(monkeypatch):
    merge = engine.merge

    def silent(*args, **options):
        return merge(*args, **{**options, "probe": None})

    monkeypatch.setattr(engine, "merge", silent)
    broken(Sound, "merge", "reports no error")


def test_merge_may_not_be_declined_by_a_weight_edit():
    made = variant(Sound, "declines", facts={"not_claimed": (("merge", "no wish"),)})
    broken(made, "merge", "no method of the port weight may decline")
    assert status(SoundOutput, "merge")[0] == "not claimed"


# ---- 7 save


def test_save_catches_a_tensor_that_is_lost(monkeypatch):
    load = engine.load

    def loses(model, folder, **options):
        adapter = load(model, folder, **options)
        with torch.no_grad():
            adapter.leaves()[0].mul_(1 + 1e-7)
        return adapter

    monkeypatch.setattr(engine, "load", loses)
    made = variant(SoundOutput, "saved", register=True)
    with unregistered("saved"):
        broken(made, "save", "after loading")


def test_save_catches_a_folder_with_more_in_it(monkeypatch):
    save = engine.save

    def litters(model, name, folder):
        save(model, name, folder)
        torch.save({}, folder / "optimizer.pt")

    monkeypatch.setattr(engine, "save", litters)
    made = variant(SoundOutput, "littered", register=True)
    with unregistered("littered"):
        broken(made, "save", "the folder holds", "optimizer.pt")


def test_save_passes_a_sound_method():
    made = variant(SoundOutput, "kept", register=True)
    with unregistered("kept"):
        sound(made, "save")


@contextlib.contextmanager
def unregistered(key):
    """Out of the registry again afterwards, so that no other test meets it."""
    from veneer.edits import registry

    try:
        yield
    finally:
        registry().pop(key, None)


# ---- 8 rows


def test_rows_catches_a_method_that_looks_at_its_neighbours():
    def output(self, t, y):
        return y + torch.tanh((y - y.mean(0, keepdim=True)) @ t.D.mT + y @ t.D.mT) @ t.U.mT

    broken(variant(SoundOutput, "neighbours", output=output), "rows", "in a mixed batch")


def test_rows_catches_an_engine_that_takes_a_function_to_broadcast_which_does_not(monkeypatch):
    transposes = variant(
        Sound, "transposes", branch=lambda self, t, x: (x @ t.A.transpose(0, -1)) @ t.B.transpose(0, -1)
    )
    assert status(transposes, "rows")[0] == "passed"  # found out, and mapped over its rows
    monkeypatch.setattr(_forms, "broadcasts", lambda sp, tensors: True)
    broken(transposes, "rows")


def test_rows_catches_an_engine_that_gives_rows_the_wrong_adapter(monkeypatch):
    gathered = _forms._gathered
    monkeypatch.setattr(_forms, "_gathered", lambda values, slots: gathered(values, slots.flip(0)))
    broken(Sound, "rows", "in a mixed batch")


def test_rows_sees_an_adapter_that_does_nothing():
    broken(
        variant(SoundOutput, "nothing", output=lambda self, t, y: y + 0 * (y @ t.D.mT) @ t.U.mT),
        "rows",
        "changes nothing",
    )


# ---- 9 cohort


def test_cohort_catches_gradients_that_leak(monkeypatch):
    gathered = _forms._gathered

    def leaks(values, slots):
        v = gathered(values, slots)
        return v + 1e-3 * (v.mean(0, keepdim=True) - v.mean(0, keepdim=True).detach())

    monkeypatch.setattr(_forms, "_gathered", leaks)
    broken(Sound, "cohort", "trained together")


def test_cohort_catches_a_penalty_that_is_counted_by_rows():
    made = variant(SoundOutput, "penalised", penalty=lambda self, t: t.D.square().sum())
    found, detail = status(made, "cohort")
    assert found == "passed" or "penalties of a mixed batch" in detail


def test_cohort_catches_a_penalty_that_is_lost(monkeypatch):
    monkeypatch.setattr(_door, "penalty_of", lambda host, frame: None)
    made = variant(SoundOutput, "penalty_lost", penalty=lambda self, t: t.D.square().sum())
    broken(made, "cohort", "penalties of a mixed batch")


# ---- 10 padding


def test_padding_catches_a_mean_over_padding():
    def output(self, t, y):
        return y + torch.tanh(y.mean(-2, keepdim=True) @ t.D.mT) @ t.U.mT

    broken(variant(SoundOutput, "means_padding", output=output), "padding", "padded on the")


def test_padding_catches_a_position_that_is_counted_from_the_left():
    def output(self, t, y):
        first = torch.arange(y.shape[-2])[:, None] < 2
        return torch.where(first, y + torch.tanh(y @ t.D.mT) @ t.U.mT, y)

    broken(variant(SoundOutput, "counts_padding", output=output), "padding", "padded on the left")


# ---- 11 cache


def test_cache_catches_an_edit_that_forgets_the_past():
    def output(self, t, y):
        so_far = y.cumsum(-2) / torch.arange(1, y.shape[-2] + 1).to(y)[:, None]
        return y + torch.tanh(so_far @ t.D.mT) @ t.U.mT

    broken(variant(SoundOutput, "forgets", output=output), "cache", "with a cache against without")


def test_cache_catches_a_prefix_whose_mask_is_not_opened_in_decoding():
    @method(
        "closed_prefix",
        paper="",
        family="test",
        registered=False,
        starts_as_identity=False,
        reason="a prefix",
    )
    class ClosedPrefix(AttentionMethod):
        length: int = hyper(3, "keys", size=True)
        sites: Sites = "attention"

        def tensors(self, site):
            shape = (site.kv_heads, self.length, site.head_dim)
            return {"K": normal(1.0, *shape), "V": normal(1.0, *shape)}

        def attention(self, t, q, k, v, mask, attend, at):
            if at.past:
                return attend(q, k, v, mask)
            return attend(q, before(t.K, k), before(t.V, v), open_before(mask, self.length))

    broken(ClosedPrefix, "cache", "with a cache against without")


# ---- 12 compile


@pytest.mark.slow
def test_compile_catches_a_break_in_the_graph():
    def output(self, t, y):
        return y + (1.0 if float(y.sum()) > 0 else 0.5) * torch.tanh(y @ t.D.mT) @ t.U.mT

    broken(variant(SoundOutput, "breaks", output=output), "compile")


@pytest.mark.slow
def test_compile_catches_another_result():
    def output(self, t, y):
        scale = 1.5 if torch.compiler.is_compiling() else 1.0
        return y + scale * torch.tanh(y @ t.D.mT) @ t.U.mT

    broken(variant(SoundOutput, "otherwise", output=output), "compile", "compiled against eager")


@pytest.mark.slow
def test_compile_catches_a_graph_for_every_switch(monkeypatch):
    real = _program.build_banked

    def guards(host, *args, **options):
        if host.active == ("b",):
            torch.zeros(1)
        return real(host, *args, **options)

    monkeypatch.setattr(_door, "build_banked", guards)
    broken(SoundOutput, "compile", "a switch")


# ---- 13 precision


def test_precision_catches_an_adapter_that_follows_the_base_to_half():
    subject = testing.Subject(SoundOutput, testing.bases.get("llama"))
    attach = subject.attach

    def halved(model, *args, **options):
        adapter = attach(model, *args, **options)
        adapter.keep_dtype = None
        return adapter.to(engine.host_of(model).dtype)

    subject.attach = halved
    with pytest.raises(Broken, match="leaves are"):
        testing.LAWS["precision"].check(subject)


def test_precision_catches_an_edit_in_too_few_bits():
    def output(self, t, y):
        low = y.to(torch.float8_e4m3fn).to(y.dtype) if y.dtype in (torch.bfloat16, torch.float16) else y
        return y + torch.tanh(low @ t.D.mT) @ t.U.mT + (low - y)

    broken(variant(SoundOutput, "coarse", output=output), "precision", "times the bare base's")


def test_precision_catches_state_in_the_method():
    calls = []

    def output(self, t, y):
        calls.append(1)
        return y + (1 + len(calls) * 1e-3) * torch.tanh(y @ t.D.mT) @ t.U.mT

    broken(variant(SoundOutput, "stateful", output=output), "precision", "deepcopy")


def test_precision_catches_a_copy_that_shares(monkeypatch):
    monkeypatch.setattr(_adapter.Adapter, "__deepcopy__", lambda self, memo: memo.setdefault(id(self), self))
    broken(SoundOutput, "precision", "deepcopy")


def test_precision_catches_noise_that_recomputation_draws_anew():
    def output(self, t, y):
        scale = 1 + 0.1 * GENERATOR.random() if self_training(y) else 1.0
        return y + scale * torch.tanh(y @ t.D.mT) @ t.U.mT

    broken(variant(SoundOutput, "noisy", output=output), "precision", "checkpointing")


class _Random:
    def __init__(self):
        self.count = 0

    def random(self):
        self.count += 1
        return self.count % 7 / 7


GENERATOR = _Random()


def self_training(y):
    return y.requires_grad or torch.is_grad_enabled()


# ---- 14 quantised


def test_quantised_catches_a_weight_that_is_read_around_its_form(monkeypatch):
    @method("turns", paper="", family="test", registered=False)
    class Turns(WeightMethod):
        sites: Sites = "attention.query"

        def tensors(self, site):
            return {"gain": zeros(site.n_out)}

        def delta(self, t, W):
            return (W.mT * t.gain).mT

    sound(Turns, "quantised", "mlp")
    real = _dense.stored
    monkeypatch.setattr(
        _dense, "stored", lambda m, name: real(m, name) * (1.01 if hasattr(m, "dense_weight") else 1.0)
    )
    broken(Turns, "quantised", "over the nf4 base", base="mlp")


# ---- the report, and what is demanded of the whole


def test_a_report_tells_what_failed_and_raises_when_asked():
    report = testing.check_method(
        variant(Sound, "told", branch=lambda self, t, x: x @ t.A.mT @ (2 * t.B).mT),
        laws=[3, "identity"],
        bases=["llama"],
    )
    assert not report.ok
    assert [r.law for r in report.failures] == ["one_form"]
    assert report.failures[0].value > 0.5
    assert "one_form" in str(report)
    assert report.to_dict()["rows"][1]["status"] == "failed"
    with pytest.raises(AssertionError, match="told breaks 1 laws"):
        report.check()
    with pytest.raises(AssertionError):
        testing.check_method(told, laws="one_form", bases=["llama"], raise_on_failure=True)  # noqa: F821


def test_a_method_without_a_site_on_any_base_is_no_method():
    tokens = testing.check_method("prompt_tuning", laws="identity", bases=["mlp"])
    assert tokens.missing == ["the method finds no site on any of these bases"]
    with pytest.raises(AssertionError, match="finds no site"):
        tokens.check()


def test_unknown_laws_and_bases_are_errors_with_the_nearest():
    with pytest.raises(UnknownName, match="nearest: rows"):
        testing.check_method(Sound, laws="row")
    with pytest.raises(UnknownName, match="nearest: llama"):
        testing.check_method(Sound, laws="rows", bases=["lama"])


def test_there_are_fourteen_laws_by_number_and_name():
    names = [
        "identity",
        "equation",
        "one_form",
        "trains",
        "detach",
        "merge",
        "save",
        "rows",
        "cohort",
        "padding",
        "cache",
    ]
    names += ["compile", "precision", "quantised"]
    assert {law.number: law.name for law in testing.LAWS.values()} == dict(enumerate(names, 1))
    assert all(law.meaning.endswith(".") for law in testing.LAWS.values())


def test_mandatory_laws_are_those_of_the_ports():
    assert "merge" in testing.mandatory(["weight"])
    assert "merge" not in testing.mandatory(["weight", "attention"])
    assert "cohort" not in testing.mandatory(["tokens"])
    assert testing.mandatory([]) == set()
    assert not any("quantised" in laws for laws in testing.MANDATORY.values())


def test_capabilities_are_claims_until_the_laws_have_run():
    table = testing.capabilities(methods=[Sound, SoundOutput, "prefix_tuning"])
    assert table.cells["sound_delta"]["merge"] == "claimed"
    assert table.cells["sound_output"]["merge"] == "not claimed"
    assert "one_form" not in table.cells["sound_output"]
    assert table.reasons["prefix_tuning"]["identity"]
    assert table.score("sound_delta") == (14, 14)
    ran = testing.capabilities(testing.run([Sound], ["identity", "padding"], bases=["llama", "mlp"]))
    assert ran.cells == {"sound_delta": {"identity": "passed", "padding": "passed"}}
    assert "| sound_delta | yes |" in ran.markdown()


def test_a_capability_table_lists_reasons():
    text = testing.capabilities(methods=["prefix_tuning"]).markdown()
    assert "- prefix_tuning, identity: a prefix of any value" in text
