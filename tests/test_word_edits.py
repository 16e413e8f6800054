"""What every edit of a text may and may not do."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from hf_l2sp.word_edits import share_of, text_of, words_of_text

from .augmentation import TEXTS, copies_of, is_part_of, words

EDITS = ("swap", "delete", "insert")


def test_words_and_text_are_the_same():
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choice("ab9é की.,(„ \n\t\u00a0\u3000\x1c😀-'") for _ in range(rng.randrange(12)))
        assert text_of(words_of_text(text)) == (text if text.strip() else "")


def test_words_of_a_text():
    assert words("„Don't,\" she (said) - twice: 3.5 😀 की") == ["Don't", "she", "said", "twice", "3.5", "की"]
    # What an edit must not tear apart.
    whole = "-5 $5 C++ #tag @user **bold** https://x.org/?q=1 a@b.org <b>x</b> ❤️so fine👩‍⚕️ e\u0301te\u0301 1️⃣ व्यक्ति"
    assert words(f"({whole}).") == whole.split()
    assert words("?! ... 👩‍⚕️ ❤️ -- \u0301") == []


def test_text_without_spaces_is_no_word():
    """A sentence is not to be deleted, repeated or replaced as if it were a word."""
    assert words(
        "我住在北京，他住在上海。 今天天气很好，我们去公园吧。 ok ประเทศไทยเป็นราชอาณาจักร これは日本語の文章です。"
    ) == ["ok"]
    segmented = "我 住 在 北京 ประเทศ 안녕하세요여러분반갑습니다".split()
    assert words(" ".join(segmented)) == segmented


def test_share():
    assert [share_of(0.29, 100), share_of(0.1, 9), share_of(1.0, 7), share_of(0.5, 3)] == [29, 1, 7, 1]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("strength", [0.1, 0.3, 1.0])
def test_swap(text, strength):
    (copy,) = copies_of(text, ["swap"], strength=strength)
    assert Counter(words(copy)) == Counter(words(text)) and words(copy) != words(text)
    # Everything but the words is where it was.
    frame = ["{}".join([w.gap + w.left, w.right]) if w.free else w.gap + w.core for w in words_of_text(text)]
    assert copy == "".join(frame).format(*words(copy))
    if strength == 0.1 and len(words(text)) < 20:
        assert sum(a != b for a, b in zip(words(copy), words(text), strict=True)) == 2


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("strength", "count"), [(0.1, lambda n: 1), (0.5, lambda n: n // 2), (1.0, lambda n: n - 1)])
def test_delete(text, strength, count):
    for copy in copies_of(text, ["delete"], copies=3, strength=strength):
        assert is_part_of(words(copy), words(text))
        assert len(words(text)) - len(words(copy)) == count(len(words(text))) and words(copy)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("strength", "count"), [(0.1, lambda n: 1), (0.5, lambda n: n // 2)])
def test_insert(text, strength, count):
    for copy in copies_of(text, ["insert"], copies=3, strength=strength):
        assert is_part_of(words(text), words(copy)) and set(words(copy)) == set(words(text))
        assert len(words(copy)) - len(words(text)) == count(len(words(text)))


def test_edits_reach_every_place():
    text = "a b c d"
    swapped, deleted, inserted = (set(copies_of(text, [name], copies=60)) for name in EDITS)
    assert len(swapped) == 6
    assert deleted == {"b c d", "a c d", "a b d", "a b c"}
    assert len(inserted) == 4 * 4  # 20 ways; "a a b c d" and the like come about in two
    assert {"d a b c d", "a b c d a"} <= inserted


def test_texts_too_short_get_fewer_copies_and_never_an_empty_one():
    cases = {"": 0, " ... ": 0, "word": 0, "so so": 0, "one two": 1}
    for text, count in cases.items():
        assert len(copies_of(text, ["swap"], copies=5)) == count, text
    assert copies_of("word, ", ["delete"], copies=5) == []
    assert sorted(copies_of("one - two", ["delete"], copies=5, strength=1.0)) == ["- two", "one -"]
    assert copies_of("word", ["insert"], copies=5) == ["word word"]
    assert copies_of("word", ["swap", "insert"]) == ["word word"]  # what cannot be swapped may be inserted


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_very_long_texts(name, strength):
    rng = random.Random(2)
    text = " ".join(f"w{rng.randrange(3000)}" for _ in range(10_000))
    (copy,) = copies_of(text, [name], strength=strength)
    count = {0.1: 1000, 1.0: 10_000}[strength]
    sizes = {"swap": 10_000, "delete": max(1, 10_000 - count), "insert": 10_000 + count}
    assert len(words(copy)) == sizes[name]
    assert copies_of("ha " * 10_000, ["swap"], strength=strength) == []


def test_copies_differ_and_take_the_edits_in_turn():
    text = TEXTS[2]
    made = copies_of(text, EDITS, copies=6)
    assert len({text, *made}) == 7
    assert sorted(len(words(copy)) - len(words(text)) for copy in made) == [-1, -1, 0, 0, 1, 1]
    # One copy each: over the rows all edits are used.
    many = [" ".join(f"w{row}x{n}" for n in range(9)) for row in range(60)]
    lengths = Counter(len(words(copies_of(one, EDITS)[0])) - 9 for one in many)
    assert set(lengths) == {-1, 0, 1} and min(lengths.values()) > 8
