"""The data of the recipes: reading files, refusing unfit ones, splitting, drawing few shots."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

import _recipe_files  # noqa: E402
import legal_textcls  # noqa: E402
import medical_textcls  # noqa: E402
import sentiment  # noqa: E402
from _recipe_args import DataArguments, RecipeError  # noqa: E402
from _recipe_data import (  # noqa: E402
    Split,
    check_data_arguments,
    check_labels,
    check_split,
    draw_shots,
    hold_out,
    label_order,
    load_splits,
    to_model_order,
)
from _recipe_files import read_file  # noqa: E402

ROWS = [
    {"text": "NA", "label": "None", "extra": 1},
    {"text": 'two, "quoted"\nlines', "label": "yes", "extra": 2},
    {"text": "dé jà vu", "label": "None", "extra": 3},
]
COLUMNS = ("text", "label")


def split_of(**counts: int) -> Split:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return Split("--train_file 'x.csv'", [f"text {index} of {label}" for index, label in enumerate(labels)], labels)


# --------------------------------------------------------------------------- files


def write_all(folder: Path) -> list[Path]:
    """The same rows in every format."""
    paths = [folder / name for name in ("a.csv", "a.json", "list.json", "a.jsonl", "a.parquet", "named.parquet")]
    table = datasets.Dataset.from_list(ROWS)
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
    quoted = "\n".join('"{text}",{label},{extra}'.format(**{**r, "text": r["text"].replace('"', '""')}) for r in ROWS)
    paths[0].write_text("\ufefftext,label,extra\n" + quoted + "\n", encoding="utf-8")
    paths[1].write_text(lines, encoding="utf-8")
    paths[2].write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    paths[3].write_text(lines, encoding="utf-8")
    table.to_pandas().to_parquet(paths[4])
    table.cast_column("label", datasets.ClassLabel(names=["yes", "None"])).to_parquet(paths[5])
    return paths


def test_every_format_gives_the_same_texts_and_labels(tmp_path: Path) -> None:
    expected = {"text": [row["text"] for row in ROWS], "label": [row["label"] for row in ROWS]}
    for path in write_all(tmp_path):
        assert read_file(path, COLUMNS) == (["text", "label", "extra"], expected), path.name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\na,b,c\n", r"'.*a\.csv', line 2: 3 cells, but the header has 2; put a text"),
        ("a.csv", b'text,label\n"a,b\n', r"a\.csv', line 2: not valid CSV"),
        ("a.csv", b"text,text\na,b\n", r"names a column twice"),
        ("a.csv", "text,label\né,1\n".encode("latin-1"), r"not UTF-8 text.*save it as UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl', line 2: not valid JSON"),
        ("a.json", b'[\n{"text": "a"},\n}]', r"a\.json', line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n3\n', r"row 2 is 3, not an object"),
        ("a.parquet", b"text,label\n", r"a\.parquet' is not a parquet file"),
        ("a.txt", b"text", r"extension '\.txt'; give one of \.csv, \.json, \.jsonl, \.parquet"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_file(path, COLUMNS)


def test_lines_of_a_text_file_are_rows_where_that_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content in (
        "\ufeffone\ntwo \u2028 \x0b too\nthree",
        "one\ntwo \u2028 \x0b too\nthree\n",
        "one\r\ntwo \u2028 \x0b too\r\nthree",
    ):
        path.write_bytes(content.encode())
        assert read_file(path, ("text",), lines=True) == (["text"], {"text": ["one", "two \u2028 \x0b too", "three"]})
    path.write_text("")
    assert read_file(path, ("text",), lines=True) == (["text"], {"text": []})
    with pytest.raises(RecipeError, match=r"extension '\.md'; give one of .*\.parquet, \.txt\."):
        read_file(path.rename(tmp_path / "a.md"), ("text",), lines=True)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "train.csv").touch()
    (tmp_path / "notes.md").touch()
    with pytest.raises(RecipeError, match=r"'.*trian\.csv' does not exist; its folder has 'train\.csv'\."):
        read_file(tmp_path / "trian.csv", COLUMNS)
    with pytest.raises(RecipeError, match=r"nor does its folder"):
        read_file(tmp_path / "nowhere" / "train.csv", COLUMNS)
    with pytest.raises(RecipeError, match=r"is a folder; give a file"):
        read_file(tmp_path, COLUMNS)


# --------------------------------------------------------------------------- checks and draws


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"txt": ["a"], "label": ["1"]},
            r"x has no column 'text' \(--text_column\); it has 'txt', 'label'\. Did .* txt\?",
        ),
        ({"text": [], "label": []}, r"x holds no rows"),
        ({"text": ["a", 5], "label": ["1", "2"]}, r"x, row 2: the text is 5, a int, not a string"),
        ({"text": ["a", None], "label": ["1", "2"]}, r"x, row 2: the text is None"),
        ({"text": ["a", "b\ud83d"], "label": ["1", "2"]}, r"x, row 2: the text 'b\\ud83d' holds half a character"),
        ({"text": ["a", " \n", ""], "label": ["1", "2", "2"]}, r"x: 2 of 3 texts are blank \(rows 2, 3\)"),
        ({"text": ["a", "b"], "label": ["1", None]}, r"x: 1 of 2 labels are missing \(rows 2\)"),
        ({"text": ["a", "b"], "label": [float("nan"), ""]}, r"x: 2 of 2 labels are missing \(rows 1, 2\)"),
        ({"text": ["a", "b"], "label": [1, 0.5]}, r"x, row 2: the label is 0\.5; a class is named by"),
        ({"text": ["a", "b"], "label": [1, ["2"]]}, r"x, row 2: the label is \['2'\]"),
    ],
)
def test_unfit_rows_are_refused(values: dict[str, list[Any]], message: str) -> None:
    wanted = {name: column for name, column in values.items() if name in COLUMNS}
    with pytest.raises(RecipeError, match=message):
        check_split((list(values), wanted), "x", DataArguments())


def test_labels_are_strings_in_natural_order() -> None:
    table = (list(COLUMNS), {"text": ["a", "b", "c", "d"], "label": [10, 9.0, "2", True]})
    labels = check_split(table, "x", DataArguments()).labels
    assert labels == ["10", "9", "2", "True"]
    assert label_order(labels[:3]) == ["2", "9", "10"]
    assert label_order(labels) == ["10", "2", "9", "True"]


def test_the_order_of_a_head_with_the_same_labels_is_kept() -> None:
    config = type("Config", (), {"id2label": {0: "pos", 1: "neg"}})
    assert to_model_order(["neg", "pos"], config) == ["pos", "neg"]
    assert to_model_order(["neg", "other"], config) == ["neg", "other"]


def test_labels_of_the_splits_are_compared() -> None:
    with pytest.raises(RecipeError, match=r"one label only \('a'\)"):
        check_labels({"train": split_of(a=3)})
    strange = Split("--test_file 't.csv'", ["x", "y", "z"], ["c", "c", "a"])
    with pytest.raises(RecipeError, match=r"--test_file 't\.csv' has labels .* lack: 'c' \(2 rows\)\. Add"):
        check_labels({"train": split_of(a=1, b=1), "test": strange})


def test_shots_are_drawn_by_seed_whatever_the_order_of_the_file() -> None:
    split = split_of(a=9, b=5, c=7)
    drawn = draw_shots(split, 4, seed=1)
    assert Counter(drawn.labels) == {"a": 4, "b": 4, "c": 4}
    assert drawn.texts == draw_shots(split, 4, seed=1).texts
    assert drawn.texts != draw_shots(split, 4, seed=2).texts
    backwards = split.take(list(range(len(split)))[::-1])
    assert set(draw_shots(backwards, 4, seed=1).texts) == set(drawn.texts)
    assert draw_shots(split, 5, seed=1).labels.count("b") == 5
    with pytest.raises(RecipeError, match=r"--shots 6 is more than .* class 'b': 5 rows; give --shots 5 or less"):
        draw_shots(split, 6, seed=1)


def test_hold_out_takes_its_share_of_every_class() -> None:
    split = split_of(a=20, b=40, c=2, d=1)
    train, held = hold_out(split, 0.15, seed=3)
    assert Counter(held.labels) == {"a": 3, "b": 6, "c": 1}
    assert sorted(train.texts + held.texts) == sorted(split.texts) and not set(train.texts) & set(held.texts)
    assert held.texts != hold_out(split, 0.15, seed=4)[1].texts
    with pytest.raises(RecipeError, match=r"one row per class.*give --validation_file"):
        hold_out(split_of(a=1, b=1), 0.15, seed=3)


def write_splits(folder: Path, **splits: Split) -> dict[str, str]:
    for name, split in splits.items():
        rows = [{"text": text, "label": label} for text, label in zip(split.texts, split.labels, strict=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {f"{name}_file": str(folder / f"{name}.jsonl") for name in splits}


def test_training_data_alone_are_split_and_it_is_said(tmp_path: Path) -> None:
    data = DataArguments(**write_splits(tmp_path, train=split_of(a=20, b=20)), shots=10)
    splits, notes = load_splits(data, Path("unused"), seed=5)
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "validation": 6}
    assert re.search(r"No validation data given: 6 rows \(15% .* seed 5\)", notes[0])
    assert notes[1].startswith("No test data given") and notes[2].startswith("--shots 10: training on 20 rows")


def test_texts_shared_by_training_and_test_are_reported(tmp_path: Path) -> None:
    train = split_of(a=4, b=4)
    files = write_splits(
        tmp_path, train=train, validation=split_of(a=1), test=Split("", ["new", train.texts[3]], ["a", "a"])
    )
    _, notes = load_splits(DataArguments(**files), Path("unused"), seed=5)
    assert "1 test texts are training texts too; results on them flatter the model." in notes


@pytest.mark.parametrize("recipe", [medical_textcls, sentiment, legal_textcls], ids=lambda recipe: recipe.__name__)
def test_embedded_data_are_the_documented_ones(recipe: Any) -> None:
    splits, notes = load_splits(DataArguments(), recipe.EMBEDDED_DATA, seed=42)
    assert notes == [], "no text of the training data is in another split"
    told = (recipe.EMBEDDED_DATA / "README.md").read_text(encoding="utf-8")
    labels = re.findall(r"^\| ([a-z_]+) \|", told, re.MULTILINE)[1:]
    numbers = re.search(
        r"^(\d+) short.*Splits: (\d+) tr\D*(\d+) va\D*(\d+) .*? (\d+) to (\d+) words", told, re.DOTALL | re.M
    )
    assert numbers is not None
    total, *counts, shortest, longest = map(int, numbers.groups())
    assert sum(len(split) for split in splits.values()) == total >= 240
    for split, count in zip(("train", "validation", "test"), counts, strict=True):
        assert Counter(splits[split].labels) == dict.fromkeys(labels, count), split
    texts = [" ".join(text.casefold().split()) for split in splits.values() for text in split.texts]
    assert len(set(texts)) == len(texts), "a text is there twice"
    words = [len(text.split()) for text in texts]
    assert shortest <= min(words) and max(words) <= longest


def test_a_hub_dataset_is_read_by_its_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"]))
    part = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 1, 0]}, features=names)
    hidden = datasets.Dataset.from_dict({"text": ["x"], "label": [-1]}, features=names)
    monkeypatch.setattr(_recipe_files, "reach_hub", lambda *_: "found")
    loaded = datasets.DatasetDict(train=part, dev=part.select([0, 1]), test=hidden)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    splits, notes = load_splits(DataArguments(dataset_name="some/set"), Path("unused"), seed=1)
    assert splits["train"].labels == ["neg", "pos", "pos", "neg"] and splits["validation"].texts == ["a", "b"]
    assert "test" not in splits and "carries no labels" in notes[0]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(test=part))
    with pytest.raises(RecipeError, match=r"'some/set' has no training split; it has 'test'"):
        load_splits(DataArguments(dataset_name="some/set"), Path("unused"), seed=1)
    monkeypatch.setattr(_recipe_files, "reach_hub", lambda *_: "absent")
    with pytest.raises(RecipeError, match=r"'some/set': no such dataset on the Hub"):
        load_splits(DataArguments(dataset_name="some/set"), Path("unused"), seed=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_name": "d", "train_file": "f.csv"}, r"'d' and --train_file 'f\.csv' both name training data"),
        ({"test_file": "f.csv"}, r"--test_file 'f\.csv' needs --train_file"),
        ({"dataset_config_name": "c"}, r"needs --dataset_name"),
        ({"text_column": "t", "label_column": "t"}, r"are both 't'"),
        ({"shots": 0}, r"--shots 0 must be at least 1"),
        ({"max_seq_length": 0}, r"--max_seq_length 0 must be at least 1"),
    ],
)
def test_contradictory_data_arguments_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_data_arguments(DataArguments(**values))
