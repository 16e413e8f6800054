"""Augmented data: rows and labels stay, draws depend on the row alone, and entities survive every edit."""

from __future__ import annotations

import random
from collections import Counter

import datasets
import pytest
import torch
from datasets.fingerprint import Hasher

from hf_l2sp.augment import NAMES, Augmenter, augment_dataset

from .augmentation import TEXTS, copies_of, install_wordnet, is_part_of, make_masked_lm
from .ner_tokenizers import FAMILIES, make_tokenizer, random_sentence

EDITS = ("swap", "delete", "insert")


# --- datasets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset():
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "id": datasets.Value("int64"),
        }
    )
    rows = TEXTS + ["word", "", "x y z " * 9]
    columns = {"text": rows, "label": [n % 2 for n in range(len(rows))], "id": list(range(len(rows)))}
    return datasets.Dataset.from_dict(columns, features=features)


def test_rows_come_first_and_labels_stay(dataset):
    augmented = augment_dataset(dataset, Augmenter(EDITS, copies=2))
    assert augmented.features == dataset.features
    assert augmented[: len(dataset)] == dataset[:]
    for row in augmented.select(range(len(dataset), len(augmented))):
        source = dataset[row["id"]]
        assert row["label"] == source["label"] and row["text"] != source["text"] and row["text"].strip()
    assert Counter(augmented["id"]) == {0: 3, 1: 3, 2: 3, 3: 3, 4: 3, 5: 2, 6: 1, 7: 3}


@pytest.mark.parametrize("options", [{"remove_columns": ["text", "label", "id"]}, {}])
def test_map_keeps_every_row_before_its_copies(dataset, options):
    augmented = dataset.map(Augmenter(EDITS, copies=2), batched=True, with_indices=True, **options)
    assert augmented.features == dataset.features
    assert augmented["id"] == sorted(augmented["id"])
    first = {number: list(augmented["id"]).index(number) for number in dataset["id"]}
    assert [augmented[at]["text"] for at in first.values()] == list(dataset["text"])


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3, "num_proc": 2}])
def test_batches_and_processes_change_nothing(dataset, options):
    augmenter = Augmenter(EDITS, copies=2, strength=0.2)
    assert augment_dataset(dataset, augmenter, **options)[:] == augment_dataset(dataset, augmenter)[:]


def test_order_other_columns_and_global_random_numbers_change_nothing(dataset):
    def made(data):
        return sorted(augment_dataset(data, Augmenter(EDITS, copies=2))["text"])

    expected = made(dataset)
    random.seed(5)
    before = random.getstate(), torch.get_rng_state()
    assert made(dataset.shuffle(seed=3).remove_columns(["label"])) == expected
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_seed_decides():
    one, same, other = (copies_of(TEXTS[2], EDITS, copies=3, seed=seed) for seed in (1, 1, 2))
    assert one == same and one != other
    # The same in every process and on every machine.
    assert copies_of("a b c d e é", EDITS, copies=3, seed=1) == ["a b c e d é", "a b e c d e é", "b c d e é"]


def test_calling_does_not_change_the_augmenter():
    augmenter = Augmenter(EDITS)
    before = Hasher.hash(augmenter)
    augmenter({"text": TEXTS})
    assert Hasher.hash(augmenter) == before == Hasher.hash(Augmenter(EDITS))  # datasets finds its cache again


def test_nothing_to_augment():
    data = datasets.Dataset.from_dict({"text": ["", "word"]})
    assert augment_dataset(data, Augmenter(["swap"]))[:] == data[:]
    none = data.select([])
    assert augment_dataset(none, Augmenter(["swap"]), num_proc=2)[:] == none[:]


def test_format_stays(dataset):
    formatted = dataset.with_format("torch", ["text"], output_all_columns=True, dtype=torch.int32)
    augmented = augment_dataset(formatted, Augmenter(["insert"]))
    assert augmented.format == formatted.format and set(augmented[0]) == {"text", "label", "id"}


def test_streams(dataset):
    streamed = dataset.to_iterable_dataset().map(Augmenter(EDITS), batched=True, batch_size=2, with_indices=True)
    assert list(streamed) == list(dataset.map(Augmenter(EDITS), batched=True, with_indices=True))


# --- tagged tokens ------------------------------------------------------------------------------------------------

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def tagged_row(rng, scheme):
    tokens, tags = [], []
    while len(tokens) < 12:
        kind = rng.choice(["O", "O", "O", ".", "PER", "LOC"])
        size = rng.randrange(1, 4) if kind in ("PER", "LOC") else 1
        tokens += ["."] if kind == "." else [f"t{rng.randrange(1000)}" for _ in range(size)]
        if kind in ("O", "."):
            tags.append("O")
        elif scheme == "BIO":
            tags += [f"B-{kind}"] + [f"I-{kind}"] * (size - 1)
        else:
            tags += [kind] * size
    return tokens, tags


def entities(tokens, tags):
    """The naive reading: a B-, or another type than before, begins an entity."""
    found, before = [], "O"
    for token, tag in zip(tokens, tags, strict=True):
        if tag != "O":
            if tag.startswith("B-") or before == "O" or before.split("-")[-1] != tag.split("-")[-1]:
                found.append((tag.split("-")[-1], []))
            found[-1][1].append(token)
        before = tag
    return found


@pytest.mark.parametrize("scheme", ["BIO", "IO"])
@pytest.mark.parametrize("strength", [0.1, 1.0])
@pytest.mark.parametrize("name", EDITS)
def test_entities_survive(name, strength, scheme):
    rng = random.Random(3)
    rows = [tagged_row(rng, scheme) for _ in range(60)]
    batch = {"tokens": [row[0] for row in rows], "ner_tags": [row[1] for row in rows], "id": list(range(60))}
    made = Augmenter([name], copies=3, strength=strength).copies_only(batch)
    assert len(made["id"]) > 80
    for tokens, tags, number in zip(made["tokens"], made["ner_tags"], made["id"], strict=True):
        source, source_tags = rows[number]
        assert len(tokens) == len(tags) and tokens != source
        assert entities(tokens, tags) == entities(source, source_tags)
        outside = [token for token, tag in zip(tokens, tags, strict=True) if tag == "O"]
        source_outside = [token for token, tag in zip(source, source_tags, strict=True) if tag == "O"]
        if name == "swap":
            assert tags == source_tags and Counter(outside) == Counter(source_outside)
        elif name == "delete":
            assert is_part_of(outside, source_outside) and len(tokens) < len(source)
        else:
            assert is_part_of(source_outside, outside) and set(outside) == set(source_outside)
        for before, tag in zip(["O", *tags], tags, strict=False):
            assert not tag.startswith("I-") or before in ("B-" + tag[2:], tag)


ANY_EDIT = [*((name, None) for name in NAMES if name != "mask"), *(("mask", family) for family in FAMILIES)]


def runs_of_entities(tags):
    """How many entity tokens stand side by side, for every place where some do."""
    return [len(run) for run in "".join(" " if tag == "O" else "x" for tag in tags).split()]


@pytest.mark.parametrize("strength", [0.1, 1.0])
@pytest.mark.parametrize(("name", "family"), ANY_EDIT)
def test_entities_and_labels_survive_in_any_sentence(monkeypatch, name, family, strength):
    """300 sentences of words that are hard on edits and tokenizers; tags as strings and as numbers."""
    install_wordnet(monkeypatch)
    rng = random.Random(17)
    rows = [random_sentence(rng, rng.randrange(1, 14)) for _ in range(300)]
    sources = [([rng.choice([token, "quick"]) for token in tokens], tags) for tokens, tags in rows]
    names = ["B-A", "I-A", "O", "B-B-c", "I-B-c"]
    options = {"copies": 2, "strength": strength}
    if family is not None:
        tokenizer = make_tokenizer(family, mask_token="<mask>")
        options |= {
            "model": make_masked_lm(len(tokenizer), 40),
            "tokenizer": tokenizer,
            "top_k": len(tokenizer),
            "batch_size": 64,
        }
    batch = {
        "tokens": [tokens for tokens, _ in sources],
        "ner_tags": [tags for _, tags in sources],
        "label": [n % 3 for n in range(300)],
        "id": [f"row {n}" for n in range(300)],
    }
    made = Augmenter([name], **options).copies_only(batch)
    if family is None:
        numbers = {**batch, "ner_tags": [[names.index(tag) for tag in tags] for tags in batch["ner_tags"]]}
        same = Augmenter([name], outside_tag=names.index("O"), **options).copies_only(numbers)
        assert {**same, "ner_tags": [[names[tag] for tag in tags] for tags in same["ner_tags"]]} == made
    assert len(made["id"]) > 200
    for tokens, tags, label, key in zip(*made.values(), strict=True):
        number = int(key.removeprefix("row "))
        source, source_tags = sources[number]
        assert label == number % 3 and tokens != source and len(tokens) == len(tags)
        inside = [pair for pair in zip(tokens, tags, strict=True) if pair[1] != "O"]
        assert inside == [pair for pair in zip(source, source_tags, strict=True) if pair[1] != "O"]
        assert runs_of_entities(tags) == runs_of_entities(source_tags)  # none is cut, none is joined


def test_entities_only_get_no_copies():
    batch = {"tokens": [["New", "York"], []], "ner_tags": [["B-LOC", "I-LOC"], []]}
    assert Augmenter(EDITS, copies=3)(batch) == batch


def test_numbers_for_tags(dataset):
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=["B-PER", "O"])),
        }
    )
    columns = {"tokens": [["Ada", "was", "here", "."]], "ner_tags": [[0, 1, 1, 1]]}
    data = datasets.Dataset.from_dict(columns, features=features)
    augmented = augment_dataset(data, Augmenter(["swap"]))
    assert augmented.features == features
    assert augmented[1] == {"tokens": ["Ada", "here", "was", "."], "ner_tags": [0, 1, 1, 1]}
    assert Augmenter(["swap"], outside_tag=1)(columns)["tokens"][1] == ["Ada", "here", "was", "."]
    with pytest.raises(ValueError, match="row 0: the tag 0 is a int, but outside_tag='O' is a str. Set outside_tag"):
        Augmenter(["swap"])(columns)
    unnamed = data.cast_column("ner_tags", datasets.Sequence(datasets.ClassLabel(names=["PER", "NONE"])))
    with pytest.raises(ValueError, match=r"No tag of 'ner_tags' is named 'O'; they are \['PER', 'NONE'\]"):
        augment_dataset(unnamed, Augmenter(["swap"]))


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": "swap"}, "names='swap' is not a list of edits"),
        ({"names": []}, "give some of"),
        ({"names": ["swop"]}, r"names=\['swop'\] has 'swop', which is unknown; give some of \['swap', 'delete'"),
        ({"names": ["swap", "swap"]}, "one of them twice"),
        ({"copies": 0}, "copies=0 is not a whole number of at least 1"),
        ({"copies": 1.5}, "copies=1.5"),
        ({"top_k": 0}, "top_k=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": "1"}, "seed='1'"),
        ({"strength": 0}, "strength=0 is not a share"),
        ({"strength": 1.1}, "0 < strength <= 1"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": "high"}, "strength='high'"),
        ({"strength": True}, "strength=True"),
        ({"names": ["mask"]}, "AutoModelForMaskedLM.from_pretrained"),
        ({"model": torch.nn.Linear(1, 1)}, r"used by 'mask', which names=\['swap'\] lacks"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Augmenter(**{"names": ["swap"], **options})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"sentence": ["a b"]}, r"have neither of text \('text'\).*columns are \['sentence'\]. Name yours by text_co"),
        ({"text": ["a"], "tokens": [["a"]], "ner_tags": [["O"]]}, "have both of text .* Remove one of them"),
        ({"text": ["a"], "tokens": [["a"]], "tags": [["O"]]}, "have both of text .* Remove one of them"),
        ({"text": ["a b"], "input_ids": [[1]]}, "'input_ids' is computed from the text .* Augment before tokenizing"),
        ({"text": ["a b"], "teacher_logits": [[1.0]]}, "'teacher_logits' is computed"),
        ({"tokens": [["a"]], "ner_tags": [["O", "O"]]}, "row 7: 1 tokens in 'tokens' have 2 tags"),
        (
            {"tokens": [["a"]], "ner_tags": [["O"]], "pos": [["NN"]]},
            r"row 7: the column 'pos' .*remove_columns\(\['pos'",
        ),
    ],
)
def test_data_are_checked(batch, message):
    with pytest.raises(ValueError, match=message):
        Augmenter(["swap"])(batch, [7])


def test_what_is_not_data():
    with pytest.raises(TypeError, match="row 7: 'text' is None, a NoneType, not a string"):
        Augmenter(["swap"])({"text": [None]}, [7])
    for tokens, tags, message in (
        (None, None, "row 7: 'tokens' is None, a NoneType, not a list. Filter such rows out"),
        (["a"], None, "row 7: 'ner_tags' is None"),
        (["a", None], ["O", "O"], "row 7: the token None in 'tokens' is a NoneType, not a string"),
        (["a"], torch.tensor([0]), r"row 7: 'ner_tags' is tensor.* Use dataset.with_format\(None\)"),
    ):
        with pytest.raises(TypeError, match=message):
            Augmenter(["swap"])({"tokens": [tokens], "ner_tags": [tags]}, [7])
    data = datasets.Dataset.from_dict({"text": TEXTS})
    with pytest.raises(TypeError, match=r"did you mean dataset\['train'\]"):
        augment_dataset(datasets.DatasetDict(train=data), Augmenter(["swap"]))
    with pytest.raises(TypeError, match="A list was given, not a datasets.Dataset; use dataset.map"):
        augment_dataset(TEXTS, Augmenter(["swap"]))
    renamed = data.rename_column("text", "sentence")
    assert len(augment_dataset(renamed, Augmenter(["swap"], text_column="sentence"))) == 2 * len(TEXTS)
