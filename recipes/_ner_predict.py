"""Entities in data without tags: what the named-entity recipes read, ask a trainer about and write."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from _ner_data import NerDataArguments, check_tokens
from _ner_extract import (
    Columns,
    Prediction,
    find_entities,
    most_likely,
    pattern_of,
    words_of_list,
    words_of_text,
)
from _ner_files import CONLL, OTHERS, read_ner_file
from _recipe_args import RecipeError
from _recipe_files import listed, read_file
from _recipe_launch import agreed, say
from _recipe_predict import PredictArguments, read_texts, write_predictions
from transformers import Trainer

from hf_l2sp.entity_scores import IGNORED


@dataclass
class NerPredictArguments(PredictArguments):
    """Data without tags that the fine-tuned model finds the entities in."""

    predict_file: str | None = field(
        default=None,
        metadata={
            "help": "What to find entities in: csv, json, jsonl or parquet with a text column, or txt, one text a "
            "line; or tokens: json, jsonl or parquet with a tokens column, or conll, bio, iob, tsv, whose tags are "
            "not looked at."
        },
    )
    predict_output: str | None = field(
        default=None, metadata={"help": "The .jsonl file that the entities are written to, one line per text."}
    )


@dataclass
class Unlabelled:
    """Raw texts, or sentences as lists of tokens, in the order of the file."""

    texts: list[str] | None
    tokens: list[list[str]]  # of no meaning beside texts

    def __len__(self) -> int:
        return len(self.tokens if self.texts is None else self.texts)


def read_unlabelled(path: str, data: NerDataArguments) -> Unlabelled:
    """The content of `--predict_file`: tokens if it has a column of them or is of a CoNLL form, texts otherwise.

    Raises:
        RecipeError: the file or its column is missing or unreadable, it is empty, or some of it is unfit.
    """
    name, suffix = f"--predict_file {path!r}", Path(path).suffix.lower()
    if suffix in CONLL and suffix != ".txt":
        return _read_tokens(path, name, data)
    if suffix in OTHERS:
        present, _ = read_file(path, (), "--predict_file")
        if data.tokens_column in present:
            return _read_tokens(path, name, data)
        if present and data.text_column not in present:
            raise RecipeError(
                f"{name} has neither a column {data.tokens_column!r} (--tokens_column) nor {data.text_column!r} "
                f"(--text_column); it has {listed(present)}."
            )
    return Unlabelled(read_texts(path, data.text_column), [])


def _read_tokens(path: str, name: str, data: NerDataArguments) -> Unlabelled:
    columns = (data.tokens_column, data.tags_column)
    rows = read_ner_file(path, "--predict_file", columns, data.tag_scheme, tagged=False)
    if not rows:
        raise RecipeError(f"{name} holds no sentences.")
    for row in rows:
        check_tokens(row, name)
    return Unlabelled(None, [row.tokens for row in rows])


def predict_entities(trainer: Trainer, unlabelled: Unlabelled, data: NerDataArguments, output: str) -> None:
    """Writes the entities of every text or sentence to `output`, in the order of the file.

    A line has `text` and `entities`, as `extract` gives them. That of a list of tokens also has `tokens` and their
    `ner_tags`, and its text is the tokens with a space between any two.

    Raises:
        RecipeError: the model's labels are no tags, its answers are no numbers, or the file cannot be written.
    """
    config = trainer.model.config
    if unlabelled.texts is not None:
        pattern, what = pattern_of(config), "texts"
        texts = [words_of_text(text, pattern) for text in unlabelled.texts]
    else:
        what = "sentences"
        texts = [words_of_list(tokens) for tokens in unlabelled.tokens]
    say(f"\nLooking for entities in {len(texts)} {what}")

    def forward(columns: Columns) -> list[list[Prediction]]:
        return _through_trainer(columns, trainer)

    lengths = {"max_length": data.max_seq_length, "stride": data.stride}
    answers = find_entities(texts, config, trainer.processing_class, forward, **lengths)
    rows: list[dict[str, Any]] = []
    for number, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        entities = [{**entity, "score": float(f"{entity['score']:.6g}")} for entity in answer.entities]
        rows.append({"text": text.text, "entities": entities})
        if unlabelled.texts is None:
            rows[-1] |= {"tokens": unlabelled.tokens[number], "ner_tags": answer.tags}
    agreed(lambda: write_predictions(output, rows))
    found = sum(len(answer.entities) for answer in answers)
    say(f"{found} entities in {len(texts)} {what} are written to {output}")


def _through_trainer(columns: Columns, trainer: Trainer) -> list[list[Prediction]]:
    """By the trainer, which knows how the model is spread over processes and gathers what they find."""
    lengths = [len(ids) for ids in columns["input_ids"]]
    # Rows of a length share a batch: little padding. The longest come first, so that what is too much fails at once.
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    dataset = datasets.Dataset.from_dict({name: [values[row] for row in order] for name, values in columns.items()})
    found = trainer.predict(dataset, metric_key_prefix="predict").predictions
    rows: list[list[Prediction]] = [[] for _ in lengths]
    for row, values in zip(order, found[0] if isinstance(found, tuple) else found, strict=True):
        logits = torch.as_tensor(values)
        if trainer.processing_class.padding_side == "left":
            # The batch ends where the filling begins, with which Trainer makes all batches equally long.
            end = int((logits != IGNORED).any(-1).nonzero().max()) + 1
            logits = logits[end - lengths[row] : end]
        logits = logits[: lengths[row]]
        if not bool(logits.isfinite().all()):
            raise RecipeError(
                "the model's answers are not finite numbers: its training has diverged; try a lower --learning_rate."
            )
        rows[row] = most_likely(logits)
    return rows
