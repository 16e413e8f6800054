"""The command `hf-l2sp`: what it prints and writes, its exit codes, and errors of one line."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import save_file

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments, cli
from hf_l2sp.cli import main
from hf_l2sp.report import DriftReport

from .html_page import Page

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def trained(tiny_bert_dir, classification_data, tmp_path_factory):
    """Output folder of a run of six steps, without the report that a recipe adds."""
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("trained") / "out"
    model = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)
    args = L2SPTrainingArguments(
        output_dir=str(folder),
        l2sp_lambda=0.1,
        max_steps=6,
        logging_steps=2,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = L2SPTrainer(model=model, args=args, train_dataset=classification_data)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    report = trainer.l2sp_drift_report()
    return folder, report


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, and its drift report."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run", trained[1]


@pytest.fixture
def two(tmp_path):
    """Two files of tensors, 3 from each other in one and 4 in the other."""
    save_file({"x.0.w": torch.zeros(4), "x.1.w": torch.ones(4)}, tmp_path / "anchor.safetensors")
    moved = {"x.0.w": torch.tensor([3.0, 0, 0, 0]), "x.1.w": torch.tensor([5.0, 1, 1, 1]), "head": torch.ones(2)}
    save_file(moved, tmp_path / "model.safetensors")
    return [str(tmp_path / f"{name}.safetensors") for name in ("model", "anchor")]


def failure(capsys, *words):
    """The one line that a command fails with."""
    assert main(list(words)) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


# --------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "hf-l2sp: the following arguments are required: COMMAND (hf-l2sp --help"),
        (["drift", "a"], "hf-l2sp drift: the following arguments are required: ANCHOR (hf-l2sp drift --help"),
        (["compare", "a"], "hf-l2sp compare: the following arguments are required: DIR_B"),
        (["report", "a", "--jso"], "hf-l2sp: unrecognized arguments: --jso"),
        (["nothing"], "hf-l2sp: argument COMMAND: invalid choice: 'nothing'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], ["report", "--help"], ["compare", "--help"], ["drift", "--help"]])
def test_help(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: hf-l2sp")


def test_as_a_module_and_as_a_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf_l2sp", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("hf_l2sp", run_name="__main__")
    assert (stop.value.code, capsys.readouterr().out) == (0, f"hf-l2sp {version('hf-l2sp')}\n")
    (target,) = re.findall(r'^hf-l2sp = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert target == f"{cli.__name__}:{main.__name__}"


# --------------------------------------------------------------------------- drift


def test_drift_prints_numbers_and_what_was_left_out(capsys, two):
    assert main(["drift", *two]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["x.0"] == ["4", "3", "inf", "%"]
    assert rows["x.1"] == ["4", "4", "200", "%"]
    assert rows["all"] == ["8", "5", "250", "%"]
    assert "only in MODEL: head" in out


def test_drift_as_json(capsys, two):
    assert main(["drift", *two, "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["total"] == {"parameters": 8, "distance": 5.0, "norm": 2.0, "drift": 2.5}
    assert found["layers"]["x.0"]["drift"] is None
    assert found["only_in_model"] == ["head"]
    assert found["model"]["source"] == two[0] and found["anchor"]["source"] == two[1]


def test_drift_of_folders_is_that_of_the_report(capsys, run, tiny_bert_dir):
    folder, report = run
    assert main(["drift", str(folder), tiny_bert_dir, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["distance"] == pytest.approx(report.total.distance, rel=1e-5)
    assert sorted(found["only_in_model"]) == ["classifier.bias", "classifier.weight"]


def test_files_are_written_and_never_overwritten(capsys, two, tmp_path):
    output, picture = tmp_path / "drift.json", tmp_path / "drift.png"
    words = ["drift", *two, "--json", "--output", str(output), "--plot", str(picture)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"Written: {output}\n"
    assert json.loads(output.read_text())["total"]["drift"] == 2.5
    assert imread(picture).shape[0] > 300
    picture.unlink()
    output.write_text("mine")
    assert "exists. Name another file, or add --force to replace it." in failure(capsys, *words)
    assert output.read_text() == "mine" and not picture.exists()
    assert main([*words, "--force"]) == 0
    assert output.read_text() != "mine" and picture.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "drift.xyz"], "name a file that ends in .png, .svg, .pdf"),
        (["--output", "nowhere/drift.txt"], "there is no folder 'nowhere'"),
        (["--output", "."], "is a folder"),
    ],
)
def test_where_nothing_can_be_written(capsys, two, words, message):
    assert message in failure(capsys, "drift", *two, *words)


def test_drift_errors_name_command_cause_and_fix(capsys, two, tmp_path):
    assert failure(capsys, "drift", two[0], "./nowhere") == (
        "hf-l2sp drift: there is no folder or file './nowhere': check the path.\n"
    )
    torch.save({}, tmp_path / "old.bin")
    assert "pickles are never opened. Load the model with from_pretrained" in failure(
        capsys, "drift", str(tmp_path / "old.bin"), two[1]
    )


def test_without_matplotlib_the_plot_is_refused_at_once(capsys, two, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = failure(capsys, "drift", *two, "--plot", str(tmp_path / "drift.png"))
    assert "pip install 'hf-l2sp[plots]'" in message


# --------------------------------------------------------------------------- compare


@pytest.fixture
def results(tmp_path):
    found = []
    for name, loss, f1 in (("a", 0.5, 0.75), ("b", 0.25, 0.5)):
        path = tmp_path / name / "all_results.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"test_loss": loss, "test_f1": f1, "eval_nan": math.nan, "epoch": 3.0}))
        found.append(str(path))
    return found


def test_compare_files_and_folders(capsys, results, tmp_path):
    assert main(["compare", *results]) == 0
    of_files = capsys.readouterr().out
    assert re.search(r"^test_loss +0.5000 +0.2500 +-0.2500 +better$", of_files, flags=re.MULTILINE)
    assert re.search(r"^test_f1 +0.7500 +0.5000 +-0.2500 +worse$", of_files, flags=re.MULTILINE)
    assert re.search(r"^eval_nan +not finite +not finite +not finite$", of_files, flags=re.MULTILINE)
    assert "epoch" not in of_files
    folders = [str(tmp_path / name) for name in "ab"]
    assert main(["compare", *folders]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == of_files.splitlines()[2:]


def test_compare_knows_drift_and_strength(capsys, run, results):
    folder, report = run
    report.save(folder / "l2sp_report.json")
    shutil.copy(results[0], folder)
    assert main(["compare", str(folder), results[1]]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^drift +{report.total.drift:.4g} +-$", out, flags=re.MULTILINE)
    assert re.search(r"^lambda +0.1 +-$", out, flags=re.MULTILINE)
    assert main(["compare", str(folder), results[1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["scores"]["test_loss"] == {"a": 0.5, "b": 0.25, "difference": -0.25, "b_is": "better"}
    assert found["scores"]["eval_nan"]["a"] is None
    assert found["a"]["lambda"] == 0.1 and "drift" not in found["b"]


def test_compare_refuses_what_has_no_scores(capsys, run, results, tmp_path):
    assert "has no scores: name the folder of a run that was evaluated" in failure(
        capsys, "compare", str(run[0]), results[0]
    )
    (tmp_path / "broken.json").write_text("{")
    assert "is no JSON" in failure(capsys, "compare", str(tmp_path / "broken.json"), results[0])
    (tmp_path / "list.json").write_text("[1]")
    assert "holds no scores by name" in failure(capsys, "compare", results[0], str(tmp_path / "list.json"))
    assert "is no folder" in failure(capsys, "compare", results[0], str(tmp_path / "nowhere"))


# --------------------------------------------------------------------------- report


def test_report_measures_the_drift_again(capsys, run):
    folder, report = run
    assert main(["report", str(folder)]) == 0
    written = [f"Written: {folder / name}\n" for name in ("l2sp_report.json", "l2sp_report.png", "l2sp_report.html")]
    assert capsys.readouterr().out == "".join(written)
    again = DriftReport.from_dict(json.loads((folder / "l2sp_report.json").read_text()))
    assert again.total.distance == pytest.approx(report.total.distance, rel=1e-5)
    assert list(again.layers) == list(report.layers) and again.anchor == report.anchor
    assert again.settings == report.settings and again.history == report.history
    assert again.parts.keys() == report.parts.keys()
    assert f"{100 * report.total.drift:.2f} %" in Page(folder / "l2sp_report.html").text
    assert imread(folder / "l2sp_report.png").shape[0] > 300


def test_report_keeps_the_measured_drift_and_makes_the_rest_anew(capsys, run):
    folder, report = run
    before = report.save(folder / "l2sp_report.json").read_bytes()
    (folder / "l2sp_report.html").write_text("an older one")
    (folder / "model.safetensors").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "l2sp_report.json").read_bytes() == before
    assert "Drift by layer" in Page(folder / "l2sp_report.html").tables
    assert "l2sp_report.json" not in capsys.readouterr().out


def test_report_to_another_file(capsys, run, tmp_path):
    target = tmp_path / "page.html"
    assert main(["report", str(run[0]), "--output", str(target)]) == 0
    assert Page(target).tables and not (run[0] / "l2sp_report.html").exists()
    assert capsys.readouterr().out == f"Written: {target}\n"
    target.write_text("mine")
    assert "add --force" in failure(capsys, "report", str(run[0]), "--output", str(target))
    assert target.read_text() == "mine"
    assert main(["report", str(run[0]), "--output", str(target), "--force"]) == 0
    assert Page(target).tables


def test_report_without_matplotlib(capsys, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(run[0])]) == 0
    out = capsys.readouterr().out
    assert "Note: l2sp_report.png is not made: " in out and "hf-l2sp[plots]" in out
    assert (run[0] / "l2sp_report.html").is_file()


@pytest.mark.parametrize("case", ["moved", "gone", "no weights", "lacks", "damaged", "plain"])
def test_report_says_why_there_is_no_drift(capsys, run, tiny_bert_dir, tmp_path, case):
    folder, _ = run
    state = json.loads((folder / "l2sp_state.json").read_text())
    if case == "moved":  # the pretrained model has other values now
        name = next(iter(state["anchor"]["entries"]))
        state["anchor"]["entries"][name]["sum_of_squares"] *= 2
    elif case == "gone":
        state["anchor"]["source"] = str(tmp_path / "no/such/model")
    elif case == "lacks":
        state["anchor"]["entries"]["bert.more"] = {"shape": [1], "sum": 1.0, "sum_of_squares": 1.0}
    (folder / "l2sp_state.json").write_text(json.dumps(state))
    if case == "no weights":
        (folder / "model.safetensors").unlink()
    elif case == "damaged":
        (folder / "l2sp_report.json").write_text("{")
    elif case == "plain":
        (folder / "l2sp_state.json").unlink()
    assert main(["report", str(folder)]) == 0
    told = {
        "moved": "is another model now",
        "gone": "there is no folder or file",
        "no weights": "has no model.safetensors",
        "lacks": "lack bert.more, which is on record",
        "damaged": "Delete it to have the drift measured again",
        "plain": "A run with l2sp_lambda > 0 writes it",
    }
    out = capsys.readouterr().out
    assert "Note: " in out and told[case] in out
    assert Page(folder / "l2sp_report.html").text


def test_report_of_a_folder_that_is_none(capsys, tmp_path):
    assert "has none of all_results.json" in failure(capsys, "report", str(tmp_path))
    assert "is no folder: name the output_dir" in failure(capsys, "report", str(tmp_path / "nowhere"))
