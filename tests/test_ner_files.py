"""Files of named-entity data: every form gives the same sentences, and what is unreadable is refused with its line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

from _ner_data import NerDataArguments, check_ner_arguments, check_rows  # noqa: E402
from _ner_draws import NerSplit  # noqa: E402
from _ner_files import read_ner_file  # noqa: E402
from _recipe_args import RecipeError  # noqa: E402

TOKENS = [["Café", "#1", "(", "不", "-DOCSTART-x", ")"], ["a\u00a0b", "\u2028", "👩‍⚕️"], ["#", "O"]]
TAGS = [["B-LOC", "I-LOC", "O", "B-creative-work", "O", "O"], ["O", "B-LOC", "B-LOC"], ["O", "O"]]
NAMES = ["O", "B-LOC", "I-LOC", "B-creative-work", "I-creative-work"]
COLUMNS = ("tokens", "ner_tags")


def read(path: Path, **settings: Any) -> NerSplit:
    data = NerDataArguments(train_file=str(path), **settings)
    check_ner_arguments(data)
    rows = read_ner_file(str(path), "--train_file", (data.tokens_column, data.tags_column), data.tag_scheme)
    return check_rows(rows, f"--train_file {str(path)!r}", data)


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
        ("a.txt", b"a\tO\n\tO\n", r"a\.txt', line 2: '\\tO' has no token; drop"),
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


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        ("a\nb\n\n#c\n#\n", [["a", "b"], ["#c", "#"]]),
        ("# a comment\n-DOCSTART-\n\na\n\n# another\nb\n", [["a"], ["b"]]),
        ("a\tB-x\nb\tnonsense\n", [["a", "b"]]),
        ("\ufeffa\u00a0b\r\n\r\n\r\nc", [["a\u00a0b"], ["c"]]),
        ("", []),
    ],
)
def test_without_tags_a_conll_file_needs_tokens_alone(tmp_path: Path, content: str, tokens: list[list[str]]) -> None:
    path = tmp_path / "a.conll"
    path.write_bytes(content.encode("utf-8"))
    assert [row.tokens for row in read_ner_file(str(path), "--predict_file", COLUMNS, "iob2", tagged=False)] == tokens


def test_without_tags_their_column_is_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"tokens": ["a"]}\n\n{"tokens": ["b"], "ner_tags": 5}\n')
    rows = read_ner_file(str(path), "--predict_file", COLUMNS, "iob2", tagged=False)
    assert [(row.tokens, row.tags, row.at(0)) for row in rows] == [
        (["a"], None, "line 1, token 1"),
        (["b"], None, "line 3, token 1"),
    ]
    datasets.Dataset.from_dict({"tokens": [["a"]]}).to_parquet(tmp_path / "a.parquet")
    rows = read_ner_file(str(tmp_path / "a.parquet"), "--predict_file", COLUMNS, "iob2", tagged=False)
    assert [row.tokens for row in rows] == [["a"]]


def test_a_missing_file_names_its_neighbors(tmp_path: Path) -> None:
    (tmp_path / "train.conll").touch()
    with pytest.raises(
        RecipeError, match=r"--train_file '.*trian\.conll' does not exist; its folder has 'train\.conll'"
    ):
        read(tmp_path / "trian.conll")
