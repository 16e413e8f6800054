"""Entities in raw text: their places, agreement with transformers' pipeline, windows, repair."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
    TokenClassificationPipeline,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import TokenClassifierOutput

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

from _ner_align import prepare_tokenizer, tokenize_ner  # noqa: E402
from _ner_data import NerDataArguments  # noqa: E402
from _ner_draws import NerSplit  # noqa: E402
from _ner_extract import extract  # noqa: E402
from _ner_metrics import SentenceMetrics  # noqa: E402
from _ner_tags import label_names  # noqa: E402
from _ner_words import split_words, word_pattern  # noqa: E402
from _recipe_args import RecipeError  # noqa: E402

from tests.ner_tokenizers import FAMILIES, WORDS, make_tokenizer  # noqa: E402

NAMES = label_names(["DRUG", "LOC"])


# --------------------------------------------------------------------------- a model that is known by heart


class Lexicon(torch.nn.Module):
    """Predicts from the sub-word alone, by a table; `scale` makes it more or less sure."""

    def __init__(self, tokenizer: Any, tags: dict[str, str], scale: float = 5.0) -> None:
        super().__init__()
        prepare_tokenizer(tokenizer)
        table = torch.zeros(len(tokenizer), len(NAMES))
        table[:, 0] = scale
        for word, tag in tags.items():
            first = tokenizer([word], is_split_into_words=True, add_special_tokens=False)["input_ids"][0]
            table[first] = 0.0
            table[first, NAMES.index(tag)] = scale
        self.table = torch.nn.Embedding.from_pretrained(table)
        self.config = SimpleNamespace(id2label=dict(enumerate(NAMES)), num_labels=len(NAMES))

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> TokenClassifierOutput:
        assert not self.training
        return TokenClassifierOutput(logits=self.table(input_ids))


def letters() -> PreTrainedTokenizerFast:
    """Every word has a token of its own if it is one of these, and is unknown otherwise; accents are dropped."""
    known = ["<pad>", "<unk>", "<s>", "</s>", "aspirin", "forte", "new", "york", "in", "the", "(", ")", "-", "."]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="$A $B", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


TAGS = {"aspirin": "B-DRUG", "forte": "I-DRUG", "new": "B-LOC", "york": "I-LOC"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  \n", []),
        ("in the", []),
        ("Aspirin  forte (New\u00a0York).", [("DRUG", "Aspirin  forte"), ("LOC", "New\u00a0York")]),
        ("aspirin aspirin forte", [("DRUG", "aspirin"), ("DRUG", "aspirin forte")]),
        ("forte york york", [("DRUG", "forte"), ("LOC", "york york")]),  # I- that continues nothing opens
        ("aspirin york in forte", [("DRUG", "aspirin"), ("LOC", "york"), ("DRUG", "forte")]),
        ("👩‍⚕️ in 北京 NEW (york", [("LOC", "NEW"), ("LOC", "york")]),
        ("new \u0301 york", [("LOC", "new \u0301 york")]),  # the model does not see the accent between them
        ("in \u0301 york \u0301 in", [("LOC", "york")]),  # nor those around it: they are left out
        ("\u0301 \u0301", []),
    ],
)
def test_entities_are_where_they_are_said_to_be(text: str, expected: list[tuple[str, str]]) -> None:
    tokenizer = letters()
    model = Lexicon(tokenizer, TAGS)
    model.train()
    entities = extract(text, model, tokenizer)
    assert [(entity["entity_group"], entity["word"]) for entity in entities] == expected
    assert model.training
    sure = torch.softmax(torch.tensor([5.0, 0, 0, 0, 0]), 0)[0].item()
    for entity in entities:
        assert text[entity["start"] : entity["end"]] == entity["word"]
        assert entity["score"] == pytest.approx(sure) and type(entity["score"]) is float
    assert list(entities[0]) == ["entity_group", "score", "word", "start", "end"] if entities else True


def test_several_texts_are_answered_in_their_order() -> None:
    tokenizer = letters()
    model = Lexicon(tokenizer, TAGS)
    texts = ["in the", "", "new york " * 30, "aspirin", "the aspirin forte"] * 2
    together = extract(texts, model, tokenizer, batch_size=3, max_length=12, stride=4)
    assert together == [extract(text, model, tokenizer) for text in texts]
    assert [len(entities) for entities in together] == [0, 0, 30, 1, 1] * 2
    assert extract([], model, tokenizer) == []


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_windows_and_batches_change_nothing_where_context_does_not_matter(family: str, side: str) -> None:
    tokenizer = make_tokenizer(family, padding_side=side)
    tags = {"aspirin": "B-DRUG", "given": "I-DRUG", "city": "B-LOC", "state": "I-LOC", "我": "B-LOC"}
    model = Lexicon(tokenizer, tags)
    rng = random.Random(family)
    texts = [
        rng.choice([" ", ""]).join(rng.choice([*WORDS, *tags]) + rng.choice(" \n") for _ in range(rng.randint(1, 90)))
        for _ in range(8)
    ]
    whole = extract(texts, model, tokenizer, max_length=4000)
    assert sum(map(len, whole)) > 30
    for max_length, stride, batch_size in [(40, 10, 3), (12, 5, 32), (9, 0, 1)]:
        found = extract(texts, model, tokenizer, max_length=max_length, stride=stride, batch_size=batch_size)
        assert found == whole
    for text, entities in zip(texts, whole, strict=True):
        places = dict(split_words(text))
        ends = set(places.values())
        for entity in entities:
            assert text[entity["start"] : entity["end"]] == entity["word"]
            assert entity["start"] in places and entity["end"] in ends  # whole words
        assert [e["end"] <= f["start"] for e, f in zip(entities, entities[1:], strict=False)].count(False) == 0


def test_the_pattern_of_the_training_data_is_found_in_the_configuration() -> None:
    tokenizer = letters()
    model = Lexicon(tokenizer, {"new": "B-LOC"})
    text = "new-york"
    assert [entity["word"] for entity in extract(text, model, tokenizer)] == ["new"]
    model.config.word_pattern = word_pattern([["a-b"]] * 2)
    assert [entity["word"] for entity in extract(text, model, tokenizer)] == ["new-york"]
    assert [entity["word"] for entity in extract(text, model, tokenizer, pattern=r"\w+")] == ["new"]


def test_labels_that_are_no_tags_are_refused() -> None:
    tokenizer = letters()
    model = Lexicon(tokenizer, {})
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    model.config.num_labels = 2
    with pytest.raises(RecipeError, match=r"the labels of the model are no IOB2 tags: 'LABEL_0', 'LABEL_1'; is it"):
        extract("a", model, tokenizer)


# --------------------------------------------------------------------------- transformers' pipeline


@pytest.mark.parametrize("seed", range(4))
def test_entities_equal_those_of_the_pipeline_where_every_word_is_one_sub_word(seed: int) -> None:
    """There "simple" aggregation over sub-words is one over words, and both must agree in all but the spelling."""
    tokenizer = letters()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=len(NAMES),
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
        initializer_range=1.0,
        max_position_embeddings=200,
    )
    model = BertForTokenClassification(config).eval()
    pipeline = TokenClassificationPipeline(
        model=model, tokenizer=tokenizer, aggregation_strategy="simple", device="cpu"
    )
    rng = random.Random(seed)
    words = ["Aspirin", "forte", "New", "YORK", "in", "the", "(", ")", "-", ".", "other", "é"]
    texts = [
        "".join(rng.choice(words) + rng.choice([" ", " ", "\n", "  "]) for _ in range(rng.randint(1, 60)))
        for _ in range(12)
    ]
    total = 0
    for text in texts:
        own, theirs = extract(text, model, tokenizer, max_length=200), pipeline(text)
        assert [(e["entity_group"], e["start"], e["end"]) for e in own] == [
            (e["entity_group"], e["start"], e["end"]) for e in theirs
        ]
        assert [e["score"] for e in own] == pytest.approx([float(e["score"]) for e in theirs], rel=1e-5)
        assert [e.keys() for e in own] == [e.keys() for e in theirs]
        assert all(text[e["start"] : e["end"]] == e["word"] for e in own)  # as it stands there: the pipeline lowers it
        total += len(own)
    assert total > 20
    assert len({e["entity_group"] for text in texts for e in pipeline(text)}) == 2


# --------------------------------------------------------------------------- all parts together


def test_a_model_trained_on_windows_is_scored_by_sentence_and_finds_entities_in_text(tmp_path: Path) -> None:
    tokenizer = letters()
    rng = random.Random(0)
    kinds = [["aspirin"], ["aspirin", "forte"], ["new", "york"]]

    def split(n_sentences: int) -> NerSplit:
        part = NerSplit("x", [], [])
        for _ in range(n_sentences):
            tokens, tags = ["the"], ["O"]
            for _ in range(rng.randint(1, 12)):
                words = rng.choice([*kinds, rng.sample(["in", "the", "(", ")", ","], 3)])
                kind = {"aspirin": "DRUG", "new": "LOC"}.get(words[0])
                tokens += words
                tags += ["O"] * 3 if kind is None else [f"B-{kind}", *[f"I-{kind}"] * (len(words) - 1)]
            part.tokens.append(tokens)
            part.tags.append(tags)
        return part

    splits = {"train": split(150), "validation": split(21), "test": split(10)}
    data = NerDataArguments(max_seq_length=14, stride=4)
    datasets, encoded, notes = tokenize_ner(splits, NAMES, tokenizer, data)
    assert encoded["validation"].split and encoded["test"].split and len(notes) == 3
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
        word_pattern=word_pattern(splits["train"].tokens),
    )
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        max_steps=60,
        learning_rate=2e-2,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        BertForTokenClassification(config),
        arguments,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=SentenceMetrics(
            NAMES, {name: (encoded[name], splits[name].tags) for name in ("validation", "test")}
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    scores = trainer.evaluate()
    assert scores["eval_f1"] == scores["eval_DRUG_f1"] == scores["eval_f1_macro"] == 1.0
    assert trainer.predict(datasets["test"]).metrics["test_recall"] == 1.0
    trainer.save_model()
    loaded = BertForTokenClassification.from_pretrained(tmp_path)
    assert loaded.config.word_pattern == word_pattern()
    text = "The aspirin\nforte in (New York), " * 3
    found = extract(text, loaded, tokenizer, max_length=14, stride=4)
    assert [entity["word"] for entity in found] == ["aspirin\nforte", "New York"] * 3
    assert min(entity["score"] for entity in found) > 0.9
