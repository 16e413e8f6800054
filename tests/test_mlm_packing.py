"""Packing: nothing is lost, rows are framed, words are known for every family of tokenizers, nothing piles up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .ner_tokenizers import CORPUS, make_tokenizer

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

import _mlm_packing  # noqa: E402
from _mlm_masking import FIRST, LATER, OUTSIDE  # noqa: E402
from _mlm_packing import Frame, PackedFile  # noqa: E402

FAMILIES = ("wordpiece", "gpt2", "unigram", "bare")
TEXTS = [*CORPUS[:3], "x", "aspirin (100 mg) in New York"] * 7


def pack(folder: Path, tokenizer: Any, length: int, texts: list[str] = TEXTS, limit: int | None = None) -> Any:
    file = PackedFile(folder / "rows.arrow", tokenizer, length, limit)
    for text in texts:
        file.add(text)
    return file, file.close()


def words_of(ids: list[int], kinds: list[int]) -> list[list[int]]:
    words: list[list[int]] = []
    for token, kind in zip(ids, kinds, strict=True):
        if kind == FIRST:
            words.append([token])
        elif kind == LATER:
            words[-1].append(token)
    return words


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [8, 13])
def test_the_rows_are_the_texts_with_a_separator_after_each(family: str, length: int, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(family)
    file, rows = pack(tmp_path, tokenizer, length)
    frame = Frame.of(tokenizer)
    stream: list[int] = []
    for index, row in enumerate(rows):
        ids, kinds = row["input_ids"], row["kinds"]
        assert len(ids) == len(kinds) and (len(ids) == length or index == len(rows) - 1)
        before, after = len(frame.before), len(ids) - len(frame.after)
        assert tuple(ids[:before]) == frame.before and tuple(ids[after:]) == frame.after
        assert set(kinds[:before] + kinds[after:]) <= {OUTSIDE} and kinds[before] != LATER
        stream += ids[before:after]
    expected: list[int] = []
    for text in TEXTS:
        expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], *frame.between]
    assert stream == expected
    assert (file.texts, file.tokens) == (len(TEXTS), len(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_those_of_the_tokenizer(family: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(family)
    _, rows = pack(tmp_path, tokenizer, 400, ["the patient (NYC) givened isn't 100"])
    (row,) = rows
    words = [tokenizer.decode(word).strip() for word in words_of(row["input_ids"], row["kinds"])]
    if family == "wordpiece":  # lower case, and every punctuation mark is a word
        assert words == ["the", "patient", "(", "nyc", ")", "givened", "isn", "'", "t", "100"]
    elif family == "gpt2":
        assert words == ["the", "patient", "(", "NYC", ")", "givened", "isn", "'t", "100"]
    else:
        assert words == ["the", "patient", "(NYC)", "givened", "isn't", "100"]
    assert any(kind == LATER for kind in row["kinds"])


def test_white_space_ends_a_word_where_the_tokenizer_does_not_split(tmp_path: Path) -> None:
    bare = Tokenizer(models.BPE(unk_token="<unk>"))
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = [word for text in CORPUS for word in text.split()]
    bare.train_from_iterator(words, trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")
    text = "the patient  was given aspirin"
    assert set(tokenizer(text).word_ids()) == {0}
    _, rows = pack(tmp_path, tokenizer, 100, [text])
    assert len(words_of(rows[0]["input_ids"], rows[0]["kinds"])) == 5


def test_special_and_unknown_tokens_are_no_words(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("wordpiece")
    _, rows = pack(tmp_path, tokenizer, 40, ["the <s> patient 電 dose"])
    for token, kind in zip(rows[0]["input_ids"], rows[0]["kinds"], strict=True):
        assert (kind == OUTSIDE) == (token in tokenizer.all_special_ids)
    assert tokenizer.unk_token_id in rows[0]["input_ids"]


def test_frames_of_models_with_and_without_special_tokens() -> None:
    assert Frame.of(make_tokenizer("wordpiece")) == Frame((2,), (3,), (3,))
    assert Frame.of(make_tokenizer("gpt2")) == Frame((), (3,), (3,))
    assert Frame.of(make_tokenizer("bare")) == Frame((), (), (3,))  # </s>, which it knows but does not add
    both = make_tokenizer("wordpiece")
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A </s> <unk>", special_tokens=[("<s>", 2), ("</s>", 3), ("<unk>", 1)]
    )
    assert Frame.of(both) == Frame((2, 2), (3, 1), (1,))


def test_a_limit_is_kept_and_nothing_more_is_taken(tmp_path: Path) -> None:
    file, rows = pack(tmp_path, make_tokenizer("wordpiece"), 10, TEXTS * 20, limit=5)
    assert len(rows) == 5 and file.full
    _, none = pack(tmp_path, make_tokenizer("wordpiece"), 10, TEXTS, limit=0)
    assert len(none) == 0


def test_rows_are_written_while_texts_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mlm_packing, "_TEXTS", 8)
    monkeypatch.setattr(_mlm_packing, "_ROWS", 4)
    file = PackedFile(tmp_path / "rows.arrow", make_tokenizer("wordpiece"), 16)
    waiting = []
    for _ in range(400):
        file.add("the patient was given aspirin in the morning")
        waiting.append((len(file._waiting), len(file._ids), len(file._rows)))
    texts, tokens, rows = (max(values) for values in zip(*waiting, strict=True))
    assert texts < 8 and tokens < 16 and rows < 4
    assert file.written > 200
    assert len(file.close()) == file.written
