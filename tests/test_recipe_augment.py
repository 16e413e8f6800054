"""Augmentation in the recipes: refused arguments, the model behind `mask`, the copies and the note about them."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, BertForMaskedLM

from hf_l2sp.augment import NAMES

from .end_to_end.recipe_harness import save_tiny_model

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

import _recipe_augment  # noqa: E402
from _recipe_args import RecipeError  # noqa: E402
from _recipe_augment import AugmentArguments, add_copies, make_augmenter  # noqa: E402


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an encoder without a language modelling head. Read only."""
    return save_tiny_model(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def masked_lm(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the same model with a head. Read only."""
    folder = tmp_path_factory.mktemp("masked") / "lm"
    shutil.copytree(encoder, folder)
    BertForMaskedLM(AutoConfig.from_pretrained(encoder)).save_pretrained(folder)
    return str(folder)


def test_nothing_is_made_where_nothing_is_asked_for() -> None:
    assert make_augmenter(AugmentArguments(), 1) is None
    assert make_augmenter(AugmentArguments(augment=[]), 1) is None


def test_the_arguments_reach_the_augmenter(masked_lm: str) -> None:
    arguments = AugmentArguments(["mask", "swap"], 2, 0.3, masked_lm)
    augmenter = make_augmenter(arguments, 7, tokens_column="words", tags_column="tags")
    assert augmenter is not None and list(augmenter.names) == ["mask", "swap"]
    assert (augmenter.copies, augmenter.strength, augmenter.seed) == (2, 0.3, 7)
    assert (augmenter.tokens_column, augmenter.tags_column, augmenter.text_column) == ("words", "tags", "text")
    assert isinstance(augmenter.model, BertForMaskedLM) and not augmenter.model.training


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"augment_copies": 2}, r"--augment_copies 2 needs --augment beside it: some of 'swap'"),
        ({"augment_strength": 0.2}, r"--augment_strength 0\.2 needs --augment"),
        ({"augment_model": "m"}, r"--augment_model 'm' needs --augment"),
        ({"augment": ["swap", "maks"]}, r"--augment 'maks' is no edit; did you mean 'mask'\?"),
        ({"augment": ["zzz"]}, r"--augment 'zzz' is no edit; give some of 'swap'"),
        ({"augment": ["swap", "swap"]}, r"--augment swap swap names an edit twice"),
        ({"augment": ["swap"], "augment_copies": 0}, r"--augment_copies 0 must be at least 1"),
        ({"augment": ["swap"], "augment_strength": 0.0}, r"--augment_strength 0\.0 is no share of the words"),
        ({"augment": ["swap"], "augment_strength": 1.5}, r"--augment_strength 1\.5 is no share"),
        ({"augment": ["swap"], "augment_strength": float("nan")}, r"--augment_strength nan is no share"),
        ({"augment": ["mask"]}, r"--augment mask needs --augment_model: .*domain_adapt_mlm\.py"),
        ({"augment": ["swap"], "augment_model": "m"}, r"'m' is for the edit mask, which --augment swap lacks"),
        ({"augment": ["mask"], "augment_model": "./nowhere"}, r"--augment_model '\./nowhere' does not exist"),
    ],
    ids=str,
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_augmenter(AugmentArguments(**values), 1)


def test_a_model_that_cannot_predict_words_is_refused(encoder: str, masked_lm: str, tmp_path: Path) -> None:
    def refused(path: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            make_augmenter(AugmentArguments(["mask"], augment_model=path), 1)

    refused(encoder, r"--augment_model '.*' has no trained language modelling head: .*'cls\.predictions.* and 3 more")
    shutil.copytree(masked_lm, tmp_path / "half")
    # A head for other words: its weights do not fit.
    config = AutoConfig.from_pretrained(masked_lm, vocab_size=99)
    BertForMaskedLM(config).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "half" / "model.safetensors")
    refused(str(tmp_path / "half"), r"has no trained language modelling head: .*word_embeddings")
    shutil.copytree(masked_lm, tmp_path / "mute")
    for path in (tmp_path / "mute").glob("tokenizer*"):
        path.unlink()
    refused(str(tmp_path / "mute"), r"--augment_model '.*mute'(| has no tokenizer|: its tokenizer cannot)")


def test_a_missing_wordnet_is_told_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**kwargs: Any) -> Any:
        raise LookupError("python -m nltk.downloader wordnet")

    monkeypatch.setattr(_recipe_augment, "Augmenter", fail)
    with pytest.raises(RecipeError, match=r"^--augment: python -m nltk\.downloader wordnet$"):
        make_augmenter(AugmentArguments(["insert_synonym"]), 1)


def test_copies_follow_the_rows_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    augmenter = make_augmenter(AugmentArguments(["swap"], 2), 3)
    assert augmenter is not None
    columns = {"text": ["one two three four", "alone"], "label": ["a", "b"]}
    more, note = add_copies(columns, augmenter)
    assert more["text"][:2] == columns["text"] and more["label"] == ["a", "b", "a", "a"]
    assert all(sorted(text.split()) == ["four", "one", "three", "two"] for text in more["text"][2:])
    assert note == (
        "--augment swap: 2 edited copies of the 2 training rows are added; 2 more could not be made, the rows are too "
        "short for them."
    )
    assert caplog.text == "", "said by the note, once"


def test_tagged_tokens_are_copied_with_their_tags() -> None:
    augmenter = make_augmenter(AugmentArguments(["delete"]), 3, tokens_column="tokens", tags_column="ner_tags")
    assert augmenter is not None
    columns = {"tokens": [["Ann", "met", "old", "Bob"]], "ner_tags": [["B-PER", "O", "O", "B-PER"]]}
    more, note = add_copies(columns, augmenter)
    assert len(more["tokens"]) == 2 and [len(tokens) for tokens in more["tokens"]] == [4, 3]
    assert more["ner_tags"][1] == ["B-PER", "O", "B-PER"]
    assert note == "--augment delete: 1 edited copies of the 1 training rows are added."


def test_the_help_names_every_edit() -> None:
    (text,) = (f.metadata["help"] for f in dataclasses.fields(AugmentArguments) if f.name == "augment")
    assert all(name in text for name in NAMES)
