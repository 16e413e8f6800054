"""What the named-entity recipes come with: data that are as their README says, a configuration, defaults."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from hf_l2sp.entity_scores import entity_spans

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

import clinical_ner  # noqa: E402
import finance_ner  # noqa: E402
from _ner_data import check_ner_arguments, load_ner_splits  # noqa: E402
from _ner_draws import NerSplit  # noqa: E402
from _ner_words import split_words, word_pattern  # noqa: E402
from _recipe_args import RecipeTrainingArguments  # noqa: E402

SIZES = {"train": 90, "validation": 30, "test": 90}
MODULES = {"clinical_ner": clinical_ner, "finance_ner": finance_ner}


@pytest.fixture(params=MODULES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def splits(name: str) -> dict[str, NerSplit]:
    """As the recipe reads them without arguments, which refuses what is no IOB2."""
    _, data, *_ = MODULES[name].make_parser().parse([])
    check_ner_arguments(data)
    splits, notes = load_ner_splits(data, MODULES[name].EMBEDDED_DATA, seed=0)
    assert notes == []
    return splits


def entities(split: NerSplit) -> Counter[tuple[str, str]]:
    return Counter(
        (kind, " ".join(tokens[first:end]).lower())
        for tokens, tags in zip(split.tokens, split.tags, strict=True)
        for kind, first, end in entity_spans(tags)
    )


def test_no_sentence_is_found_twice(splits: dict[str, NerSplit]) -> None:
    assert {split: len(part) for split, part in splits.items()} == SIZES
    sentences = [re.sub(r"\W+", " ", " ".join(tokens)).lower() for part in splits.values() for tokens in part.tokens]
    assert len(set(sentences)) == len(sentences) == sum(SIZES.values())
    for split in splits.values():
        assert all(token and not re.search(r"\s", token) for tokens in split.tokens for token in tokens)


def test_no_entity_of_the_test_split_is_a_training_entity(splits: dict[str, NerSplit]) -> None:
    assert not {text for _, text in entities(splits["train"])} & {text for _, text in entities(splits["test"])}


def test_the_readme_counts_right(name: str, splits: dict[str, NerSplit]) -> None:
    text = (MODULES[name].EMBEDDED_DATA / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w ]+) \| (\d+) \| (\d+) \| (\d+) \|$", text, flags=re.MULTILINE)
    told = {kind: [int(count) for count in counts] for kind, *counts in rows}
    found = {kind: [0, 0, 0] for kind in told}
    for column, split in enumerate(splits.values()):
        for (kind, _), count in entities(split).items():
            found[kind][column] += count
        found["sentences without an entity"][column] = sum(not kinds for kinds in split.types())
    assert told == found and len(told) > 4
    lengths = [len(tokens) for split in splits.values() for tokens in split.tokens]
    assert f"{min(lengths)} to {max(lengths)} tokens each" in " ".join(text.split())
    assert "CC0 1.0" in text and text.count("210 sentences") == 1


def test_raw_text_is_split_as_the_sentences_are(splits: dict[str, NerSplit]) -> None:
    """Of the sentences that no expression was made from, nearly every token comes back from the joined text."""
    pattern = word_pattern(splits["train"].tokens)
    back = total = 0
    for tokens in splits["test"].tokens:
        text = " ".join(tokens)
        found = Counter(text[start:end] for start, end in split_words(text, pattern))
        back += (found & Counter(tokens)).total()
        total += len(tokens)
    assert back / total > 0.99


def test_the_configuration_beside_the_recipe_is_read(name: str) -> None:
    path = RECIPES / "configs" / f"{name}.yaml"
    _, data, _, predict, settings = MODULES[name].make_parser().parse(["--config", str(path)])
    check_ner_arguments(data)
    for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        values = [getattr(part, key) for part in (data, predict) if hasattr(part, key)]
        if key in settings:
            values.append(settings[key])
        if key != "model_name_or_path":
            assert [found == type(found)(value) for found in values] == [True], key
    assert settings["metric_for_best_model"] == "f1"


def test_the_docstring_names_the_defaults(name: str) -> None:
    *_, settings = MODULES[name].make_parser().parse([])
    (arguments_class,) = (
        part
        for part in vars(MODULES[name]).values()
        if isinstance(part, type) and part.__module__ == name and issubclass(part, RecipeTrainingArguments)
    )
    told = dict(re.findall(r"^ {8}(\w+) \(`\w+`, defaults to `(.+?)`\)", arguments_class.__doc__, flags=re.MULTILINE))
    assert {key: str(settings[key]) for key in told} == {key: str(eval(value)) for key, value in told.items()}
    assert set(told) == {"output_dir", "learning_rate", "num_train_epochs", "per_device_train_batch_size"}
