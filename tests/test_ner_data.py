"""Named-entity data of the recipes: files of all forms, tag schemes, refusals with their place, draws by seed."""

from __future__ import annotations

import json
import random
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
    NerSplit,
    check_ner_arguments,
    check_rows,
    check_types,
    draw_shots,
    hold_out,
    load_ner_splits,
)
from _ner_files import read_ner_file  # noqa: E402
from _ner_tags import TagError, fill_gaps, label_names, repair, to_iob2  # noqa: E402
from _recipe_args import ModelArguments, RecipeError, RecipeParser, RecipeTrainingArguments  # noqa: E402

from hf_l2sp.entity_scores import entity_spans  # noqa: E402

TOKENS = [["Café", "#1", "(", "不", "-DOCSTART-x", ")"], ["a\u00a0b", "\u2028", "👩‍⚕️"], ["#", "O"]]
TAGS = [["B-LOC", "I-LOC", "O", "B-creative-work", "O", "O"], ["O", "B-LOC", "B-LOC"], ["O", "O"]]
NAMES = ["O", "B-LOC", "I-LOC", "B-creative-work", "I-creative-work"]
COLUMNS = ("tokens", "ner_tags")


def read(path: Path, **settings: Any) -> NerSplit:
    data = NerDataArguments(train_file=str(path), **settings)
    check_ner_arguments(data)
    rows = read_ner_file(str(path), "--train_file", (data.tokens_column, data.tags_column), data.tag_scheme)
    return check_rows(rows, f"--train_file {str(path)!r}", data)


def split_of(*sentences: str) -> NerSplit:
    """Sentences written as the types in them: "a b" has an entity of type a and one of type b, "" has none."""
    tokens = [[f"w{number}", *f"of {kinds}".split()] for number, kinds in enumerate(sentences)]
    return NerSplit(
        "--train_file 'x'", tokens, [["O", "O", *(f"B-{k}" for k in kinds.split())] for kinds in sentences]
    )


def types_of(split: NerSplit) -> Counter[str]:
    return Counter(kind for kinds in split.types() for kind in kinds)


# --------------------------------------------------------------------------- files


def conll(separator: str, middle: list[str], end: str = "\n") -> str:
    lines = []
    for tokens, tags in zip(TOKENS, TAGS, strict=True):
        lines += [separator.join([token, *middle, tag]) for token, tag in zip(tokens, tags, strict=True)] + [""]
    return end.join(lines)


def write_all(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The same sentences in every form, with the arguments to read them."""
    rows = [{"tokens": tokens, "ner_tags": tags} for tokens, tags in zip(TOKENS, TAGS, strict=True)]
    ids = [{"words": row["tokens"], "ids": [NAMES.index(tag) for tag in row["ner_tags"]]} for row in rows]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    comments = "# newdoc id = O\n#global.columns = FORM TAG\n-DOCSTART-\t-X-\t_\tO\n\n# text = Café #1\n"
    texts = {
        "a.jsonl": ("\ufeff" + "\n\n".join(lines) + "\n", {}),
        "a.json": (json.dumps(rows), {}),
        "lines.json": ("\r\n".join(lines), {}),
        "tabs.conll": (conll("\t", []), {}),
        "bom.bio": ("\ufeff" + conll("\t", ["_", "X Y"], "\r\n"), {}),
        "old_mac.tsv": (conll("\t", [], "\r"), {}),
        "spaces.txt": ("-DOCSTART- -X- O\n\n\n" + conll("  ", ["NN"]) + "\n\n", {}),
        "comments.iob": (comments + conll("\t", ["_", "_"]).replace("\n\n", "\n \t \n# sent_id = 2\n"), {}),
        "comments.txt": ("# a comment\n#\n" + conll(" ", []), {}),
        "integers.jsonl": (
            "\n".join(map(json.dumps, ids)),
            {"tokens_column": "words", "tags_column": "ids", "tag_names": NAMES},
        ),
    }
    paths = []
    for name, (text, settings) in texts.items():
        (folder / name).write_bytes(text.encode("utf-8"))
        paths.append((folder / name, settings))
    table = datasets.Dataset.from_list(rows)
    table.to_pandas().to_parquet(folder / "strings.parquet")
    named = table.features | {"ner_tags": datasets.Sequence(datasets.ClassLabel(names=NAMES))}
    coded = [{"tokens": row["words"], "ner_tags": row["ids"]} for row in ids]
    datasets.Dataset.from_list(coded, features=datasets.Features(named)).to_parquet(folder / "named.parquet")
    return [*paths, (folder / "strings.parquet", {}), (folder / "named.parquet", {})]


def test_every_form_gives_the_same_sentences(tmp_path: Path) -> None:
    files = write_all(tmp_path)
    assert len(files) == 12
    for path, settings in files:
        split = read(path, **settings)
        assert (split.tokens, split.tags) == (TOKENS, TAGS), path.name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"extension '\.csv'; give \.json, \.jsonl, \.parquet .*, or \.conll, .*\(a token and its tag"),
        ("a.jsonl", b'{"tokens": ["a"], "ner_tags": ["O"]}\n\n{"tokens": [\n', r"a\.jsonl', line 3: not valid JSON"),
        ("a.jsonl", b'{"tokens": ["a"]}\n{"tokens": ["\xe9"]}', r"a\.jsonl', line 2: not UTF-8 text \(byte 0xe9\)"),
        ("a.conll", b"a O\r\n\r\nb O\r\n\xff O\r\n", r"a\.conll', line 4: not UTF-8 text \(byte 0xff\); save it as"),
        ("a.conll", b"a O\n\0 O\n", r"a\.conll', line 2: a NUL byte"),
        ("a.txt", "a O\n".encode("utf-16"), r"a\.txt', line 1: not UTF-8 text"),
        ("a.txt", "a O\n".encode("utf-16-le"), r"a\.txt', line 1: a NUL byte"),
        ("a.conll", b"", r"holds no sentences"),
        ("a.conll", b"\n \n# x y z\n-DOCSTART-\n", r"holds no sentences"),
        ("a.jsonl", b"", r"holds no sentences"),
        ("a.json", b"[]", r"holds no sentences"),
        (
            "a.txt",
            b"John lives here .\n\nIn Berlin .\n",
            r"line 3: 'In Berlin \.' has 3 columns, but the first line has 4",
        ),
        ("a.txt", b"word\nword\n", r"a\.txt', line 1: 'word' has one column; write a token, a tab or spaces, and its"),
        (
            "a.txt",
            b"a O\nNew York B-LOC\n",
            r"a\.txt', line 2: 'New York B-LOC' has 3 columns, but the first .* 2, sepa",
        ),
        (
            "a.txt",
            b"a\tO\nb O\n",
            r"a\.txt', line 2: 'b O' has 1 columns, but the first line has 2, separated by tabs",
        ),
        ("a.txt", b"a\tO\n\tO\n", r"a\.txt', line 2: '\\tO' has a tag but no token"),
        ("a.txt", b"a\tO\n# note\n", r"a\.txt', line 2: '# note' has 1 columns"),  # within a sentence: no comment
        ("a.txt", b"a O\n\n#tag X-bad\n", r"a\.txt', line 3: 'X-bad' is no tag of the scheme iob2"),
        ("a.jsonl", b'{"words": ["a"], "ner_tags": ["O"]}', r"no column 'tokens' \(--tokens_column\); it has 'words'"),
        ("a.jsonl", b'{"tokens": ["a"], "tags": ["O"]}', r"no column 'ner_tags'.* Did you mean --tags_column tags\?"),
        ("a.parquet", b"tokens", r"a\.parquet' is not a parquet file"),
    ],
)
def test_unreadable_files_are_refused_with_their_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_its_neighbors(tmp_path: Path) -> None:
    (tmp_path / "train.conll").touch()
    with pytest.raises(
        RecipeError, match=r"--train_file '.*trian\.conll' does not exist; its folder has 'train\.conll'"
    ):
        read(tmp_path / "trian.conll")


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


# --------------------------------------------------------------------------- schemes


SAME = ["O", "B-a", "I-a", "B-a", "O", "B-b", "B-a", "I-a", "I-a"]


@pytest.mark.parametrize(
    ("scheme", "tags"),
    [
        ("iob2", SAME),
        ("iob1", ["O", "I-a", "I-a", "B-a", "O", "I-b", "I-a", "I-a", "I-a"]),
        ("iob1", SAME),
        ("bioes", ["O", "B-a", "E-a", "S-a", "O", "S-b", "B-a", "I-a", "E-a"]),
        ("bilou", ["O", "B-a", "L-a", "U-a", "O", "U-b", "B-a", "I-a", "L-a"]),
    ],
)
def test_every_scheme_is_read_into_iob2(scheme: str, tags: list[str]) -> None:
    assert to_iob2(tags, scheme) == SAME


@pytest.mark.parametrize(
    ("tags", "index", "message"),
    [
        ("O I-a", 1, r"'I-a' continues an entity, but none was begun with 'B-a'"),
        ("S-a E-a", 1, r"'E-a' continues an entity"),
        ("B-a E-b", 1, r"'E-b' breaks off the entity that 'B-a' is within"),
        ("B-a O", 1, r"'O' breaks off the entity that 'B-a'"),
        ("B-a I-a S-a", 2, r"'S-a' breaks off the entity that 'I-a'"),
        ("O B-a I-a", 2, r"the sentence ends within the entity of the tag 'I-a'"),
        ("U-a", 0, r"'U-a' is no tag of the scheme bioes .*; is it --tag_scheme bilou\?"),
    ],
)
def test_broken_bioes_is_refused(tags: str, index: int, message: str) -> None:
    with pytest.raises(TagError, match=message) as error:
        to_iob2(tags.split(), "bioes")
    assert error.value.index == index


@pytest.mark.parametrize("scheme", ["iob2", "iob1", "bioes", "bilou"])
def test_schemes_of_random_entities_round_trip(scheme: str) -> None:
    rng = random.Random(scheme)
    for _ in range(300):
        tags: list[str] = []
        while len(tags) < 12:
            kind, length = rng.choice("ab"), rng.randint(1, 3)
            tags += rng.choice([["O"] * length, [f"B-{kind}", *[f"I-{kind}"] * (length - 1)]])
        written = list(tags)
        for kind, first, end in entity_spans(tags):
            if scheme == "iob1" and (first == 0 or tags[first - 1][2:] != kind):
                written[first] = f"I-{kind}"
            if scheme in ("bioes", "bilou"):
                written[end - 1] = f"{'E' if scheme == 'bioes' else 'L'}-{kind}"
                if end == first + 1:
                    written[first] = f"{'S' if scheme == 'bioes' else 'U'}-{kind}"
        assert to_iob2(written, scheme) == tags


def test_labels_are_in_a_fixed_order_with_o_first() -> None:
    assert label_names({"b", "A", "a-c"}) == ["O", "B-A", "I-A", "B-a-c", "I-a-c", "B-b", "I-b"]


@pytest.mark.parametrize(
    ("tags", "filled"),
    [
        ([None, "O", None], ["O", "O", "O"]),
        (["B-a", None, "I-a"], ["B-a", "I-a", "I-a"]),  # within an entity
        (["B-a", None, "B-a"], ["B-a", "O", "B-a"]),
        (["B-a", None], ["B-a", "O"]),
        (["O", None, None, "I-a"], ["O", "B-a", "I-a", "I-a"]),  # where it begins
        (["B-b", None, "I-a"], ["B-b", "B-a", "I-a"]),
        ([None, None], ["O", "O"]),
    ],
)
def test_words_that_no_model_sees_are_filled_in(tags: list[str | None], filled: list[str]) -> None:
    assert fill_gaps(tags) == filled


def test_predictions_are_repaired_as_in_pipelines() -> None:
    assert repair(["I-a", "I-a", "I-b", "O", "I-b", "B-b", "I-a"]) == "B-a I-a B-b O B-b B-b B-a".split()
    assert repair(SAME) == SAME


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
    check_ner_arguments(NerDataArguments(tag_names=["O", "S-a"], tag_scheme="bioes"))


def test_the_arguments_fit_on_one_command_line_with_those_of_the_trainer() -> None:
    parser = RecipeParser((ModelArguments, NerDataArguments, RecipeTrainingArguments))
    words = "--tag_names O B-a I-a --tag_scheme bilou --label_all_tokens --stride 8 --label_names labels".split()
    values = vars(parser.parse_args(words))
    assert (values["tag_names"], values["tag_scheme"]) == (["O", "B-a", "I-a"], "bilou")
    assert (values["label_all_tokens"], values["stride"], values["label_names"]) == (True, 8, ["labels"])
    assert "text_column" not in parser.names()
    with pytest.raises(RecipeError, match=r"invalid choice: 'bio'"):
        parser.parse_args(["--tag_scheme", "bio"])
