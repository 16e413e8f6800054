"""What the main recipe refuses: before any work, in one message that names the value, the cause and the cure."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .recipe_harness import RECIPES, notes, write_jsonl

import _textcls  # noqa: E402  # isort: skip
import medical_textcls  # noqa: E402  # isort: skip

RECIPE = RECIPES / "medical_textcls.py"

Change = Callable[[Path, list[str]], list[str]]


def set_flag(*words: str) -> Change:
    return lambda folder, argv: [*argv, *words]


def set_rows(split: str, change: Callable[[list[dict[str, Any]]], Any]) -> Change:
    """Gives `split` a file with changed rows."""

    def apply(folder: Path, argv: list[str]) -> list[str]:
        rows = notes(4, 3)
        changed = change(rows)
        return [*argv, f"--{split}_file", write_jsonl(folder / "changed.jsonl", rows if changed is None else changed)]

    return apply


def latin_1(folder: Path, argv: list[str]) -> list[str]:
    (folder / "changed.csv").write_bytes("text,label\nfièvre,heart\n".encode("latin-1"))
    return [*argv, "--train_file", str(folder / "changed.csv")]


def broken_model(remove: str, content: str | None = None) -> Change:
    def apply(folder: Path, argv: list[str]) -> list[str]:
        shutil.copytree(argv[argv.index("--model_name_or_path") + 1], folder / "model")
        for path in (folder / "model").glob(remove):
            path.unlink() if content is None else path.write_text(content)
        return [*argv, "--model_name_or_path", str(folder / "model")]

    return apply


REFUSALS: dict[str, tuple[Change, str]] = {
    "missing file": (set_flag("--train_file", "nowhere.csv"), r"'nowhere\.csv' does not exist"),
    "missing column": (set_flag("--text_column", "txt"), r"no column 'txt' \(--text_column\); it has 'text', 'label'"),
    "one label": (set_rows("train", lambda rows: [r for r in rows if r["label"] == "skin"]), r"one label only"),
    "empty split": (set_rows("test", lambda rows: []), r"--test_file '.*changed\.jsonl' holds no rows"),
    "new label": (set_rows("test", lambda rows: rows[0].update(label="eye")), r"lack: 'eye' \(1 rows\)"),
    "number as text": (set_rows("train", lambda rows: rows[2].update(text=3.5)), r"row 3: the text is 3\.5, a float"),
    "not UTF-8": (latin_1, r"--train_file '.*changed\.csv' is not UTF-8 text"),
    "blank text": (
        set_rows("validation", lambda rows: rows[1].update(text=" ")),
        r"1 of 12 texts are blank \(rows 2\)",
    ),
    "missing label": (set_rows("train", lambda rows: rows[4].update(label=None)), r"1 of 12 labels are missing"),
    "too many shots": (set_flag("--shots", "9"), r"--shots 9 is more than .* class 'heart': 8 rows"),
    "no shots": (set_flag("--shots", "0"), r"--shots 0 must be at least 1"),
    "no tokens": (set_flag("--max_seq_length", "0"), r"--max_seq_length 0 must be at least 1"),
    "too long": (set_flag("--max_seq_length", "64"), r"--max_seq_length 64 is more than .* takes; give 32 or less"),
    "two sources": (set_flag("--dataset_name", "some/set"), r"both name training data; give one"),
    "negative lambda": (set_flag("--l2sp_lambda", "-1"), r"l2sp_lambda=-1\.0 must be a finite number >= 0"),
    "lambda NaN": (set_flag("--l2sp_lambda", "nan"), r"l2sp_lambda=nan must be a finite number"),
    "pattern without match": (set_flag("--l2sp_weights", '{"nothing": 1}'), r"nothing"),
    "wrong anchor": (set_flag("--l2sp_anchor", "./nowhere"), r"--l2sp_anchor './nowhere' does not exist"),
    "argument of Trainer": (set_flag("--load_best_model_at_end"), r"(?s)load_best_model_at_end.*strategy"),
    "unknown argument": (set_flag("--shot", "3"), r"unknown argument '--shot'; did you mean --shots\?"),
    "missing config": (set_flag("--config", "nowhere.yaml"), r"--config 'nowhere\.yaml' cannot be read"),
    "wrong path": (set_flag("--model_name_or_path", "./nowhere/bert"), r"--model_name_or_path './nowhere/bert' does"),
    "file as model": (
        set_flag("--model_name_or_path", str(RECIPE)),
        r"medical_textcls\.py' is a file; give the folder",
    ),
    "no tokenizer": (broken_model("tokenizer*"), r"(has no tokenizer|its tokenizer cannot be loaded)"),
    "no weights": (broken_model("*.safetensors"), r"its weights cannot be loaded: .*model\.safetensors"),
    "damaged weights": (broken_model("*.safetensors", "x"), r"its weights cannot be loaded"),
    "damaged config": (broken_model("config.json", "{"), r"its config\.json cannot be loaded"),
    "model offline": (
        set_flag("--model_name_or_path", "someone/bert"),
        r"'someone/bert': the Hub cannot be reached .* local folder, or leave the argument out",
    ),
    "push offline": (set_flag("--push_to_hub"), r"--push_to_hub: the repository 'out' cannot be created: .*"),
    "unknown edit": (set_flag("--augment", "swop"), r"--augment 'swop' is no edit; did you mean 'swap'\?"),
    "no model to mask with": (set_flag("--augment", "mask"), r"--augment mask needs --augment_model"),
    "predictions of nothing": (
        set_flag("--predict_file", "nowhere.txt", "--predict_output", "new.jsonl"),
        r"--predict_file 'nowhere\.txt' does not exist",
    ),
    "predictions for nobody": (set_flag("--predict_file", "in.txt"), r"'in\.txt' needs --predict_output"),
    "nothing to resume": (set_flag("--resume_from_checkpoint"), r"has no checkpoint to go on from"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_any_work(
    name: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, pattern = REFUSALS[name]
    argv = change(tmp_path, [*arguments, "--output_dir", str(tmp_path / "out"), "--compare"])
    monkeypatch.chdir(tmp_path)
    for step in ("tokenize", "header"):
        monkeypatch.setattr(_textcls, step, lambda *_, s=step: pytest.fail(f"came as far as {s}"))
    with pytest.raises(SystemExit) as caught:
        medical_textcls.main(argv)
    printed = capsys.readouterr()
    assert caught.value.code == 1
    assert re.search(pattern, printed.err), printed.err
    assert "Traceback" not in printed.err and printed.out == ""
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_cannot_be_reached_is_refused_at_once(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        medical_textcls.main(["--model_name_or_path", tiny_model, "--dataset_name", "some/set", "--output_dir", "out"])
    message = capsys.readouterr().err
    assert "--dataset_name 'some/set': the Hub cannot be reached" in message and "--train_file" in message


def test_a_missing_embedded_model_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("_recipe_model.EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="1"):
        medical_textcls.main(["--output_dir", str(tmp_path / "out")])
    assert "pip install 'hf-l2sp[recipes]'" in capsys.readouterr().err


def test_a_program_that_is_refused_ends_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(RECIPE), "--train_file", "nowhere.csv", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: --train_file 'nowhere.csv' does not exist")
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []
