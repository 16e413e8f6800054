"""Tags of named entities: schemes read into IOB2, gaps filled, predictions repaired."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

from _ner_tags import TagError, fill_gaps, label_names, repair, to_iob2  # noqa: E402

from hf_l2sp.entity_scores import entity_spans  # noqa: E402

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
