"""The main recipe as a user runs it, on a tiny model: its files, its table, resuming, overwriting, pushing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import pipeline

from hf_l2sp import L2SPTrainer

from .recipe_harness import RECIPES, RESULTS, notes, results_of, write_jsonl

import medical_textcls  # noqa: E402  # isort: skip

RECIPE = RECIPES / "medical_textcls.py"


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and printed text of a run with --compare, started as the README says."""
    folder = tmp_path_factory.mktemp("out") / "notes"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(RECIPE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launcher, *arguments, "--output_dir", str(folder), "--compare", "--shots", "6", "--l2sp_lambda", "0.1"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


# --------------------------------------------------------------------------- results


def test_all_files_of_the_contract_are_written(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    present = {path.name for path in folder.iterdir()}
    assert RESULTS | {"comparison.json"} <= present
    assert "plain" not in present, "the plain run leaves nothing behind but its numbers"
    results = results_of(folder)
    for prefix in ("eval", "test"):
        scores = {f"{prefix}_{name}" for name in ("accuracy", "f1_macro", "mcc", "ece", "loss")}
        assert scores <= set(results)
    assert {"train_loss", "train_runtime"} <= set(results)
    assert (results["train_samples"], results["eval_samples"], results["test_samples"]) == (18, 12, 18)
    assert results["test_f1_macro"] > 0.8, "the task is easy; the model has not learned it"
    assert json.loads((folder / "l2sp_report.json").read_text())["total"]["drift"] > 0
    assert (folder / "l2sp_report.png").read_bytes().startswith(b"\x89PNG")


def test_the_comparison_holds_both_runs(finished: tuple[Path, str]) -> None:
    folder, text = finished
    compared = json.loads((folder / "comparison.json").read_text())
    assert compared["l2sp"] == results_of(folder)
    plain, l2sp = compared["plain"], compared["l2sp"]
    assert set(plain) == set(l2sp)
    assert plain["test_loss"] != l2sp["test_loss"]
    assert compared["difference"]["test_loss"] == l2sp["test_loss"] - plain["test_loss"]
    assert (compared["seed"], compared["shots"], compared["data"]) == (42, 6, "local")
    assert compared["config"]["l2sp_lambda"] == 0.1 and compared["config"]["learning_rate"] == 0.005
    row = re.search(r"^test_f1_macro +(\S+) +(\S+) +(\S+)$", text, flags=re.MULTILINE)
    assert row is not None, text
    assert row.group(1, 2) == (f"{plain['test_f1_macro']:.4f}", f"{l2sp['test_f1_macro']:.4f}")
    assert "plain   L2-SP  difference" in text
    assert "training on 18 rows, drawn by seed 42" in text
    assert "lambda 0.1 (constant)" in text and f'model="{folder}"' in text


def test_the_result_is_a_pipeline_with_label_names(finished: tuple[Path, str]) -> None:
    classify = pipeline("text-classification", model=str(finished[0]), device="cpu")
    assert [
        answer["label"] for answer in classify(["the patient reports cough wheeze", "today some weeks rash itch"])
    ] == ["lung", "skin"]


def test_the_card_names_the_method_and_no_path(finished: tuple[Path, str], tiny_model: str) -> None:
    card = (finished[0] / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    data = yaml.safe_load(header)
    assert {"l2-sp", "hf-l2sp"} <= set(data["tags"])
    assert "1802.01483" in body and "base_model" not in data
    private = [tiny_model, str(finished[0]), str(finished[0].parent)]
    for name in ("README.md", "config.json", "comparison.json"):
        assert not any(path in (finished[0] / name).read_text() for path in private), name


def test_lambda_0_is_the_plain_run_and_leaves_no_l2sp_files(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    medical_textcls.main([*arguments, "--output_dir", str(folder), "--compare", "--l2sp_lambda", "0"])
    compared = json.loads((folder / "comparison.json").read_text())
    assert set(compared["difference"].values()) == {0.0}
    assert not list(folder.glob("l2sp_*"))
    assert "l2sp_lambda is 0" in capsys.readouterr().out


def test_accumulation_does_not_inflate_the_task_gradient(arguments: list[str], tmp_path: Path) -> None:
    # Plain gradient descent shows the size of the gradient; texts of equal length make equal means.
    common = [*arguments, "--optim", "sgd", "--learning_rate", "0.1", "--max_steps", "3", "--max_grad_norm", "0"]
    weights = []
    for name, batch, steps in (("whole", "8", "1"), ("parts", "2", "4")):
        folder = str(tmp_path / name)
        batches = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", steps]
        medical_textcls.main([*common, *batches, "--output_dir", folder])
        weights.append(load_file(f"{folder}/model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(arguments: list[str], tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    common = [*arguments, "--num_train_epochs", "4", "--save_strategy", "epoch", "--save_total_limit", "4"]
    medical_textcls.main([*common, "--output_dir", str(whole)])
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
    # The run was killed while it saved the next one.
    shutil.copytree(whole / "checkpoint-9", resumed / "checkpoint-9")
    (resumed / "checkpoint-9" / "trainer_state.json").unlink()
    mark = resumed / "checkpoint-9" / "l2sp_state.json"
    mark.write_text(mark.read_text().replace('"complete": true', '"complete": false'))
    medical_textcls.main([*common, "--output_dir", str(resumed), "--resume_from_checkpoint"])
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert results_of(resumed)["test_loss"] == results_of(whole)["test_loss"]
    state = json.loads((resumed / "trainer_state.json").read_text())
    assert state["global_step"] == 12 and not (resumed / "checkpoint-3").exists()
    assert (resumed / "checkpoint-9" / "trainer_state.json").is_file(), "replaced by a whole one"


def test_a_second_run_replaces_the_first_when_told_so(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [*arguments, "--output_dir", str(tmp_path), "--max_steps"]
    medical_textcls.main([*short, "2", "--compare"])
    (tmp_path / "mine.txt").write_text("keep")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        medical_textcls.main([*short, "1"])
    message = capsys.readouterr().err
    assert repr(str(tmp_path)) in message
    assert "--overwrite_output_dir" in message and "--resume_from_checkpoint" in message
    medical_textcls.main([*short, "1", "--overwrite_output_dir"])
    present = {path.name for path in tmp_path.iterdir()}
    assert RESULTS | {"mine.txt", "checkpoint-1"} <= present
    assert not {"comparison.json", "checkpoint-2"} & present


def test_training_data_alone_are_enough_and_long_texts_are_counted_once(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = notes(10, 7)
    for row in rows[:4]:
        row["text"] += " today" * 30
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    command = ["--model_name_or_path", tiny_model, "--train_file", train, "--max_seq_length", "12"]
    medical_textcls.main([*command, "--max_steps", "1", "--output_dir", str(tmp_path / "out")])
    text = capsys.readouterr().out
    counts = [int(n) for n in re.findall(r"(\d+) of \d+ (?:train|validation) texts", text)]
    assert sum(counts) == 4 and text.count("--max_seq_length 12 tokens and are cut") == 1
    assert "are taken from the training data" in text and "No test data given" in text
    results = results_of(tmp_path / "out")
    assert "eval_f1_macro" in results and not any(name.startswith("test_") for name in results)


# --------------------------------------------------------------------------- pushing


def test_a_failed_push_leaves_the_model_and_says_where(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Any, **kwargs: Any) -> None:
        raise ConnectionError("the line is cut")

    monkeypatch.setattr(L2SPTrainer, "init_hf_repo", lambda self: None)
    monkeypatch.setattr(L2SPTrainer, "push_to_hub", fail)
    folder = tmp_path / "notes"
    with pytest.raises(SystemExit, match="1"):
        medical_textcls.main([*arguments, "--max_steps", "1", "--output_dir", str(folder), "--push_to_hub"])
    message = capsys.readouterr().err
    assert "--push_to_hub failed: the line is cut" in message and repr(str(folder)) in message
    assert f"push_folder({str(folder)!r}, 'notes')" in message
    assert RESULTS <= {path.name for path in folder.iterdir()}


# --------------------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_without_arguments_it_trains_the_embedded_model_on_the_embedded_notes(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(RECIPE)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "medical_textcls"
    assert RESULTS <= {path.name for path in folder.iterdir()}
    # Chance is 0.125.
    assert results_of(folder)["test_f1_macro"] > 0.5
    card = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert card["base_model"] == "sentence-transformers/all-MiniLM-L6-v2" and card["license"] == "apache-2.0"
