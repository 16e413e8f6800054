"""What the named-entity recipes refuse: one message that names the cause and the cure, before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForTokenClassification

from .ner_harness import KNOWN, sentences, write_conll
from .recipe_harness import save_tiny_model, write_jsonl

import clinical_ner  # noqa: E402  # isort: skip


@pytest.fixture(scope="module")
def ner_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("ner_model"), KNOWN)


def refused(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a run that is refused; nothing is trained and nothing written."""
    with pytest.raises(SystemExit, match="1"):
        clinical_ner.main([*words, "--output_dir", str(folder / "out")])
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert "train_runtime" not in printed.out and not (folder / "out").exists()
    return printed.err


GOOD = {"tokens": ["the", "fever", "some"], "ner_tags": ["O", "B-PROBLEM", "O"]}


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (
            [GOOD, {"tokens": ["a", "b"], "ner_tags": ["O", "I-DRUG"]}],
            [],
            "train.jsonl', line 2, token 2: the tag 'I-DRUG' follows 'O', but in IOB2 an entity begins with 'B-DRUG'",
        ),
        (
            [GOOD, {"tokens": ["a", "b"], "ner_tags": ["O"]}],
            [],
            "line 2: 2 tokens but 1 tags; every token needs exactly one",
        ),
        ([], [], "holds no sentences; give at least one per entity type"),
        (
            [{**GOOD, "ner_tags": ["O"] * 3}],
            [],
            "has one tag only ('O': no entity is tagged); there is nothing to learn",
        ),
        ([GOOD, GOOD], [], "has entity types that the training data lack: 'DRUG'"),
        (
            [{**GOOD, "ner_tags": [0, 1, 0]}],
            [],
            "the tag is the integer 0; name the tags in the order of their integers",
        ),
        ([{"tokens": ["\udcff"], "ner_tags": ["O"]}], [], "half a character (a lone surrogate); mend it"),
        ([GOOD], ["--tags_column", "tags"], "has no column 'tags' (--tags_column); it has 'tokens', 'ner_tags'"),
        (None, ["--shots", "100"], "--shots 100 is more than the training data have of type"),
        (None, ["--max_seq_length", "64"], "--max_seq_length 64 is more than"),
        (None, ["--max_seq_length", "6", "--stride", "5"], "leaves room for 4 sub-words beside the special ones"),
        (None, ["--augment", "shuffle"], "--augment 'shuffle' is no edit"),
        (None, ["--dataloader_drop_last", "true"], "--dataloader_drop_last changes what Trainer evaluates"),
        (None, ["--train_sampling_strategy", "group_by_length"], "group_by_length changes what Trainer evaluates"),
        (None, ["--text_column", "text", "--predict_file", "x.txt"], "needs --predict_output beside it"),
        (None, ["--learning_rates", "1"], "unknown argument '--learning_rates'; did you mean --learning_rate?"),
    ],
)
def test_unfit_data_and_arguments_are_refused(
    rows: list[dict[str, Any]] | None,
    words: list[str],
    message: str,
    ner_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", sentences(20, 0) if rows is None else rows)
    validation = write_jsonl(tmp_path / "validation.jsonl", sentences(8, 1))
    command = ["--model_name_or_path", ner_model, "--train_file", train, "--validation_file", validation]
    if "--max_seq_length" not in words:
        command += ["--max_seq_length", "20"]
    if "--train_sampling_strategy" in words and "train_sampling_strategy" not in clinical_ner.make_parser().names():
        words = ["--group_by_length"]  # transformers 4
    assert message in refused([*command, *words], tmp_path, capsys)


def test_the_line_of_a_conll_file_is_named(ner_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_conll(tmp_path / "train.conll", [GOOD, {"tokens": ["a", "b"], "ner_tags": ["B-DRUG", "I-PROBLEM"]}])
    message = refused(["--model_name_or_path", ner_model, "--train_file", train], tmp_path, capsys)
    assert "train.conll', line 6: the tag 'I-PROBLEM' follows 'B-DRUG'" in message


# --------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            '{"words": ["a"]}\n',
            "has neither a column 'tokens' (--tokens_column) nor 'text' (--text_column)",
        ),
        ("x.jsonl", '{"tokens": "a b"}\n', "line 1: the tokens are 'a b', a str, not a list with an entry per word"),
        ("x.jsonl", '{"tokens": ["a"]}\n\n{"tokens": ["a", null]}\n', "line 3, token 2: the token None is a NoneType"),
        ("x.jsonl", '{"tokens": ["\\ud800"]}\n', "line 1, token 1: the token '\\ud800' holds"),
        ("x.jsonl", '{"text": 5}\n', "row 1: the text is 5, a int, not a string"),
        ("x.conll", "a\nb c\n", "line 2: 'b c' has 2 columns, but the first line has 1"),
        ("x.conll", "\n\n", "holds no sentences"),
        ("x.jsonl", "", "holds no rows"),
        ("x.docx", "a", "has the extension '.docx'"),
    ],
)
def test_a_file_that_cannot_be_predicted_is_refused_before_training(
    name: str, content: str, message: str, ner_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    command = ["--model_name_or_path", ner_model, "--max_seq_length", "20", "--predict_file", str(tmp_path / name)]
    text = refused([*command, "--predict_output", str(tmp_path / "out.jsonl")], tmp_path, capsys)
    assert message in text and f"--predict_file {str(tmp_path / name)!r}" in text


def test_a_model_that_finds_no_entities_is_refused(
    ner_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.txt").write_text("fever\n")
    common = ["--predict_only", "--predict_file", str(tmp_path / "x.txt"), "--max_seq_length", "20"]
    common += ["--predict_output", str(tmp_path / "x.jsonl"), "--model_name_or_path"]
    assert "has no trained token classification head" in refused([*common, ner_model], tmp_path, capsys)
    # A head that was trained for something else.
    other = save_tiny_model(tmp_path / "other", KNOWN)
    config = BertConfig.from_pretrained(other, id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    BertForTokenClassification(config).save_pretrained(other)
    assert "the labels of the model are no IOB2 tags: 'good', 'bad'" in refused([*common, other], tmp_path, capsys)
    # One of another task, whose head has weights of the same names.
    saved = json.loads((tmp_path / "other" / "config.json").read_text())
    saved |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "O", "1": "B-x"}}
    (tmp_path / "other" / "config.json").write_text(json.dumps({**saved, "label2id": {"O": 0, "B-x": 1}}))
    assert "is a BertForSequenceClassification" in refused([*common, other], tmp_path, capsys)
    assert not (tmp_path / "x.jsonl").exists()
