"""How texts are shared out to rows that are trained on, evaluated on and warmed up on; and where texts come from."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from .ner_tokenizers import make_tokenizer

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

import _mlm_data  # noqa: E402
from _mlm_data import TextArguments, Texts, check_text_arguments, find_texts  # noqa: E402
from _mlm_rows import Packed, pack_texts  # noqa: E402
from _recipe_args import RecipeError  # noqa: E402

NONE_OF_NINE = next(seed for seed in range(9) if random.Random(f"{seed} train").randrange(20) > 8)
TOKENIZER = make_tokenizer("gpt2")


def numbered(name: str, count: int, word: str = "aspirin") -> Texts:
    return Texts(name, lambda: (f"{word} {number} the patient was given in" for number in range(count)))


def packed(folder: Path, texts: dict[str, Texts], warm_up_rows: int = 0, seed: int = 1, **options: Any) -> Packed:
    data = TextArguments(max_seq_length=16, **options)
    return pack_texts(folder, texts, TOKENIZER, data, seed, warm_up_rows)


def numbers_in(rows: datasets.Dataset) -> list[int]:
    """Which of the numbered texts are in there."""
    text = "".join(TOKENIZER.decode(row["input_ids"], skip_special_tokens=True) for row in rows)
    return [int(number) for number in re.findall(r"aspirin (\d+) the", text)]


def test_all_training_texts_are_trained_on_where_validation_texts_are_given(tmp_path: Path) -> None:
    texts = {"train": numbered("t", 60), "validation": numbered("v", 10), "general": numbered("g", 10)}
    result = packed(tmp_path, texts)
    assert set(result.rows) == {"train", "validation", "general"} == set(result.tokens)
    assert numbers_in(result.rows["train"]) == list(range(60))
    assert numbers_in(result.rows["validation"]) == list(range(10))
    assert result.notes == []


def test_one_text_in_twenty_is_held_out_by_seed(tmp_path: Path) -> None:
    held: list[list[int]] = []
    for index, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(index)
        folder.mkdir()
        result = packed(folder, {"train": numbered("t", 200), "general": numbered("g", 10)}, seed=seed)
        there, here = (numbers_in(result.rows[kind]) for kind in ("train", "validation"))
        assert len(here) == 10 and sorted(there + here) == list(range(200))
        assert [number // 20 for number in here] == list(range(10)), "one of each twenty"
        held.append(here)
    assert held[0] == held[1] != held[2]


def test_general_texts_warm_the_head_up_or_are_measured_on_never_both(tmp_path: Path) -> None:
    texts = {"train": numbered("t", 60), "validation": numbered("v", 10), "general": numbered("g", 50)}
    result = packed(tmp_path, texts, warm_up_rows=1000)
    warm, measured = (numbers_in(result.rows[kind]) for kind in ("warm_up", "general"))
    assert len(measured) == 10 and sorted(warm + measured) == list(range(50))


def test_embedded_general_texts_of_two_kinds_are_kept_apart(tmp_path: Path) -> None:
    texts = {"train": numbered("t", 60), "validation": numbered("v", 10)}
    texts |= {"general": numbered("g", 12), "warm_up": numbered("w", 30)}
    with_head, without = tmp_path / "with", tmp_path / "without"
    with_head.mkdir()
    without.mkdir()
    result = packed(with_head, texts, warm_up_rows=5)
    assert len(result.rows["warm_up"]) == 5 and numbers_in(result.rows["general"]) == list(range(12))
    assert "warm_up" not in packed(without, texts, warm_up_rows=0).rows


def test_evaluation_takes_no_more_rows_than_asked_for(tmp_path: Path) -> None:
    drawn: list[int] = []

    def many() -> Any:
        for number in range(10**9):
            drawn.append(number)
            yield f"aspirin {number}"

    texts = {"train": numbered("t", 400), "general": Texts("g", many)}
    result = packed(tmp_path, texts, max_eval_rows=3)
    assert len(result.rows["validation"]) <= 3 and len(result.rows["general"]) == 3
    assert len(drawn) < 2000, "the rest is not read"
    assert numbers_in(result.rows["train"])[-1] == 399
    assert any("first texts" in note and "3 general rows" in note for note in result.notes)


def test_blank_texts_are_passed_over_and_counted(tmp_path: Path) -> None:
    texts = {kind: numbered(kind, 30) for kind in ("train", "validation", "general")}
    texts["train"] = Texts("--train_file 'x'", lambda: iter(["", "aspirin 1 the patient was given in it"] * 5))
    result = packed(tmp_path, texts)
    assert result.notes == ["5 blank texts of --train_file 'x' are passed over."]


def test_another_process_takes_what_is_there(tmp_path: Path) -> None:
    texts = {kind: numbered(kind, 30) for kind in ("train", "validation", "general")}
    first = packed(tmp_path, texts)
    nothing = {kind: Texts(kind, lambda: pytest.fail("read again")) for kind in texts}
    second = packed(tmp_path, nothing)
    assert second.tokens == first.tokens
    assert [row["input_ids"] for row in second.rows["train"]] == [row["input_ids"] for row in first.rows["train"]]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"train": Texts("t", lambda: iter(["", ""]))}, r"^t holds blank texts alone; give it some text"),
        ({"train": Texts("t", lambda: iter(["aspirin in"]))}, r"^t has \d tokens to train on, fewer than one row of"),
        ({"train": numbered("t", 9)}, r"^t has 9 texts, of which none could be set aside .* or --validation_file\.$"),
        ({"general": numbered("g", 0)}, r"^g has 0 texts, of which none could be set aside to evaluate on; give more"),
    ],
)
def test_too_little_text_is_refused(texts: dict[str, Texts], message: str, tmp_path: Path) -> None:
    given = {"train": numbered("t", 60), "general": numbered("g", 30)}
    if "general" in texts:
        given["validation"] = numbered("v", 9)
    with pytest.raises(RecipeError, match=message):
        packed(tmp_path, {**given, **texts}, seed=NONE_OF_NINE)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be written to '.*nowhere': .*TMPDIR"):
        packed(tmp_path / "nowhere", {"train": numbered("t", 60), "general": numbered("g", 30)})


# --------------------------------------------------------------------------- where texts come from


def test_without_arguments_the_embedded_texts_are_used() -> None:
    texts = {kind: list(part.read()) for kind, part in find_texts(TextArguments()).items()}
    assert {kind: len(part) for kind, part in texts.items()} == {
        "train": 160 + 90,
        "validation": 80 + 30,
        "general": 120 + 112,
        "warm_up": 102 + 48 + 96 + 48,
    }
    assert all(isinstance(text, str) and text for part in texts.values() for text in part)
    together = [text for part in texts.values() for text in part]
    assert len(set(together)) == len(together)


def test_files_are_taken_as_they_are_given(tmp_path: Path) -> None:
    for name in ("t", "v", "e", "g"):
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n\n{name} two\nlines\n")
    paths = {name: str(tmp_path / f"{name}.txt") for name in "tveg"}
    files = {"train_file": paths["t"], "validation_file": paths["v"], "test_file": paths["e"]}
    data = TextArguments(**files, general_file=paths["g"], paragraphs=True)
    check_text_arguments(data)
    texts = find_texts(data)
    assert {kind: list(part.read()) for kind, part in texts.items()} == {
        kind: [f"{name} one", f"{name} two\nlines"]
        for kind, name in (("train", "t"), ("validation", "v"), ("test", "e"), ("general", "g"))
    }
    assert set(find_texts(TextArguments(train_file=paths["t"]))) == {"train", "general", "warm_up"}


def test_a_dataset_of_the_hub_is_taken_split_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"train": ["a", None, " "], "test": ["b"]}
    parts = {
        split: datasets.Dataset.from_dict({"body": texts, "n": [1] * len(texts)}) for split, texts in rows.items()
    }
    monkeypatch.setattr(_mlm_data, "hub_splits", lambda name, config: parts)
    texts = find_texts(TextArguments(dataset_name="some/set", text_column="body"))
    assert list(texts["train"].read()) == ["a", "", ""] and list(texts["test"].read()) == ["b"]
    with pytest.raises(RecipeError, match=r"the train split of 'some/set' has no column 'bod' .*--text_column body"):
        find_texts(TextArguments(dataset_name="some/set", text_column="bod"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "some/set", "train_file": "a.txt"}, r"both name training data; give one"),
        ({"validation_file": "a.txt"}, r"--validation_file 'a\.txt' needs --train_file beside it"),
        ({"test_file": "a.txt"}, r"--test_file 'a\.txt' needs --train_file beside it"),
        ({"general_file": "a.txt"}, r"--general_file 'a\.txt' needs domain text beside it"),
        ({"dataset_config_name": "en"}, r"--dataset_config_name 'en' needs --dataset_name"),
        ({"mlm_probability": 0.0}, r"--mlm_probability 0\.0 must be between 0 and 1"),
        ({"mlm_probability": 1.0}, r"--mlm_probability 1\.0 must be between 0 and 1"),
        ({"max_seq_length": 7}, r"--max_seq_length 7 must be at least 8"),
        ({"max_eval_rows": 0}, r"--max_eval_rows 0 must be at least 1"),
        ({"head_warmup_steps": -1}, r"--head_warmup_steps -1 must be at least 1"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_text_arguments(TextArguments(**options))


def test_an_empty_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("")
    (tmp_path / "r.jsonl").write_text(json.dumps({"text": "x"}))
    with pytest.raises(RecipeError, match=r"--train_file '.*t\.txt' is empty; give it some text"):
        find_texts(TextArguments(train_file=str(tmp_path / "t.txt")))
    with pytest.raises(RecipeError, match=r"--general_file '.*g\.txt' does not exist; its folder has 't\.txt'"):
        find_texts(TextArguments(train_file=str(tmp_path / "r.jsonl"), general_file=str(tmp_path / "g.txt")))
