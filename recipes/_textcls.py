"""What the text classification recipes share: from their arguments to a trained model, its results and predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _recipe import Build, Run, header
from _recipe_args import DataArguments, ModelArguments, RecipeError, RecipeParser, RecipeTrainingArguments, Settings
from _recipe_augment import AugmentArguments, add_copies, make_augmenter
from _recipe_data import (
    Split,
    check_data_arguments,
    cut_note,
    label_order,
    load_splits,
    to_model_order,
    tokenize,
    tokenize_texts,
)
from _recipe_launch import agreed, loss_note, say
from _recipe_model import (
    ModelSource,
    check_task,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    load_trained_model,
)
from _recipe_predict import (
    PredictArguments,
    check_predict_arguments,
    read_texts,
    trainer_to_predict,
    write_predictions,
)
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

from hf_l2sp.augment import Augmenter
from hf_l2sp.metrics import compute_classification_metrics


@dataclass(frozen=True)
class Task:
    """What a text classification recipe is about.

    Attributes:
        title: First line of what a run prints.
        embedded: Folder of the data that come with the recipe.
        data: What the model card calls them.
    """

    title: str
    embedded: Path
    data: str


def textcls_parser(arguments_class: type[RecipeTrainingArguments], description: str | None) -> RecipeParser:
    """The parser of a recipe, whose training arguments are an `arguments_class`."""
    parts = (ModelArguments, DataArguments, AugmentArguments, PredictArguments, arguments_class)
    return RecipeParser(parts, description=description)


def run_textcls(parser: RecipeParser, argv: list[str] | None, task: Task) -> None:
    """The whole of a recipe: trains, evaluates and saves, or predicts alone, as the command line says."""
    run_parsed(parser.parse(argv), task)


def run_parsed(parts: tuple[Any, ...], task: Task, make_run: Callable[..., Run] = Run) -> None:
    """`run_textcls` of arguments that are parsed: those of `textcls_parser`, in its order.

    Args:
        parts: The arguments.
        task: What it is about.
        make_run: Makes the run.
    """
    model_args, data_args, augment_args, predict_args, settings = parts

    # Everything that can be refused is refused here, before any text is tokenized.
    check_data_arguments(data_args)
    check_predict_arguments(predict_args, model_args, data_args, augment_args, settings)
    source = find_model(model_args.model_name_or_path)
    texts = read_texts(predict_args.predict_file, data_args.text_column) if predict_args.predict_file else None
    if predict_args.predict_only:
        trainer = trained(source, data_args.max_seq_length, settings)
    else:
        trainer = train(source, task, data_args, augment_args, settings, make_run)
    if texts is not None and predict_args.predict_output is not None:
        predict(trainer, texts, data_args.max_seq_length, predict_args.predict_output)


# --------------------------------------------------------------------------- training


def train(
    source: ModelSource,
    task: Task,
    data_args: DataArguments,
    augment_args: AugmentArguments,
    settings: Settings,
    make_run: Callable[..., Run] = Run,
) -> Trainer:
    """Trains on the data, writes the output folder, prints the table; returns the trainer with the trained model."""
    data = data_args.dataset_name or ("local" if data_args.train_file else task.data)
    run = make_run(settings, source, "text-classification", data, recorded(data_args, augment_args))
    augmenter = make_augmenter(augment_args, settings["seed"], run.args.device)
    with run.args.main_process_first(desc="loading the data"):  # a dataset on the Hub is fetched once
        splits, notes = load_splits(data_args, task.embedded, settings["seed"])
    names, tokenizer, build = prepare(source, splits["train"].labels, data_args.max_seq_length)
    parameters = run.rehearse(build)
    rows = {split: len(part) for split, part in splits.items()}
    say(header(task.title, run, parameters, rows, names))
    if augmenter is not None:
        splits["train"], note = augmented(splits["train"], augmenter)
        notes.append(note)
    datasets, cut = tokenize(splits, names, tokenizer, data_args.max_seq_length)
    for note in (*notes, cut, loss_note(run.args, rows)):
        if note is not None:
            say(f"  note    {note}")
    return run(build, datasets)


def recorded(data_args: DataArguments, augment_args: AugmentArguments) -> dict[str, Any]:
    """What `comparison.json` records of the data."""
    about: dict[str, Any] = {"shots": data_args.shots, "max_seq_length": data_args.max_seq_length}
    if augment_args.augment:
        about |= {name: getattr(augment_args, name) for name in ("augment", "augment_copies", "augment_strength")}
    return about


def augmented(part: Split, augmenter: Augmenter) -> tuple[Split, str]:
    """The rows and their edited copies, and a note about these."""
    columns, note = add_copies({"text": part.texts, "label": part.labels}, augmenter)
    return Split(part.source, columns["text"], columns["label"]), note


def prepare(source: ModelSource, labels: list[str], max_length: int) -> tuple[list[str], Any, Build]:
    """The distinct labels in the model's order, its tokenizer, and what builds a trainer of a freshly loaded model."""
    config = load_config(source)
    names = to_model_order(label_order(labels), config)
    config = load_config(
        source,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type="single_label_classification",
    )
    tokenizer = load_tokenizer(source, config, max_length)

    def build(trainer_class: type[Trainer], arguments: Any, datasets: dict[str, Any]) -> Trainer:
        set_seed(arguments.seed)  # the new head of both runs of --compare starts from the same values
        model = load_model(AutoModelForSequenceClassification, source, config)
        # Sequence classification heads of transformers 5 take num_items_in_batch and ignore it, and Trainer then
        # does not divide by the accumulation steps: the task gradient would be that many times too large
        # (https://github.com/huggingface/transformers/issues/47688). Remove when that is fixed.
        model.accepts_loss_kwargs = False
        return trainer_class(
            model=model,
            args=arguments,
            train_dataset=datasets["train"],
            eval_dataset=datasets["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_classification_metrics,
        )

    return names, tokenizer, build


# --------------------------------------------------------------------------- predicting


def trained(source: ModelSource, max_length: int, settings: Settings) -> Trainer:
    """A trainer that holds the fine-tuned model in `source` as it is, to predict with.

    Raises:
        RecipeError: it is no text classifier, its head was never trained, or the launch shards models.
    """

    def load() -> tuple[Any, Any, Any]:
        advice = "Give the --output_dir of an earlier run, or train with --train_file."
        model, tokenizer = load_classifier(source, max_length, advice)
        return model, tokenizer, DataCollatorWithPadding(tokenizer)

    return trainer_to_predict(load, settings)


def load_classifier(source: ModelSource, max_length: int, advice: str) -> tuple[Any, Any]:
    """The fine-tuned model in `source` as it is, and its tokenizer; `advice` says what to give instead of another.

    Raises:
        RecipeError: it is no text classifier, or its head was never trained.
    """
    config = load_config(source)
    tokenizer = load_tokenizer(source, config, max_length)
    model = load_trained_model(AutoModelForSequenceClassification, source, config, "classification head", advice)
    check_task(model, source, "text classifier", advice)
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        kind = config.problem_type or "regression"
        raise RecipeError(
            f"{source.flag} {source.shown!r} is a model for {kind} with {config.num_labels} outputs; predictions "
            "are those of a model that gives one of several labels to a text."
        )
    return model, tokenizer


def predict(trainer: Trainer, texts: list[str], max_length: int, output: str) -> None:
    """Writes label and probabilities of every text to `output`, in the order of the texts.

    Raises:
        RecipeError: the model's answers are no numbers, or the file cannot be written.
    """
    say(f"\nPredicting {len(texts)} texts")
    dataset, cut = tokenize_texts(texts, trainer.processing_class, max_length, "the texts to predict")
    note = cut_note({"predicted": cut}, {"predicted": len(texts)}, max_length)
    if note is not None:
        say(f"  note    {note}")
    # Texts of a length share a batch: little padding. The longest come first, so that what is too much fails at once.
    lengths = [len(tokens) for tokens in dataset["input_ids"]]
    order = sorted(range(len(texts)), key=lambda row: -lengths[row])
    # By the trainer, which knows how the model is spread over processes and gathers what they find.
    found = trainer.predict(dataset.select(order), metric_key_prefix="predict").predictions
    logits = torch.as_tensor(found[0] if isinstance(found, tuple) else found).double()
    if not bool(logits.isfinite().all()):
        raise RecipeError(
            "the model's predictions are not finite numbers: its training has diverged; try a lower --learning_rate."
        )
    names = [trainer.model.config.id2label[index] for index in range(logits.shape[-1])]
    rows: list[dict[str, Any]] = [{} for _ in texts]
    for row, probabilities in zip(order, logits.softmax(-1).tolist(), strict=True):
        label = names[max(range(len(names)), key=lambda index: probabilities[index])]
        scores = {name: float(f"{p:.6g}") for name, p in zip(names, probabilities, strict=True)}
        rows[row] = {"text": texts[row], "label": label, "score": scores[label], "scores": scores}
    agreed(lambda: write_predictions(output, rows))
    say(f"Predictions of {len(texts)} texts are written to {output}")
