"""Named-entity data of the recipes: refusals with their place, splits, draws by seed, arguments."""

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

import _ner_files  # noqa: E402
import _recipe_files  # noqa: E402
from _ner_data import (  # noqa: E402
    NerDataArguments,
    check_ner_arguments,
    check_rows,
    check_types,
    load_ner_splits,
)
from _ner_draws import NerSplit, draw_shots, hold_out  # noqa: E402
from _recipe_args import ModelArguments, RecipeError, RecipeParser, RecipeTrainingArguments  # noqa: E402

from tests.test_ner_files import NAMES, TAGS, TOKENS, read  # noqa: E402


def split_of(*sentences: str) -> NerSplit:
    """Sentences written as the types in them: "a b" has an entity of type a and one of type b, "" has none."""
    tokens = [[f"w{number}", *f"of {kinds}".split()] for number, kinds in enumerate(sentences)]
    return NerSplit(
        "--train_file 'x'", tokens, [["O", "O", *(f"B-{k}" for k in kinds.split())] for kinds in sentences]
    )


def types_of(split: NerSplit) -> Counter[str]:
    return Counter(kind for kinds in split.types() for kind in kinds)


# --------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, r"x\.jsonl', line 3: 2 tokens but 1 tags; every token needs"),
        ({"tokens": "a b", "ner_tags": ["O"]}, r"line 3: the tokens are 'a b', a str, not a list .*--tokens_column"),
        ({"tokens": ["a"], "ner_tags": "O"}, r"line 3: the tags are 'O', a str, not a list .*--tags_column"),
        ({"tokens": ["a"]}, r"line 3: the tags are None"),
        ({"tokens": [], "ner_tags": []}, r"line 3: the sentence has no word \(\[\]\); drop it"),
        ({"tokens": ["", " "], "ner_tags": ["O", "O"]}, r"line 3: the sentence has no word"),
        ({"tokens": ["a", 5], "ner_tags": ["O", "O"]}, r"line 3, token 2: the token 5 is a int; write it as text"),
        ({"tokens": ["a", None], "ner_tags": ["O", "O"]}, r"line 3, token 2: the token None is a NoneType"),
        ({"tokens": ["a\0"], "ner_tags": ["O"]}, r"line 3, token 1: the token 'a\\x00' holds a NUL character"),
        ({"tokens": ["a", "\udc00"], "ner_tags": ["O", "O"]}, r"line 3, token 2: the token '\\udc00' holds .* half"),
        ({"tokens": ["a"], "ner_tags": ["PER"]}, r"line 3, token 1: 'PER' is no tag of the scheme iob2 \(O, B-TYPE"),
        ({"tokens": ["a"], "ner_tags": ["b-PER"]}, r"'b-PER' is no tag"),
        ({"tokens": ["a"], "ner_tags": ["B-"]}, r"'B-' is no tag"),
        (
            {"tokens": ["a"], "ner_tags": ["S-PER"]},
            r"'S-PER' is no tag of the scheme iob2 .*; is it --tag_scheme bioes\?",
        ),
        ({"tokens": ["a"], "ner_tags": ["L-PER"]}, r"'L-PER' is no tag .*; is it --tag_scheme bilou\?"),
        (
            {"tokens": ["a"], "ner_tags": ["I-PER"]},
            r"token 1: the tag 'I-PER' follows the start of the sentence, but in ",
        ),
        ({"tokens": ["a", "b"], "ner_tags": ["O", "I-X"]}, r"token 2: the tag 'I-X' follows 'O', .*'B-X'.* iob1"),
        ({"tokens": ["a", "b"], "ner_tags": ["B-Y", "I-X"]}, r"token 2: the tag 'I-X' follows 'B-Y', but in IOB2"),
        (
            {"tokens": ["a"], "ner_tags": [1]},
            r"token 1: the tag is the integer 1; name the tags .* --tag_names O B-PER",
        ),
        ({"tokens": ["a"], "ner_tags": [None]}, r"token 1: the tag is None; write a string such as"),
        ({"tokens": ["a"], "ner_tags": [True]}, r"token 1: the tag is True; write a string"),
    ],
)
def test_unfit_rows_are_refused_with_their_place(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.jsonl"
    good = json.dumps({"tokens": ["fine"], "ner_tags": ["O"]})
    path.write_text(f"{good}\n\n{json.dumps(row)}\n")
    with pytest.raises(RecipeError, match=message):
        read(path)


def test_the_place_in_a_conll_file_is_the_line_of_the_token(tmp_path: Path) -> None:
    path = tmp_path / "x.conll"
    path.write_text("a O\n\nb O\nc O\nd I-PER\n")
    with pytest.raises(RecipeError, match=r"x\.conll', line 5: the tag 'I-PER' follows 'O'"):
        read(path)
    assert read(path, tag_scheme="iob1").tags == [["O"], ["O", "O", "B-PER"]]


def test_blank_tokens_keep_their_place() -> None:
    rows = [_ner_files.Row(["a", "", " ", "\u200b"], ["B-x", "I-x", "I-x", "O"], ["row 1"])]
    assert check_rows(rows, "x", NerDataArguments()).tokens == [["a", "", " ", "\u200b"]]


def test_integer_tags_need_fitting_names() -> None:
    rows = [_ner_files.Row(["a", "b"], [0, 3], ["row 1"])]
    with pytest.raises(RecipeError, match=r"x, row 1, token 2: the tag 3 is none of 0 to 2, which --tag_names names"):
        check_rows(rows, "x", NerDataArguments(tag_names=["O", "B-a", "I-a"]))
    rows = [_ner_files.Row(["a"], ["O"], ["row 1"])]
    with pytest.raises(RecipeError, match=r"the tag is 'O', but --tag_names is for integer tags; leave it out"):
        check_rows(rows, "x", NerDataArguments(tag_names=["O", "B-a"]))


# --------------------------------------------------------------------------- checks and draws of whole splits


def test_types_of_the_splits_are_compared() -> None:
    with pytest.raises(RecipeError, match=r"one tag only \('O': no entity is tagged\)"):
        check_types({"train": split_of("", "")})
    with pytest.raises(RecipeError, match=r"one tag only \('B-a': every word is an entity"):
        check_types({"train": NerSplit("x", [["w"]], [["B-a"]])})
    strange = split_of("a c", "c d", "b")
    strange.source = "--test_file 't'"
    with pytest.raises(
        RecipeError, match=r"--test_file 't' has .* lack: 'c' \(2 sentences\), 'd' \(1 sentences\)\. Add"
    ):
        check_types({"train": split_of("a b"), "test": strange})


MIXED = split_of(*["a"] * 40, *["b a"] * 9, *["c"] * 5, "c b", "d a", *[""] * 20)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shots", [1, 2, 6])
def test_shots_reach_every_type_whatever_the_order_of_the_file(seed: int, shots: int) -> None:
    split = split_of(*["a"] * 40, *["b a"] * 9, *["c"] * 5, "c b", *[""] * 20)
    drawn = draw_shots(split, shots, seed)
    counts = types_of(drawn)
    assert min(counts.values()) == shots and set(counts) == {"a", "b", "c"}
    assert all(kinds for kinds in drawn.types())
    # Greedy: none of them can be left out without a type falling short. (Rarest first, so companions come for free.)
    assert len(drawn) <= 3 * shots
    positions = [split.tokens.index(tokens) for tokens in drawn.tokens]
    assert positions == sorted(set(positions))
    backwards = split.take(list(range(len(split)))[::-1])
    assert sorted(draw_shots(backwards, shots, seed).tokens) == sorted(drawn.tokens)
    assert any(draw_shots(split, shots, other).tokens != drawn.tokens for other in range(5))


def test_more_shots_than_there_are_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"--shots 2 is more than .* of type 'd': 1 sentences; give --shots 1 or less"
    ):
        draw_shots(MIXED, 2, seed=1)


@pytest.mark.parametrize("seed", range(5))
def test_hold_out_takes_a_share_of_every_type_and_never_the_last_of_one(seed: int) -> None:
    train, held = hold_out(MIXED, 0.15, seed)
    assert sorted(train.tokens + held.tokens) == sorted(MIXED.tokens)
    assert set(types_of(train)) == set(types_of(MIXED))
    counts = types_of(held)
    assert counts["d"] == 0 and all(counts[kind] >= 1 for kind in "abc") and counts["a"] in range(6, 9)
    assert sum(not kinds for kinds in held.types()) == 3
    assert train.tags == [MIXED.tags[MIXED.tokens.index(tokens)] for tokens in train.tokens]
    assert {str(hold_out(MIXED, 0.15, other)[1].tokens) for other in range(5)} != {str(held.tokens)}
    with pytest.raises(RecipeError, match=r"one sentence per entity type.*give --validation_file"):
        hold_out(split_of("a", "b"), 0.15, seed)


@pytest.mark.parametrize("seed", range(20))
def test_hold_out_keeps_types_that_only_come_with_rarer_ones(seed: int) -> None:
    split = split_of("t u", "u", "t v", "v")
    try:
        train, _ = hold_out(split, 0.5, seed)
    except RecipeError:
        return
    assert set(types_of(train)) == {"t", "u", "v"}


def write(folder: Path, name: str, split: NerSplit) -> str:
    rows = [{"tokens": t, "ner_tags": g} for t, g in zip(split.tokens, split.tags, strict=True)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / f"{name}.jsonl")


def test_training_data_alone_are_split_and_it_is_said(tmp_path: Path) -> None:
    data = NerDataArguments(train_file=write(tmp_path, "train", MIXED), shots=1)
    splits, notes = load_ner_splits(data, Path("unused"), seed=5)
    assert list(splits) == ["train", "validation"] and min(types_of(splits["train"]).values()) == 1
    assert re.search(r"No validation data given: \d+ sentences \(about 15%, by seed 5\)", notes[0])
    assert notes[1].startswith("No test data given")
    assert re.search(r"--shots 1: training on \d sentences, drawn by seed 5 until every entity type is in 1", notes[2])


def test_embedded_and_shared_sentences(tmp_path: Path) -> None:
    for name, split in [("train", MIXED), ("validation", split_of("a")), ("test", MIXED.take([3, 4, 5]))]:
        write(tmp_path, name, split)
    splits, notes = load_ner_splits(NerDataArguments(), tmp_path, seed=1)
    assert {name: len(split) for name, split in splits.items()} == {"train": 76, "validation": 1, "test": 3}
    assert notes == [
        "1 validation sentences are training sentences too; results on them flatter the model.",
        "3 test sentences are training sentences too; results on them flatter the model.",
    ]


def test_a_hub_dataset_is_read_by_its_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = datasets.Sequence(datasets.ClassLabel(names=NAMES))
    features = datasets.Features(tokens=datasets.Sequence(datasets.Value("string")), ner_tags=labels)
    rows = {"tokens": TOKENS, "ner_tags": [[NAMES.index(tag) for tag in tags] for tags in TAGS]}
    part = datasets.Dataset.from_dict(rows, features=features)
    hidden = datasets.Dataset.from_dict({"tokens": [["x", "y"]], "ner_tags": [[-1, -1]]}, features=features)
    monkeypatch.setattr(_recipe_files, "reach_hub", lambda *_: "found")
    loaded = datasets.DatasetDict(train=part, dev=part.select([0]), test=hidden)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    splits, notes = load_ner_splits(NerDataArguments(dataset_name="some/set"), Path("unused"), seed=1)
    assert (splits["train"].tokens, splits["train"].tags) == (TOKENS, TAGS)
    assert splits["validation"].tags == TAGS[:1] and "test" not in splits and "carries no tags" in notes[0]
    with pytest.raises(RecipeError, match=r"the train split of 'some/set' has no column 'words' \(--tokens_column\)"):
        load_ner_splits(NerDataArguments(dataset_name="some/set", tokens_column="words"), Path("unused"), seed=1)


# --------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_name": "d", "train_file": "f"}, r"both name training data"),
        ({"tokens_column": "t", "tags_column": "t"}, r"--tokens_column and --tags_column are both 't'"),
        ({"shots": 0}, r"--shots 0 must be at least 1"),
        ({"stride": 200}, r"--stride 200 must be at least 0 and less than --max_seq_length 128"),
        ({"stride": -1}, r"--stride -1 must be at least 0 and less than --max_seq_length 128"),
        ({"stride": 64, "max_seq_length": 64}, r"--stride 64 must be .* less than --max_seq_length 64"),
        ({"tag_names": ["O", "PER"]}, r"--tag_names 'O', 'PER' must be .* the scheme iob2, .*; 'PER' are none"),
        ({"tag_names": ["O", "B-a", "O"]}, r"must be different tags"),
        ({"tag_names": ["O", "S-a"]}, r"'S-a' are none"),
    ],
)
def test_contradictory_arguments_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_ner_arguments(NerDataArguments(**values))
    assert [NerDataArguments(max_seq_length=length).stride for length in (128, 16, 1)] == [32, 4, 0]
    check_ner_arguments(NerDataArguments(tag_names=["O", "S-a"], tag_scheme="bioes"))


def test_the_arguments_fit_on_one_command_line_with_those_of_the_trainer() -> None:
    parser = RecipeParser((ModelArguments, NerDataArguments, RecipeTrainingArguments))
    words = "--tag_names O B-a I-a --tag_scheme bilou --label_all_tokens --stride 8 --label_names labels".split()
    values = vars(parser.parse_args(words))
    assert (values["tag_names"], values["tag_scheme"]) == (["O", "B-a", "I-a"], "bilou")
    assert (values["label_all_tokens"], values["stride"], values["label_names"]) == (True, 8, ["labels"])
    assert "label_column" not in parser.names()
    with pytest.raises(RecipeError, match=r"invalid choice: 'bio'"):
        parser.parse_args(["--tag_scheme", "bio"])
