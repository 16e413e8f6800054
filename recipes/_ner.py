"""What the named-entity recipes share: from their arguments to a trained model, its results and predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _ner_align import prepare_tokenizer, tokenize_ner
from _ner_data import NerDataArguments, check_ner_arguments, load_ner_splits
from _ner_draws import NerSplit
from _ner_extract import tag_names
from _ner_metrics import SentenceMetrics
from _ner_predict import NerPredictArguments, predict_entities, read_unlabelled
from _ner_tags import entity_types, label_names
from _ner_words import word_pattern
from _recipe import Run, header
from _recipe_args import ModelArguments, RecipeParser, RecipeTrainingArguments, Settings
from _recipe_augment import AugmentArguments, add_copies, make_augmenter
from _recipe_data import to_model_order
from _recipe_launch import loss_note, say
from _recipe_model import (
    ModelSource,
    check_task,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    load_trained_model,
)
from _recipe_predict import check_predict_arguments, check_row_order, trainer_to_predict
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    Trainer,
    set_seed,
)


@dataclass(frozen=True)
class NerTask:
    """What a named-entity recipe is about.

    Attributes:
        title: First line of what a run prints.
        embedded: Folder of the data that come with the recipe.
        data: What the model card calls them.
        program: Name of the recipe's file.
    """

    title: str
    embedded: Path
    data: str
    program: str


def ner_parser(arguments_class: type[RecipeTrainingArguments], description: str | None) -> RecipeParser:
    """The parser of a recipe, whose training arguments are an `arguments_class`."""
    parts = (ModelArguments, NerDataArguments, AugmentArguments, NerPredictArguments, arguments_class)
    return RecipeParser(parts, description=description)


def run_ner(parser: RecipeParser, argv: list[str] | None, task: NerTask) -> None:
    """The whole of a recipe: trains, evaluates and saves, or predicts alone, as the command line says."""
    model_args, data_args, augment_args, predict_args, settings = parser.parse(argv)

    # Everything that can be refused is refused here or in what follows before any training.
    check_ner_arguments(data_args)
    check_predict_arguments(predict_args, model_args, data_args, augment_args, settings)
    check_row_order(settings, "the windows of a long sentence are put together again by their place")
    source = find_model(model_args.model_name_or_path)
    unlabelled = read_unlabelled(predict_args.predict_file, data_args) if predict_args.predict_file else None
    if predict_args.predict_only:
        trainer = trained(source, data_args.max_seq_length, settings)
    else:
        trainer = train(source, task, data_args, augment_args, settings)
    if unlabelled is not None and predict_args.predict_output is not None:
        predict_entities(trainer, unlabelled, data_args, predict_args.predict_output)


# --------------------------------------------------------------------------- training


def train(
    source: ModelSource, task: NerTask, data_args: NerDataArguments, augment_args: AugmentArguments, settings: Settings
) -> Trainer:
    """Trains on the data, writes the output folder, prints the table; returns the trainer with the trained model."""
    data = data_args.dataset_name or ("local" if data_args.train_file else task.data)
    about = {name: getattr(data_args, name) for name in ("shots", "max_seq_length", "stride", "label_all_tokens")}
    if augment_args.augment:
        about |= {name: getattr(augment_args, name) for name in ("augment", "augment_copies", "augment_strength")}
    run = Run(settings, source, "token-classification", data, about, ', aggregation_strategy="simple"')
    columns = {"tokens_column": "tokens", "tags_column": "ner_tags"}
    augmenter = make_augmenter(augment_args, settings["seed"], run.args.device, **columns)
    with run.args.main_process_first(desc="loading the data"):  # a dataset on the Hub is fetched once
        splits, notes = load_ner_splits(data_args, task.embedded, settings["seed"])
    pattern = word_pattern(splits["train"].tokens)
    config = load_config(source)
    types = {kind for tags in splits["train"].tags for kind in entity_types(tags)}
    names = to_model_order(label_names(types), config)
    config = load_config(
        source,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    config.word_pattern = pattern  # so that raw text is split into words as the training data are
    tokenizer = load_tokenizer(source, config, data_args.max_seq_length)
    prepare_tokenizer(tokenizer)
    rows = {split: len(part) for split, part in splits.items()}
    if augmenter is not None:
        part = splits["train"]
        copied, note = add_copies({"tokens": part.tokens, "ner_tags": part.tags}, augmenter)
        splits["train"] = NerSplit(part.source, copied["tokens"], copied["ner_tags"])
        notes.append(note)
    datasets, encoded, more = tokenize_ner(splits, names, tokenizer, data_args)
    parts = {split: (encoded[split], splits[split].tags) for split in splits if split != "train"}
    metrics = SentenceMetrics(names, parts)

    def build(trainer_class: type[Trainer], arguments: Any, datasets: dict[str, Any]) -> Trainer:
        set_seed(arguments.seed)  # the new head of both runs of --compare starts from the same values
        model = load_model(AutoModelForTokenClassification, source, config)
        # Token classification heads of transformers 5 take num_items_in_batch and ignore it, and Trainer then does
        # not divide by the accumulation steps: the task gradient would be that many times too large
        # (https://github.com/huggingface/transformers/issues/47688). Remove when that is fixed.
        model.accepts_loss_kwargs = False
        return trainer_class(
            model=model,
            args=arguments,
            train_dataset=datasets["train"],
            eval_dataset=datasets["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            compute_metrics=metrics,
        )

    parameters = run.rehearse(build)
    say(header(task.title, run, parameters, rows, names))
    for note in (*notes, *more, loss_note(run.args, {split: len(part) for split, part in datasets.items()})):
        if note is not None:
            say(f"  note    {note}")
    trainer = run(build, datasets)
    length = data_args.max_seq_length
    say(
        f"In whole words, as in training: {task.program} --predict_only --model_name_or_path {str(run.output_dir)!r} "
        "--predict_file TEXTS.txt --predict_output ENTITIES.jsonl"
        + (f" --max_seq_length {length}" if length != NerDataArguments.max_seq_length else "")
    )
    return trainer


# --------------------------------------------------------------------------- predicting


def trained(source: ModelSource, max_length: int, settings: Settings) -> Trainer:
    """A trainer that holds the fine-tuned model in `source` as it is, to predict with.

    Raises:
        RecipeError: it is no model for named entities, its head was never trained, or the launch shards models.
    """

    def load() -> tuple[Any, Any, Any]:
        config = load_config(source)
        tokenizer = load_tokenizer(source, config, max_length)
        prepare_tokenizer(tokenizer)
        head, advice = "token classification head", "Give the --output_dir of an earlier run of a named-entity recipe."
        model = load_trained_model(AutoModelForTokenClassification, source, config, head, advice)
        check_task(model, source, "token classifier", advice)
        tag_names(config)
        return model, tokenizer, DataCollatorForTokenClassification(tokenizer)

    return trainer_to_predict(load, settings)
