"""The command line, called as a person calls it: in this process on tiny models, and in processes of its own."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import training_tiny as tiny
from veneer.cli._app import app
from veneer.cli._page import COMMANDS, page

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def run(*arguments, **options):
    """stdout, stderr and the exit code of one command."""
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="veneer", **options)


def process(*arguments, **options):
    command = [sys.executable, "-m", "veneer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, **options)


def document(result):
    """The one JSON document that --json leaves on standard output."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.saved_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.saved_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A CSV with columns of other names than veneer's."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["id", "body", "stars"])
        for i, row in enumerate(tiny.sentences(120, 5)):
            out.writerow([i, f"{row['text']} {i}", ["bad", "good"][row["label"]]])
    return path


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    splits, _ = tiny.talks(40)
    rows = [{"messages": [{"role": "user", "content": f"{r['messages'][0]['content']} {tiny.WORDS[i % 18]}"},
                          r["messages"][1]]} for i, r in enumerate(splits.train + splits.validation)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(bert, reviews, output, *more):
    return run(
        "train", "--model", bert, "--data", reviews, "--columns", "text=body,label=stars", "--epochs", 1,
        "--batch-size", 8, "--output", output, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapter(bert, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    result = train(bert, reviews, folder, "--method", "lora", "--rank", 4, "--learning-rate", "0.01")
    assert result.exit_code == 0, result.stderr
    return folder


# -- the page, usage, exit codes ---------------------------------------------------------------------


def test_help_is_a_page_with_every_command_and_two_examples():
    shown = run("--help")
    assert shown.exit_code == 0
    for name, about in COMMANDS.items():
        assert f"  {name}" in shown.stdout
        assert about[0].islower() or about.startswith("HF")
    assert shown.stdout.count("  veneer ") >= 2


@pytest.mark.parametrize("width", [60, 100])
def test_the_page_fits_the_terminal(width):
    assert max(map(len, page(width).split("\n"))) <= width


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help_with_two_examples(name):
    shown = run(name, "--help")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count(f"\n  veneer {name}") >= 2
    assert "--debug" in shown.stdout


def test_an_unknown_command_names_the_nearest():
    result = run("trian")
    assert result.exit_code == 2
    assert "nearest: train" in result.stderr


def test_an_unknown_flag_names_the_nearest():
    result = run("check", "x.csv", "--colums", "a=b")
    assert result.exit_code == 2
    assert "--columns" in result.stderr
    assert "veneer check --help" in result.stderr


def test_a_missing_flag_is_a_usage_error():
    result = run("train", "--data", "x.csv", "--output", "y")
    assert result.exit_code == 2
    assert "--model" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("methods", "lorra"), "lora"),
        (("methods", "--family", "aditive"), "additive"),
        (("check", "builtin:movie-sentence"), "movie-sentences"),
        (("compare", "--methods", "lora"), ""),
        (("laws", "lorra"), "lora"),
    ],
)
def test_unknown_names_are_usage_errors_with_the_nearest(arguments, nearest):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert nearest in result.stderr
    assert "next:" in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_an_option_of_a_method_that_does_not_exist_names_the_nearest_of_both_kinds(bert, tmp_path):
    result = run("plan", bert, "lora", "--rnk", 8)
    assert result.exit_code == 2
    assert "rank" in result.stderr
    result = run("train", "--model", bert, "--data", "x.csv", "--output", tmp_path / "x", "--learning-rat", 1)
    assert result.exit_code == 2
    assert "--learning-rate" in result.stderr


def test_a_failure_has_exit_code_1_and_a_traceback_only_with_debug(tmp_path):
    result = run("predict", "--adapter", tmp_path, "x")
    assert result.exit_code == 1
    assert "BadFile" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in run("predict", "--adapter", tmp_path, "x", "--debug").stderr
    assert "Traceback" in run("--debug", "predict", "--adapter", tmp_path, "x").stderr


def test_the_version_is_printed():
    import veneer

    assert run("--version").stdout.strip() == f"veneer {veneer.__version__}"


# -- looking ----------------------------------------------------------------------------------------


def test_methods_lists_the_catalogue_and_filters_it():
    import veneer

    every = document(run("methods", "--json"))
    assert {m["key"] for m in every} == {m.key for m in veneer.methods()}
    additive = document(run("methods", "--family", "additive", "--mergeable", "--json"))
    assert additive
    assert all(m["family"].startswith("additive/") and m["mergeable"] for m in additive)


def test_below_keeps_methods_that_train_less():
    few = document(run("methods", "--below", "0.1%", "--json"))
    assert {"vera", "ia3"} <= {m["key"] for m in few}
    assert not {"full", "serial_adapter"} & {m["key"] for m in few}
    assert all(m["share"] <= 0.001 for m in few)
    assert run("methods", "--below", "much").exit_code == 2


def test_one_method_shows_its_equation_and_its_options():
    shown = run("methods", "lora").stdout
    for piece in ("W' = W + s B A", "rank = 8", "lora_alpha", "arXiv:2106.09685", "merges"):
        assert piece in shown


def test_anatomy_names_roles_and_modules(bert):
    roles = document(run("anatomy", bert, "--json"))["roles"]
    assert len(roles["attention.query"]) == 2
    assert "attention.query" in run("anatomy", bert).stdout
    assert "encoder.layer.1.attention.self.query" in run("anatomy", bert, "--modules").stdout


def test_plan_takes_options_of_the_method_in_three_ways(bert):
    ways = [("lora:rank=2",), ("lora", "--rank", "2"), ("lora", "--option", "rank=2")]
    counts = {document(run("plan", bert, *way, "--json"))["trainable_parameters"] for way in ways}
    assert counts == {2 * 2 * 2 * (32 + 32)}  # blocks, sites, rank, both sides
    assert document(run("plan", bert, "lora", "--sites", "block[-1:].mlp.down", "--json"))["sites"][0][
        "module"
    ]


def test_a_flag_of_a_method_without_a_value_is_true(bert):
    plan = document(run("plan", bert, "lora", "--rank-stabilized", "--rank", 2, "--json"))
    assert plan["options"]["rank_stabilized"] is True


def test_check_says_what_is_wrong_and_where(reviews, tmp_path):
    good = document(run("check", reviews, "--columns", "text=body,label=stars", "--json"))
    assert good["ok"]
    assert good["task"] == "classify"
    bad = tmp_path / "bad.csv"
    bad.write_text(reviews.read_text() + "120,,good\n")
    result = run("check", bad, "--columns", "text=body,label=stars")
    assert result.exit_code == 1
    assert "line 122" in result.stdout


def test_doctor_lists_versions_devices_and_what_is_missing(monkeypatch):
    from veneer.cli import doctor

    assert document(run("doctor", "--json"))["versions"]["torch"]
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: None if name == "gguf" else real(name))
    assert "gguf:  pip install 'veneer[train]'" in run("doctor").stdout


def test_laws_run_one_law_on_one_base_and_fail_with_1(monkeypatch):
    found = document(run("laws", "lora", "--law", "identity", "--base", "bert", "--json"))
    assert found["ok"]
    assert [row["law"] for row in found["methods"][0]["rows"]] == ["identity"]
    from veneer import testing

    broken = testing.LawReport("lora", [testing.LawRow(1, "identity", "bert", "failed", "it does not hold")])
    monkeypatch.setattr(testing, "check_method", lambda *a, **k: broken)
    result = run("laws", "lora")
    assert result.exit_code == 1
    assert "it does not hold" in result.stdout


# -- training, and what comes after -----------------------------------------------------------------


def test_train_says_before_it_starts_what_it_will_do_and_afterwards_what_to_type(bert, reviews, tmp_path):
    result = train(bert, reviews, tmp_path / "run", "--method", "lora:rank=4")
    assert result.exit_code == 0, result.stderr
    before = " ".join(result.stderr.split())  # however wide the terminal is
    for piece in ("2 labels: bad, good", "train 96, validation 12, test 12", "nothing wrong found", "classifier",
                  "lora(rank=4) at 4 sites", "trained", "rate", "12 of 8 rows", "memory"):  # fmt: skip
        assert piece in before, piece
    for piece in ("accuracy", "n = 12", "veneer predict", "veneer merge", "veneer export"):
        assert piece in result.stdout, piece


@pytest.mark.parametrize(
    ("typed", "words"),
    [(["--method", "loraa"], "lora"), (["--rank", "0"], "rank=0"), (["--method", "lora+lora_pluss"], "lora_plus"),
     (["--schedule", "linaer"], "linear")],
)  # fmt: skip
def test_train_checks_what_is_to_be_done_before_it_reads_data(typed, words, bert, tmp_path):
    found = run(
        "train", "--model", bert, "--data", tmp_path / "missing.csv", "--output", tmp_path / "o", *typed
    )
    assert found.exit_code != 0
    assert words in found.stderr
    assert "missing.csv" not in found.stderr


def test_train_with_json_leaves_one_document_and_quiet_leaves_nothing_else(bert, reviews, tmp_path):
    result = train(bert, reviews, tmp_path / "run", "--json", "--quiet")
    found = document(result)
    assert found["metrics"]["validation"]["accuracy"] >= 0
    assert found["predictions"] == {"validation": 12}
    assert result.stderr == ""


def test_the_same_train_command_again_trains_nothing(bert, reviews, adapter):
    before = (adapter / "adapter.safetensors").read_bytes()
    result = train(bert, reviews, adapter, "--method", "lora", "--rank", 4, "--learning-rate", "0.01")
    assert result.exit_code == 0, result.stderr
    assert "finished before" in result.stderr
    assert (adapter / "adapter.safetensors").read_bytes() == before


def test_the_card_is_honest_about_what_was_measured(adapter):
    text = (adapter / "README.md").read_text()
    for piece in (
        "LoRA",
        "rank = 4",
        "| validation | 12 | accuracy |",
        "train 96",
        "veneer predict --adapter",
    ):
        assert piece in text, piece
    assert "| test |" not in text


def test_a_card_that_a_person_wrote_is_left_alone(adapter, tmp_path):
    import shutil

    from veneer.cli._card import write_card

    copy = shutil.copytree(adapter, tmp_path / "copy")
    (copy / "README.md").write_text("# mine\n")
    write_card(copy)
    assert (copy / "README.md").read_text() == "# mine\n"


def test_predict_reads_texts_files_and_standard_input(adapter, reviews, tmp_path):
    found = document(run("predict", "--adapter", adapter, "a good film", "--json"))
    (one,) = found["predictions"]
    assert one["prediction"] in ("bad", "good")
    assert sum(one["probabilities"].values()) == pytest.approx(1)
    assert one["text"] == "a good film"
    lines = tmp_path / "lines.csv"
    lines.write_text("body\na good film\na bad film\n")
    of_file = document(
        run("predict", "--adapter", adapter, "--input", lines, "--columns", "text=body", "--json")
    )
    assert [p["text"] for p in of_file["predictions"]] == ["a good film", "a bad film"]
    piped = document(run("predict", "--adapter", adapter, "-", "--json", input="a good film\n\na bad film\n"))
    good = [[p["probabilities"]["good"] for p in found["predictions"]] for found in (piped, of_file)]
    assert good[0] == pytest.approx(good[1], rel=1e-4)
    assert run("predict", "--adapter", adapter).exit_code == 2


def test_a_merged_model_opens_without_veneer_and_says_the_same(adapter, tmp_path):
    import torch
    import transformers

    report = document(run("merge", "--adapter", adapter, "--output", tmp_path / "merged", "--json"))
    assert 0 <= report["max_abs_error"] < 1e-5
    assert report["reopened_max_abs_error"] < 1e-5
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert not any("veneer" in name for name in model.state_dict())
    with torch.no_grad():
        logits = model(**tokenizer("a good film", return_tensors="pt")).logits
    (one,) = document(run("predict", "--adapter", adapter, "a good film", "--json"))["predictions"]
    assert logits.softmax(-1)[0, 1].item() == pytest.approx(one["probabilities"]["good"], abs=1e-5)
    assert model.config.id2label[1] == "good"


def test_merge_refuses_a_full_folder_and_a_method_that_does_not_merge(bert, reviews, adapter, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    assert run("merge", "--adapter", adapter, "--output", tmp_path / "full").exit_code == 2
    assert train(bert, reviews, tmp_path / "reft", "--method", "loreft", "--max-steps", 2).exit_code == 0
    result = run("merge", "--adapter", tmp_path / "reft", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "does not merge" in result.stderr
    assert not (tmp_path / "out").exists()


def test_export_writes_what_hf_peft_reads(adapter, tmp_path):
    found = document(run("export", "--adapter", adapter, "--output", tmp_path / "peft", "--json"))
    assert found["format"] == "peft"
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    result = run("export", "--adapter", adapter, "--format", "pefd", "--output", tmp_path / "x")
    assert result.exit_code == 2
    assert "peft" in result.stderr


def test_a_conversation_is_trained_on_its_answers_and_goes_on_in_generate_and_chat(llama, talks, tmp_path):
    result = run(
        "train",
        "--model",
        llama,
        "--data",
        talks,
        "--max-steps",
        3,
        "--batch-size",
        4,
        "--output",
        tmp_path / "two",
    )
    assert result.exit_code == 0, result.stderr
    assert "tokens are trained on" in result.stderr
    rows = [line for line in result.stderr.split("\n") if "«" in line and "tokens" not in line]
    assert len(rows) == 3
    for row in rows:
        inside = row.split("«")[1].split("»")[0]
        assert "<|im_end|>" in inside
        assert "user" not in inside
    assert "veneer chat" in result.stdout
    given = ("--adapter", tmp_path / "two", "--max-new-tokens", 4)
    plain = run("generate", "good", *given)
    assert plain.exit_code == 0, plain.stderr
    assert document(run("generate", "good", *given, "--json"))["text"].strip() == plain.stdout.strip()
    talk = run("chat", *given, input="good\n/again\nbad\n/quit\n")
    assert talk.exit_code == 0, talk.stderr
    assert len(talk.stdout.rstrip("\n").split("\n")) == 2


def test_generate_on_a_classifier_says_what_to_use(adapter):
    result = run("generate", "good", "--adapter", adapter)
    assert result.exit_code == 1
    assert "veneer predict" in result.stderr


# -- comparing --------------------------------------------------------------------------------------


def test_results_made_elsewhere_get_the_same_table_and_report(tmp_path):
    lines = tmp_path / "scores.jsonl"
    with open(lines, "w") as file:
        for arm, share in (("ours", 0.9), ("theirs", 0.4)):
            for seed in range(1, 7):
                for item in range(60):
                    score = float((item * 7 + seed) % 10 < 10 * share)
                    file.write(json.dumps({"arm": arm, "seed": seed, "item": item, "score": score}) + "\n")
    result = run("compare", "--from", lines, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "ours *" in result.stdout
    assert (tmp_path / "out" / "report.html").is_file()
    assert (
        document(run("compare", "--from", lines, "--output", tmp_path / "out", "--json"))["arms"][0]["arm"]
        == "ours"
    )
    assert run("compare", "--from", lines, "--methods", "lora").exit_code == 2


def test_compare_checks_names_before_it_runs(bert, reviews, tmp_path):
    start = (
        "compare",
        "--model",
        bert,
        "--data",
        reviews,
        "--output",
        tmp_path / "c",
        "--columns",
        "text=body,label=stars",
    )
    cases = (
        (("--methods", "lorra"), "lora"), (("--methods", "lora", "--batch-sise", 4), "--batch-size"),
        (("--methods", "lora:rnk=2"), "rank"), (("--methods", "lora", "--contrast", "lora"), ""),
    )  # fmt: skip
    for more, near in cases:
        result = run(*start, *more)
        assert result.exit_code == 2, result.output
        assert near in result.stderr


def test_a_comparison_file_is_shown_before_it_runs_and_flags_go_before_it(bert, reviews, tmp_path):
    file = tmp_path / "which.toml"
    file.write_text(
        f"model = '{bert}'\ndata = '{reviews}'\nmethods = 'lora:rank=2'\ncolumns = 'text=body,label=stars'\n"
        "seeds = 3\nmax_length = 32\nsizes = 'validation=20,test=30'\n"
    )
    shown = document(run("compare", file, "--dry-run", "--json", "--seeds", 4, "--batch-size", 8))
    design = shown["design"]
    assert shown["sha256"]
    assert design["seeds"] == [1, 2, 3, 4]
    assert design["options"] == {"max_length": 32, "batch_size": 8}
    assert (design["sizes"]["validation"], design["sizes"]["test"]) == (20, 30)
    assert shown["forecast"]["smallest_findable"] > 0
    text = run("compare", "--max-length", 32, file, "--dry-run").stdout
    assert "smallest effect it can find (power 0.8" in text
    assert not (tmp_path / "runs").exists()
    wrong = run("compare", tmp_path / "none.toml", "--dry-run")
    assert wrong.exit_code == 1
    assert "cannot be read" in wrong.stderr


@pytest.mark.slow
def test_a_whole_comparison_leaves_a_winner_that_predicts(bert, reviews, tmp_path):
    result = run(
        "compare", "--model", bert, "--data", reviews, "--columns", "text=body,label=stars", "--methods", "lora:rank=2",
        "--budget", "examples=64", "--seeds", 2, "--trials", 1, "--output", tmp_path / "c", "--json",
    )  # fmt: skip
    found = document(result)
    assert {arm["arm"] for arm in found["arms"]} == {
        "untrained",
        "linear_probe",
        "full",
        "lora:rank=2",
        "random_direction:rank=2",
    }
    if (tmp_path / "c" / "best" / "veneer.json").is_file():
        assert (tmp_path / "c" / "best" / "README.md").is_file()
        assert run("predict", "--adapter", tmp_path / "c" / "best", "a good film").exit_code == 0


# -- processes of their own -------------------------------------------------------------------------


def test_help_is_there_at_once_and_imports_no_torch():
    code = (
        "import sys; from veneer.cli import main\ntry: main(['--help'])\n"
        "finally: print('torch' in sys.modules, 'typer' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.strip().endswith("False False")


def test_a_process_ends_with_the_code_of_its_error():
    done = process("methods", "lorra")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("UnknownMethod: no method is called 'lorra'.")
    done = process("predict", "--adapter", "/nowhere/at/all", "x", "--json")
    assert (done.returncode, done.stdout) == (2, "")


def test_standard_output_is_one_document_whatever_libraries_print(adapter):
    done = process("predict", "--adapter", adapter, "a good film", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predictions"]


def test_a_reader_that_leaves_early_is_no_error_to_talk_about():
    command = f"{sys.executable} -m veneer methods lora | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.startswith("LoRA")
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_says_so_and_ends_with_130(bert, reviews, tmp_path):
    output = tmp_path / "run"
    command = [
        sys.executable, "-m", "veneer", "train", "--model", bert, "--data", str(reviews), "--columns",
        "text=body,label=stars", "--max-steps", "100000", "--save-every", "20", "--output", str(output),
    ]  # fmt: skip
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    limit = time.monotonic() + 90
    while not list(output.glob("checkpoint*")) and time.monotonic() < limit and started.poll() is None:
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert out == ""
    assert "interrupted" in err
    assert "Traceback" not in err
