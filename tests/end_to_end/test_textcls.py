"""What the text classification recipes share, on a tiny model: each of them as a whole, predictions, augmentation."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification, pipeline

from .recipe_harness import RESULTS, results_of

import legal_textcls  # noqa: E402  # isort: skip
import medical_textcls  # noqa: E402  # isort: skip
import sentiment  # noqa: E402  # isort: skip

RECIPES = [medical_textcls, sentiment, legal_textcls]
# Neither sorted nor of one length, and one that stands there twice.
TEXTS = [
    "rash itch today",
    "the patient reports some more cough wheeze for two weeks",
    "née pulse",
    "some mole blister some more",
    "rash itch today",
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_predictions(path: Path, model: Path) -> None:
    """One line per text, in order, with what transformers' pipeline finds."""
    rows = rows_of(path)
    assert [row["text"] for row in rows] == TEXTS
    classify = pipeline("text-classification", model=str(model), device="cpu", top_k=None)
    for row, found in zip(rows, classify(TEXTS), strict=True):
        assert list(row) == ["text", "label", "score", "scores"]
        assert row["scores"] == pytest.approx({one["label"]: one["score"] for one in found}, abs=1e-5)
        assert (row["label"], row["score"]) == max(row["scores"].items(), key=lambda item: item[1])
        assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-5)


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """The arguments that ask for predictions of `TEXTS`, in batches of two."""
    (tmp_path / "in.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    words = ["--predict_file", str(tmp_path / "in.txt"), "--predict_output", str(tmp_path / "out.jsonl")]
    return [*words, "--per_device_eval_batch_size", "2"]


@pytest.fixture(scope="module")
def fine_tuned(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a model that was fine-tuned for a few steps. Read only."""
    folder = str(tmp_path_factory.mktemp("tuned") / "out")
    medical_textcls.main([*arguments, "--max_steps", "3", "--output_dir", folder])
    return folder


# --------------------------------------------------------------------------- every recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_a_run_leaves_a_model_its_results_and_predictions(
    recipe: ModuleType, arguments: list[str], asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    edits = ["--augment", "swap", "delete", "--augment_copies", "2"]
    recipe.main([*arguments, *asked, *edits, "--max_steps", "12", "--compare", "--output_dir", str(folder)])
    text = capsys.readouterr().out
    assert RESULTS | {"comparison.json"} <= {path.name for path in folder.iterdir()}
    assert "--augment swap delete: 48 edited copies of the 24 training rows are added." in text
    assert "24 train, 12 validation, 18 test" in text and text.count("test_f1_macro") == 1
    results = results_of(folder)
    assert (results["train_samples"], results["eval_samples"], results["test_samples"]) == (72, 12, 18)
    compared = json.loads((folder / "comparison.json").read_text())
    assert compared["augment"] == ["swap", "delete"] and compared["plain"]["train_samples"] == 72
    assert f"Predictions of 5 texts are written to {tmp_path / 'out.jsonl'}" in text
    check_predictions(tmp_path / "out.jsonl", folder)
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    assert classify("today the patient reports cough wheeze")[0]["label"] in {"heart", "lung", "skin"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_what_cannot_be_used_is_refused_in_one_line(
    recipe: ModuleType, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--model_name_or_path", tiny_model, "--max_seq_length", "16", "--output_dir", str(tmp_path / "out")]
    (tmp_path / "empty.csv").write_text("text,label\n")
    for argv, message in (
        (["--train_file", str(tmp_path / "empty.csv")], "holds no rows"),
        (["--shots", "1000"], "--shots 1000 is more than the training data have"),
        (["--predict"], "unknown argument '--predict'"),
    ):
        with pytest.raises(SystemExit) as caught:
            recipe.main([*output, *argv])
        printed = capsys.readouterr()
        assert caught.value.code == 1 and printed.out == ""
        assert printed.err.count("\n") == 1 and message in printed.err
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------- augmentation


def test_copies_are_of_the_drawn_shots_and_change_the_model(arguments: list[str], tmp_path: Path) -> None:
    common = [*arguments, "--max_steps", "2", "--shots", "2"]
    weights = {}
    for name, edits in {"none": [], "one": ["--augment", "delete"], "again": ["--augment", "delete"]}.items():
        medical_textcls.main([*common, *edits, "--output_dir", str(tmp_path / name)])
        assert results_of(tmp_path / name)["train_samples"] == (12 if edits else 6)
        weights[name] = load_file(tmp_path / name / "model.safetensors")["classifier.weight"]
    assert weights["one"].equal(weights["again"]), "the copies come from the seed"
    assert not weights["one"].equal(weights["none"])


# --------------------------------------------------------------------------- predictions alone


def test_a_fine_tuned_model_predicts_without_training(
    fine_tuned: str, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--predict_only", "--model_name_or_path", fine_tuned, *asked, "--max_seq_length"]
    medical_textcls.main([*command, "32"])
    check_predictions(tmp_path / "out.jsonl", Path(fine_tuned))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl"], "no output folder is made"
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        medical_textcls.main([*command, "32"])
    assert "exists; name another file, or add --overwrite_output_dir" in capsys.readouterr().err
    # What is cut is said, and counted.
    medical_textcls.main([*command, "6", "--overwrite_output_dir"])
    assert "2 of 5 predicted texts are longer than --max_seq_length 6 tokens and are cut" in capsys.readouterr().out
    assert [row["text"] for row in rows_of(tmp_path / "out.jsonl")] == TEXTS


def test_a_model_that_gives_no_label_is_refused(
    tiny_model: str, fine_tuned: str, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(name: str, **changes: Any) -> str:
        """The fine-tuned model, with another configuration."""
        config = AutoConfig.from_pretrained(fine_tuned, **changes)
        return saved(AutoModelForSequenceClassification.from_config(config), name)

    def saved(model: Any, name: str) -> str:
        model.save_pretrained(tmp_path / name)
        for path in Path(fine_tuned).glob("tokenizer*"):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        return str(tmp_path / name)

    tagger = saved(AutoModelForTokenClassification.from_pretrained(fine_tuned), "tagger")
    config = Path(tagger, "config.json")
    alias = changed("alias")
    Path(alias, "config.json").write_text(config.read_text())
    regression = changed("regression", num_labels=1, problem_type="regression")
    several = changed("several", problem_type="multi_label_classification")
    for model, message in (
        (tiny_model, r"has no trained classification head: its files lack 'classifier.bias', 'classifier.weight'"),
        (tagger, r"has no trained classification head: its files lack 'bert.pooler"),
        (alias, r"is a BertForTokenClassification, no text classifier"),
        (regression, r"is a model for regression with 1 outputs"),
        (several, r"is a model for multi_label_classification with 3 outputs"),
    ):
        with pytest.raises(SystemExit, match="1"):
            medical_textcls.main(["--predict_only", "--model_name_or_path", model, *asked, "--max_seq_length", "16"])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out.jsonl").exists()


def test_a_model_that_diverged_predicts_nothing(
    fine_tuned: str, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(fine_tuned)
    model.classifier.bias.data[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    for path in Path(fine_tuned).glob("tokenizer*"):
        (tmp_path / "nan" / path.name).write_bytes(path.read_bytes())
    command = ["--predict_only", "--model_name_or_path", str(tmp_path / "nan"), *asked, "--max_seq_length", "16"]
    with pytest.raises(SystemExit, match="1"):
        medical_textcls.main(command)
    assert "predictions are not finite numbers" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
