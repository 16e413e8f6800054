"""Raw text into words: whatever it holds, and as the words of the training data are."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

from _ner_words import split_words, word_pattern  # noqa: E402


def words_of(text: str, pattern: str | None = None) -> list[str]:
    return [text[start:end] for start, end in split_words(text, pattern)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\r\n\u00a0\u2028", []),
        ("Aspirin, 3.5 mg/kg.", ["Aspirin", ",", "3", ".", "5", "mg", "/", "kg", "."]),
        ("((a)-[b])...", ["(", "(", "a", ")", "-", "[", "b", "]", ")", ".", ".", "."]),
        ("e\u0301te\u0301 naïve", ["e\u0301te\u0301", "naïve"]),  # accents that are characters of their own
        ("हिन्दी می\u200cخواهم co\u00adop", ["हिन्दी", "می\u200cخواهم", "co\u00adop"]),
        ("我住在北京。", ["我", "住", "在", "北", "京", "。"]),
        ("한국어 カタカナ", ["한국어", "カタカナ"]),
        ("ok👩‍⚕️👍🏽!", ["ok", "👩‍⚕️", "👍🏽", "!"]),
        ("a_b don't", ["a", "_", "b", "don", "'", "t"]),
        ("x" * 5000, ["x" * 5000]),
        ("a\u200bb", ["a", "\u200b", "b"]),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@pytest.mark.parametrize("seed", range(20))
def test_words_are_all_that_is_not_white_space(seed: int) -> None:
    rng = random.Random(seed)
    alphabet = [
        *"abcXYZ019.,-()'@#_",
        *"é我京カह्दी한",
        "\u0301",
        "👩‍⚕️",
        "👍🏽",
        " ",
        "  ",
        "\n",
        "\u00a0",
        "\u200d",
        "\ufeff",
    ]
    patterns = [None, word_pattern([["@ab", "a-b", "1.5", "#x", "9%", "it's"]] * 2)]
    for _ in range(60):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 40)))
        for pattern in patterns:
            end = 0
            for start, stop in split_words(text, pattern):
                assert end <= start < stop and not text[end:start].strip() and text[start:stop].strip()
                end = stop
            assert not text[end:].strip()


def test_marks_belong_to_words_where_they_do_in_the_data() -> None:
    tokens = "@ann said : non-Hodgkin 's 30% of #tag ( 1,200 ) - e.g. U.S. , don't $ 5 . . . . . . .".split()
    pattern = word_pattern([tokens, tokens])
    text = "@bob's T-cell (5%), 3,000 - a #x e.g. U.K. won't $7."
    expected = "@bob 's T-cell ( 5% ) , 3,000 - a #x e.g. U.K . won't $ 7 .".split()
    assert words_of(text, pattern) == expected
    # Once is an accident, and nothing seen means that every mark is a word.
    assert words_of("T-cell", word_pattern([["non-Hodgkin"]])) == ["T", "-", "cell"]
    assert word_pattern([["a", "-", "b"]]) == word_pattern()


def test_a_mark_that_more_often_stands_alone_between_words_is_no_part_of_them() -> None:
    split = "and / or , his / her ( a ) b".split()
    joined = ["a/b", "c(d", "1,2"] * 2
    assert words_of("x/y u(v 3,4", word_pattern([joined])) == ["x/y", "u(v", "3,4"]
    # A comma between two words of a list had a space behind it, so it says nothing about 3,4.
    pattern = word_pattern([joined, split, split, "i , j , k".split()])
    assert words_of("x/y u(v 3,4", pattern) == ["x", "/", "y", "u", "(", "v", "3,4"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Acme Inc., Acme Inc.", ["Acme", "Inc.", ",", "Acme", "Inc."]),
        ("Inc.x Incas incInc.", ["Inc.x", "Incas", "incInc", "."]),
        ("the U.S.A. and U.S. end.", ["the", "U.S.A.", "and", "U.S.", "end", "."]),
        ("Ann's dog's it'so", ["Ann", "'s", "dog", "'s", "it", "'", "so"]),
    ],
)
def test_abbreviations_keep_their_point_and_endings_are_words(text: str, words: list[str]) -> None:
    tokens = "Inc. U.S. U.S.A. Ann 's end. The end . An end . . . .".split()
    assert words_of(text, word_pattern([tokens])) == words


def test_the_expression_stays_short() -> None:
    tokens = [f"{first}{second}." for first in "abcdefghijklmnopqrst" for second in "abcdefghijklmnopqrst"]
    pattern = word_pattern([[*tokens, "zz.", "zz."]])
    assert len(pattern) < 1000 and words_of("zz. aa.", pattern) == ["zz.", "aa."]


@pytest.mark.parametrize("marks", ["]", "^", "\\", "[", "-", "&&", "~~", "|", "--"])
def test_marks_with_a_meaning_in_expressions_are_taken_as_they_are(marks: str) -> None:
    pattern = word_pattern([[f"a{marks}b", f"{marks[0]}c", f"d{marks[0]}"]] * 2)
    text = f"x{marks}y {marks[0]}z w{marks[0]} u+v"
    assert words_of(text, pattern) == [f"x{marks}y", f"{marks[0]}z", f"w{marks[0]}", "u", "+", "v"]
