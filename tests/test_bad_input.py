"""Bad input: each is refused in words that name the thing, the value and the next step, and nothing is lost.

One section a line of the promise. Beside every refusal stands the right use, so that no test passes because
everything is refused.
"""

import ast
import errno
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import training_tiny as tiny
import veneer
from engine_tools import add, base, inputs, out
from veneer import data, engine, recipes
from veneer.errors import (
    BadData,
    BadFile,
    BadOption,
    NoGradient,
    NoSiteFound,
    NotPrepared,
    ShapeDiffers,
    TrainingFailed,
    UnknownAdapter,
    UnknownMethod,
    UnknownName,
    UnknownOption,
    Unsupported,
    VeneerError,
)
from veneer.tasks import find_task
from veneer.tasks.metrics import find_metric
from veneer.training import Hooks, train

torch.set_num_threads(1)
GOOD = [f"the {w} film was {i},{'good' if i % 2 else 'bad'}" for i, w in enumerate(tiny.WORDS)]
QUIET = {"progress": False, "device": "cpu", "learning_rate": 1e-2, "batch_size": 8, "epochs": 1}


@contextmanager
def refused(kind, *says):
    """The block raises `kind`; its message has all of `says` and a next step."""
    with pytest.raises(kind) as told:
        yield
    text = str(told.value)
    for words in says:
        assert words in text, f"{words!r} is not said in:\n{text}"
    assert told.value.next_step, f"no next step in:\n{text}"


def snapshot(model):
    """All that a refused call could have left behind."""
    return (
        {n: (p.data_ptr(), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()},
        {n: type(m) for n, m in model.named_modules()},
        [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks],
        tuple(getattr(getattr(model, "veneer", None), "active", ())),
    )


def same(a, b):
    tensors = all(
        a[0][n][:2] == b[0][n][:2] and torch.equal(a[0][n][2], b[0][n][2]) for n in a[0].keys() & b[0].keys()
    )
    return a[0].keys() == b[0].keys() and tensors and a[1:] == b[1:]


@contextmanager
def untouched(model):
    before = snapshot(model)
    yield
    assert same(before, snapshot(model)), "the refused call left something behind"


def run(output=None, **options):
    given = {"method": "lora", **QUIET, **options}
    return train(
        model=given.pop("model", None) or tiny.bert_base(), data=given.pop("data", None) or tiny.opened(24, 8, 8),
        output=output, **given,
    )  # fmt: skip


# -- a selector that matches nothing, or only part of a list ---------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sites": "attention.qurey"}, ["sites='attention.qurey'", "BertForSequenceClassification", "attention.query"]),
        ({"sites": ["query", "vlaue"]}, ["'vlaue' matches nothing", "value (2 modules)"]),
        ({"sites": "attention.{query,vlaue}"}, ["'attention.vlaue'", "attention.value (2 sites)"]),
        ({"target_modules": ["query", "q_proj"]}, ["'q_proj' matches nothing"]),
        ({"sites": "block[-4:].attention.qurey"}, ["block[-4:].attention.qurey", "attention.query"]),
        ({"sites": "block[7].attention.query"}, ["block [7] is not among the 2 blocks"]),
        ({"sites": r"layer\.9\..*query"}, [r"layer\\.9\\..*query"]),
        ({"layers": [0, 99]}, ["[0, 99]", "block [99] is not among the 2 blocks"]),
        ({"exclude": ["pooller"]}, ["exclude", "pooller", "pooler"]),
        ({"whole": ["classifer"]}, ["classifer", "classifier"]),
        ({"rank_pattern": {"qurey": 2}}, ["qurey", "query"]),
    ],
)  # fmt: skip
def test_a_selector_that_misses_names_what_is_missing_and_what_is_near(options, says):
    model = base("bert")
    with untouched(model), refused(NoSiteFound, *says):
        veneer.attach(model, "lora", **options)


def test_the_selectors_beside_the_bad_ones_are_taken():
    model = base("bert")
    rank = {"rank_pattern": {"query": 2}}
    made = veneer.attach(
        model,
        "lora",
        sites=["query", "value"],
        layers=[0, 1],
        exclude=["pooler"],
        whole=["classifier"],
        **rank,
    )
    shapes = {k: tuple(v.shape) for k, v in made.named().items()}
    assert {s[0] for k, s in shapes.items() if "query" in k and k.endswith("/A")} == {2}
    assert {s[0] for k, s in shapes.items() if "value" in k and k.endswith("/A")} == {8}
    assert any("classifier" in k for k in shapes)


def test_part_of_a_list_is_taken_where_that_is_asked_for():
    made = veneer.plan(base("bert"), "lora", sites=["query", "vlaue"], allow_partial=True)
    assert {s.site.role for s in made.sites} == {"attention.query"}


# -- unknown names ---------------------------------------------------------------------------------------------


UNKNOWN = {
    "method": (UnknownMethod, lambda m: veneer.attach(m, "lorra"), ["'lorra'", "lora"]),
    "option": (UnknownOption, lambda m: veneer.attach(m, "lora", rnak=4), ["'rnak'", "rnak=4", "rank"]),
    "value": (BadOption, lambda m: veneer.attach(m, "lora", rank=0), ["rank=0", "at least 1"]),
    "kind of value": (BadOption, lambda m: veneer.attach(m, "lora", rank="eight"), ["rank='eight'", "number"]),
    "choice": (BadOption, lambda m: veneer.attach(m, "lora", dtype="float8"), ["dtype='float8'", '"base"']),
    "adapter": (UnknownAdapter, lambda m: veneer.activate(m, "lor"), ["'lor'", "lora"]),
    "adapter of a row": (UnknownAdapter, lambda m: enter(veneer.rows(m, ["lora", "lor"])), ["'lor'", "lora"]),
    "format": (UnknownName, lambda m: veneer.export(m, "lora", "x", format="pfet"), ["'pfet'", "peft"]),
    "task": (UnknownName, lambda m: find_task("clasify"), ["'clasify'", "classify"]),
    "metric": (UnknownName, lambda m: find_metric("acuracy"), ["'acuracy'", "accuracy"]),
    "recipe": (UnknownName, lambda m: recipes.lookup("lora_pluss"), ["'lora_pluss'", "lora_plus"]),
    "base": (UnknownName, lambda m: veneer.open_base("builtin:minlm"), ["minlm", "minilm"]),
    "data": (UnknownName, lambda m: data.read("builtin:movie-sentence"), ["movie-sentence", "movie-sentences"]),
    "reading option": (UnknownOption, lambda m: data.read([], colums="a"), ["'colums'", "columns"]),
    "setting": (UnknownOption, lambda m: run(learning_rat=1.0), ["'learning_rat'", "learning_rate"]),
    "schedule": (UnknownName, lambda m: run(schedule="cosin"), ["cosin", "cosine"]),
    "number": (BadOption, lambda m: run(batch_size=0), ["batch_size=0", "at least 1"]),
    "rate": (BadOption, lambda m: run(learning_rate=-1.0), ["learning_rate=-1.0", "above 0"]),
    "precision": (BadOption, lambda m: run(mixed_precision="fp8"), ["'fp8'", "bf16"]),
    "recipe option": (UnknownOption, lambda m: run(method="lora+lora_plus:rato=2"), ["rato", "ratio"]),
    "folder": (UnknownName, lambda m: veneer.load(m, "no/such/place"), ["no/such/place"]),
}  # fmt: skip


def enter(context):
    with context:
        pass


@pytest.mark.parametrize("what", UNKNOWN)
def test_an_unknown_name_or_value_is_refused_with_the_nearest(what):
    kind, call, says = UNKNOWN[what]
    model = base("bert")
    veneer.attach(model, "lora")
    with untouched(model), refused(kind, *says):
        call(model)


def test_the_names_beside_the_unknown_ones_are_taken():
    model = base("bert")
    veneer.attach(model, "lora", rank=4)
    veneer.activate(model, "lora")
    with veneer.rows(model, ["lora", None]):
        assert out(model, inputs("bert", 2)).isfinite().all()
    assert find_task("classify").name == "classify"
    assert find_metric("accuracy").function([1, 0], [1, 1]) == 0.5
    assert run(method="lora+lora_plus:ratio=2", schedule="cosine", max_steps=1).steps == 1


def test_a_model_without_adapters_and_no_module_at_all_are_told_what_to_do():
    with refused(UnknownAdapter, "BertForSequenceClassification", "veneer.attach"):
        veneer.activate(base("bert"), "lora")
    with refused(BadOption, "PyTorch module", "str"):
        veneer.attach("builtin:minilm", "lora")


def test_a_name_that_is_taken_or_no_text_is_refused_and_the_first_stays():
    model = base("bert")
    first = add(model, "lora", "a")
    before = {k: v.clone() for k, v in first.named().items()}
    for name, kind in (("a", BadOption), ("", BadOption), ("x\n", BadOption)):
        with untouched(model), refused(kind, repr(name).strip("'") or "''"):
            veneer.attach(model, "ia3", name=name)
    assert veneer.adapters(model) == {"a": first}
    assert all(torch.equal(before[k], v) for k, v in first.named().items())
    veneer.attach(model, "ia3", name="b")


def test_names_for_another_number_of_rows_are_refused_with_both_numbers():
    model = base("bert")
    veneer.attach(model, "lora", name="a")
    with veneer.rows(model, ["a", None, "a"]), refused(BadOption, "2 rows", "3", "veneer.rows"):
        out(model, inputs("bert", 2))
    with veneer.rows(model, ["a", None]):
        assert out(model, inputs("bert", 2)).shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["plan", "builtin:minlm", "lora"], 2, "minilm"),
        (["train", "--model", "m", "--data", "rows.csv", "--method", "lorra", "--output", "o"], 2, "lora"),
        (
            ["train", "--model", "m", "--data", "rows.csv", "--task", "clasify", "--output", "o"],
            2,
            "classify",
        ),
        (["train", "--model", "gone", "--data", "rows.csv", "--output", "o"], 2, "'gone'"),
        (["check", "row.csv"], 2, "rows.csv"),
        (["predict", "--adapter", "gone", "x"], 2, "'gone'"),
    ],
)
def test_the_command_line_refuses_in_words_without_a_traceback(arguments, code, says, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from veneer.cli._app import app

    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *GOOD, ""]))
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, arguments, prog_name="veneer")
    assert shown.exit_code == code, shown.output
    assert says in shown.stderr
    assert "next:" in shown.stderr
    assert "Traceback" not in shown.output
    assert shown.stdout == ""
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")} - {"rows.csv"}
    assert not any("adapter" in name or "checkpoint" in name for name in left), left


# -- a trained tensor without a gradient -----------------------------------------------------------------------


class Half(nn.Module):
    """Two layers, of which the forward uses one."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_a_tensor_that_the_loss_never_reaches_is_named_by_its_site():
    model = Half()
    veneer.attach(model, "lora", name="a", sites=["used", "unused"])
    engine.prepare_training(model)
    model(torch.randn(2, 4)).sum().backward()
    with refused(NoGradient, "'a'", "lora", "site 'unused'", "exclude=['unused']"):
        engine.check_gradients(model)
    veneer.detach(model, "a")
    veneer.attach(model, "lora", name="b", sites=["used", "unused"], exclude=["unused"])
    engine.prepare_training(model)
    model(torch.randn(2, 4)).sum().backward()
    engine.check_gradients(model)


def test_training_says_so_at_the_first_step():
    opened = tiny.bert_base()
    opened.model.bert.pooler.add_module("aside", nn.Linear(32, 32))
    with refused(NoGradient, "pooler.aside", "exclude="):
        run(model=opened, method="lora", method_options={"sites": ["query", "aside"]}, max_steps=2)
    assert run(method_options={"sites": ["query"]}, max_steps=2).steps == 2


def test_an_adapter_that_needs_data_is_not_trained_or_saved_without_it(tmp_path):
    model = base("bert")
    veneer.attach(model, "fish_mask", name="f")
    with refused(NotPrepared, "'f'", "fish_mask", "data="):
        engine.prepare_training(model)
    with refused(NotPrepared, "'f'", "data="):
        veneer.save(model, "f", tmp_path / "f")
    assert not (tmp_path / "f").exists()
    given = {**inputs("bert", 2), "labels": torch.tensor([0, 1])}
    veneer.attach(model, "fish_mask", name="g", data=[given])
    engine.prepare_training(model)
    veneer.save(model, "g", tmp_path / "g")


# -- another base, vocabulary or rank at load ------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a randomised LoRA of a tiny Llama that trains its table of tokens too."""
    model = base("llama", double=False)
    add(model, "lora", "mine", rank=4, whole=["embed_tokens"])
    folder = tmp_path_factory.mktemp("saved") / "mine"
    veneer.save(model, "mine", folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "mine"))


def other_llama(**changes):
    import zoo

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**zoo._LLAMA, **changes})).eval()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 1}, ["LlamaForCausalLM", "unexpected block.1.attention."]),
        ({"num_hidden_layers": 3}, ["missing block.2.attention."]),
        ({"hidden_size": 48, "num_attention_heads": 6}, ["(4, 32) in the file", "(4, 48)"]),
        ({"vocab_size": 80}, ["(64, 32) in the file", "(80, 32)"]),
    ],
    ids=["fewer blocks", "more blocks", "wider", "another vocabulary"],
)
def test_another_base_is_refused_with_the_first_tensors_that_differ(folder, changes, says):
    model = other_llama(**changes)
    with untouched(model), refused(ShapeDiffers, *says):
        veneer.load(model, folder)
    assert "veneer" not in model._modules
    veneer.load(other_llama(), folder)


def test_a_base_of_another_family_is_refused_and_other_adapters_stay(folder):
    model, given = base("bert"), inputs("bert", 2)
    add(model, "lora", "first")
    y = out(model, given)
    with untouched(model), refused(VeneerError, "embed_tokens"):
        veneer.load(model, folder)
    assert torch.equal(out(model, given), y)


def test_a_record_with_another_rank_than_its_tensors_is_refused(folder):
    record = json.loads((folder / "veneer.json").read_text())
    record["options"]["rank"] = 16
    (folder / "veneer.json").write_text(json.dumps(record))
    model = other_llama()
    with untouched(model), refused(ShapeDiffers, "(4, 32) in the file", "rank=16", "(16, 32)"):
        veneer.load(model, folder)


def test_tensors_that_are_gone_or_too_many_are_counted_and_named(folder):
    tensors = load_file(folder / "adapter.safetensors")
    gone = sorted(tensors)[0]
    changed = {
        **{k: v for k, v in tensors.items() if k != gone},
        "block.9.attention.query/A": torch.zeros(4, 32),
    }
    save_file(changed, folder / "adapter.safetensors")
    model = other_llama()
    with (
        untouched(model),
        refused(
            ShapeDiffers, "1 tensors are missing", f"missing {gone}", "unexpected block.9.attention.query/A"
        ),
    ):
        veneer.load(model, folder)


def test_tensors_of_another_save_are_refused_by_their_digest(folder):
    tensors = load_file(folder / "adapter.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, folder / "adapter.safetensors")
    model = other_llama()
    with untouched(model), refused(BadFile, "mine", "SHA-256"):
        veneer.load(model, folder)


def test_a_base_with_other_weights_is_said_to_be_another(folder):
    model = other_llama()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    with pytest.warns(UserWarning, match="other weights than the one"):
        veneer.load(model, folder)


# -- files that are corrupt, dangerous, or not there -----------------------------------------------------------


def damage_truncated(folder):
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def damage_empty(folder):
    (folder / "adapter.safetensors").write_bytes(b"")


def damage_forty_bytes(folder):
    (folder / "adapter.safetensors").write_bytes(b"\x10" + bytes(39))


def damage_pickle_of_the_same_name(folder):
    torch.save({"a": torch.zeros(2)}, folder / "adapter.safetensors")


def damage_pickle(folder):
    torch.save(load_file(folder / "adapter.safetensors"), folder / "adapter.bin")
    (folder / "adapter.safetensors").unlink()


def damage_no_tensors(folder):
    (folder / "adapter.safetensors").unlink()


def damage_no_record(folder):
    (folder / "veneer.json").unlink()


def damage_half_a_record(folder):
    (folder / "veneer.json").write_text((folder / "veneer.json").read_text()[:100])


def damage_record_of_bytes(folder):
    (folder / "veneer.json").write_bytes(b"\xff\xfe\x00{")


def damage_record_of_a_later_version(folder):
    record = json.loads((folder / "veneer.json").read_text())
    (folder / "veneer.json").write_text(json.dumps({**record, "format": 99}))


def damage_link_out(folder):
    elsewhere = folder.parent / "elsewhere.safetensors"
    os.replace(folder / "adapter.safetensors", elsewhere)
    (folder / "adapter.safetensors").symlink_to(elsewhere)


def damage_record_is_a_link(folder):
    os.replace(folder / "veneer.json", folder.parent / "elsewhere.json")
    (folder / "veneer.json").symlink_to("../elsewhere.json")


def damage_a_folder_for_a_file(folder):
    (folder / "adapter.safetensors").unlink()
    (folder / "adapter.safetensors").mkdir()


DAMAGE = {
    damage_truncated: "truncated", damage_empty: "truncated", damage_forty_bytes: "truncated",
    damage_pickle_of_the_same_name: "truncated or no safetensors", damage_pickle: "pickles are never loaded",
    damage_no_tensors: "has no adapter.safetensors", damage_no_record: "holds no adapter",
    damage_half_a_record: "not readable as JSON", damage_record_of_bytes: "not readable as JSON",
    damage_record_of_a_later_version: "format 99", damage_link_out: "link that leads out of its folder",
    damage_record_is_a_link: "link that leads out of its folder",
    damage_a_folder_for_a_file: "adapter.safetensors",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__.removeprefix("damage_"))
def test_a_spoilt_folder_is_refused_and_the_model_stays_as_it_was(damage, folder, saved):
    damage(folder)
    model = other_llama()
    with untouched(model), refused(BadFile, str(folder), DAMAGE[damage]):
        veneer.load(model, folder)
    assert "veneer" not in model._modules
    assert veneer.load(model, saved).name == "mine"


def test_a_pickle_in_an_adapter_folder_never_runs(folder):
    ran = folder.parent / "ran"
    (folder / "adapter.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(f"cos\nsystem\n(S'touch {ran}'\ntR.".encode())
    for _ in range(2):
        with refused(BadFile, "adapter_model.bin", "run code"):
            veneer.load(other_llama(), folder)
        (folder / "veneer.json").unlink(missing_ok=True)  # then as a folder of HF PEFT's
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["../../outside", "ABSOLUTE/stray", "..", ".", "a/../../b", "x/../../../y", "~", "a\\b"]
)
def test_a_name_in_a_record_is_a_name_and_no_path(name, folder, tmp_path):
    name = name.replace("ABSOLUTE", str(tmp_path / "absolute"))
    record = json.loads((folder / "veneer.json").read_text())
    (folder / "veneer.json").write_text(json.dumps({**record, "name": name}))
    model = other_llama()
    before = sorted(tmp_path.rglob("*"))
    made = veneer.load(model, folder)
    y = out(model, inputs("llama", 2))
    model.save_pretrained(tmp_path / "whole" / "deep")
    after = sorted(p for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "whole"))
    assert after == before, "a file was written outside of the folder that was named"
    assert made.name == name
    again = other_llama()
    (place,) = {p.parent for p in (tmp_path / "whole" / "deep" / "veneer").rglob("veneer.json")}
    assert veneer.load(again, place).name == name
    assert torch.equal(out(again, inputs("llama", 2)), y)


def test_a_file_where_a_folder_is_meant_is_named_in_both_directions(folder, tmp_path):
    model = other_llama()
    with refused(BadFile, "adapter.safetensors", "is a file", "folder"):
        veneer.load(model, folder / "adapter.safetensors")
    veneer.load(model, folder)
    (tmp_path / "taken").write_text("mine")
    with refused(BadFile, "taken", "is a file"):
        veneer.save(model, "mine", tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


# -- data ------------------------------------------------------------------------------------------------------


LINES = {
    "empty text": (["  ,good"], "empty text: 1 (line 20)"),
    "missing label": (["a film without one,"], "missing label: 1 (line 20)"),
    "ragged": (["a film, with a comma,good"], "(line 20)"),
    "encoding": (["caf\udce9 noir,good"], "encoding: 1 (line 20)"),
    "quotes": (['"never closed,good'], "quotes: 1 (line 20)"),
    "many": (["  ,good"] * 7, "empty text: 7 (line 20, line 21, line 22, line 23, line 24, ...)"),
}


@pytest.mark.parametrize("kind", LINES)
def test_bad_rows_are_counted_with_their_lines_and_set_aside_on_request(kind, tmp_path):
    lines, says = LINES[kind]
    file = tmp_path / "reviews.csv"
    file.write_bytes("\n".join(["text,label", *GOOD, *lines, ""]).encode("utf-8", "surrogateescape"))
    with refused(BadData, "reviews.csv", says, "--skip-bad-rows"):
        data.read(file)
    found = data.read(file, skip_bad_rows=tmp_path / "aside.jsonl")
    assert len(found) == len(GOOD)
    aside = [json.loads(line) for line in (tmp_path / "aside.jsonl").read_text().splitlines()]
    assert [a["line"] for a in aside] == list(range(20, 20 + len(lines)))


DATA = {
    "no rows": ([], {}, ["no rows"]),
    "no such column": ([{"text": "a b", "lable": 1}] * 4, {"task": "classify"}, ["'label'", "'lable'"]),
    "a column that is named wrong": (
        [{"text": f"a {i}", "label": i % 2} for i in range(9)], {"columns": "text=txet,label=label"}, ["txet", "text"],
    ),
    "one label": ([{"text": f"a {i}", "label": "good"} for i in range(9)], {}, ["one label only", "'good'"]),
    "an unknown label": (
        [{"text": f"a {i}", "label": ("good", "bad", "goood")[i % 3]} for i in range(9)],
        {"labels": ["bad", "good"]}, ["unknown label: 3", "'goood'", "nearest: good"],
    ),
    "a copy in the test rows": (
        {"train": [{"text": f"film {i}", "label": i % 2} for i in range(9)], "test": [{"text": "Film 3", "label": 1}]},
        {}, ["duplicate between splits: 1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DATA)
def test_data_that_cannot_be_trained_on_says_why(kind):
    rows, options, says = DATA[kind]
    with refused(VeneerError, *says):
        data.read(rows, **options)


def test_rows_longer_than_the_model_are_counted_where_they_may_not_be_cut():
    rows = [{"text": f"the film was {w}", "label": i % 2} for i, w in enumerate(tiny.WORDS)]
    rows.append({"text": "very " * 80 + "good", "label": 1})
    with refused(BadData, "too long: 1 (line 19)", "83 tokens, more than 64"):
        data.read(rows, tokenizer=tiny.word_tokenizer(), max_length=64)
    assert len(data.read(rows[:-1], tokenizer=tiny.word_tokenizer(), max_length=64)) == len(rows) - 1


def test_nothing_is_trained_or_written_on_bad_data(tmp_path):
    rows = [{"text": f"the film was {w}", "label": i % 2} for i, w in enumerate(tiny.WORDS)]
    with refused(BadData, "empty text: 1"):
        run(tmp_path / "one", data=[*rows, {"text": "", "label": 1}])
    assert not (tmp_path / "one" / "run.json").exists()
    assert run(tmp_path / "one", data=rows).steps > 0


# -- a loss that is not finite ---------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_step_rows_module_and_remedy(tmp_path):
    class Break(Hooks):
        def between_steps(self, run, step):
            if step == 3:
                with torch.no_grad():
                    run.model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")

    with refused(
        TrainingFailed, "loss is not finite at step 3", "training rows", "bert.encoder.layer.1.output.dense",
        "step-00000002", "learning_rate=0.0006",
    ):  # fmt: skip
        run(tmp_path / "one", epochs=2, save_every=2, hooks=[Break()])
    kept = tmp_path / "one" / "checkpoints" / "step-00000002"
    state = load_file(kept / "adapter.safetensors")
    assert state
    assert all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point())
    assert run(tmp_path / "one", epochs=2, save_every=2).steps == 6


def test_an_adapter_that_is_not_finite_is_not_saved_over_a_good_one(folder):
    model = other_llama()
    adapter = veneer.load(model, folder)
    good = (folder / "adapter.safetensors").read_bytes(), (folder / "veneer.json").read_bytes()
    with torch.no_grad():
        adapter.leaves()[0][3] = float("inf")
    with refused(BadFile, "'mine'", "not finite", "learning rate"):
        veneer.save(model, "mine", folder)
    assert ((folder / "adapter.safetensors").read_bytes(), (folder / "veneer.json").read_bytes()) == good


# -- a full disk, two runs in one folder -----------------------------------------------------------------------


@contextmanager
def little_space(limit):
    """No file may grow beyond `limit` bytes: what a full disk looks like to whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("over", [False, True], ids=["new", "over another"])
@pytest.mark.parametrize("limit", [0, 2000, 10_000])
def test_a_full_disk_is_refused_in_words_and_the_old_adapter_stays(over, limit, folder, tmp_path):
    model = other_llama()
    veneer.load(model, folder)
    target = folder if over else tmp_path / "new"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with refused(VeneerError, str(target), "space"), little_space(limit):
        veneer.save(model, "mine", target)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["mine"], "a half was left behind"
    veneer.save(model, "mine", target)
    assert veneer.load(other_llama(), target).name == "mine"


def test_a_checkpoint_that_does_not_fit_the_disk_is_said_and_the_last_one_stays(tmp_path, monkeypatch):
    from veneer.training import _checkpoint

    plain = _checkpoint._write_through

    def full(path, content):
        if "step-00000002" in str(path) and path.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(path, content)

    monkeypatch.setattr(_checkpoint, "_write_through", full)
    with refused(TrainingFailed, "step-00000002", "No space left on device", "same command again"):
        run(tmp_path / "one", save_every=1)
    assert [p.name for p in (tmp_path / "one" / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    whole, again = run(tmp_path / "two", save_every=1), run(tmp_path / "one", save_every=1)
    assert again.predictions == whole.predictions


def test_two_runs_in_one_folder_are_refused_with_the_process_that_has_it(tmp_path):
    from veneer.training._checkpoint import locked

    with locked(tmp_path / "one"), refused(TrainingFailed, "one", f"process {os.getpid()}", "another output"):
        run(tmp_path / "one")
    assert run(tmp_path / "one", max_steps=1).steps == 1


def test_a_folder_of_another_run_is_refused_with_what_differs(tmp_path):
    run(tmp_path / "one", max_steps=1)
    kept = (tmp_path / "one" / "adapter.safetensors").read_bytes()
    with refused(TrainingFailed, "seed: 0 there, 1 now", "another output"):
        run(tmp_path / "one", max_steps=1, seed=1)
    assert (tmp_path / "one" / "adapter.safetensors").read_bytes() == kept


# -- memory ----------------------------------------------------------------------------------------------------


def test_memory_is_forecast_before_anything_runs_and_grows_with_the_batch():
    plan = veneer.plan(base("llama"), "lora", rank=4)
    small, large = (plan.memory(batch_size=n, length=64) for n in (2, 8))
    assert small["weights"] == large["weights"] > 0
    assert large["activations"] > 3 * small["activations"] > 0
    assert plan.memory(batch_size=8, length=64, checkpointing=True)["activations"] < large["activations"]
    with refused(BadOption, "batch_size=-1"):
        plan.memory(batch_size=-1)


def test_running_out_of_memory_names_three_settings_and_what_each_saves():
    class Full(Hooks):
        def on_gradients(self, run, step):
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    with refused(
        TrainingFailed, "out of memory at step 0", "3 GiB", "accumulate=2", "activations halve",
        "gradient_checkpointing=True", "max_length=", "quarter",
    ):  # fmt: skip
        run(hooks=[Full()])
    assert run(accumulate=2, gradient_checkpointing=True, max_length=16, max_steps=1).steps == 1


# -- every refusal ---------------------------------------------------------------------------------------------


def refusals(path: Path) -> list[tuple[int, ast.Call]]:
    """Every error of veneer that a file makes, by line."""
    made = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [(c.lineno, c) for c in made if isinstance(c.func, ast.Name) and c.func.id in ERRORS]


ERRORS = {name for name, kind in vars(veneer.errors).items()
          if isinstance(kind, type) and issubclass(kind, VeneerError)}  # fmt: skip


def test_every_error_says_a_next_step_of_its_own():
    root = Path(veneer.__file__).parent
    found = [(path, line, call) for path in sorted(root.rglob("*.py")) for line, call in refusals(path)]
    assert len(found) > 400
    bare = [
        f"{path.relative_to(root)}:{line}" for path, line, call in found
        if path.name != "errors.py" and not any(k.arg in ("next_step", None) for k in call.keywords)
    ]  # fmt: skip
    assert not bare, "these rely on the default of their class: " + ", ".join(bare)


# -- what cannot be expressed ----------------------------------------------------------------------------------


def test_what_cannot_be_done_exactly_says_why():
    model = base("bert")
    add(model, "serial_adapter", "s")
    with untouched(model), refused(Unsupported, "'s' does not merge", "depends on the input"):
        veneer.merge(model, "s")
    add(model, "lora", "l")
    assert veneer.merge(model, "l").adapters == ["l"]
    with refused(Unsupported, "'l' is merged", "veneer.unmerge"):
        veneer.detach(model, "l")
    assert veneer.unmerge(model) == ["l"]
    veneer.detach(model, "l")
