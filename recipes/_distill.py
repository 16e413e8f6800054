"""The whole of the distillation recipe: from its arguments to a trained student, its results and predictions."""

from __future__ import annotations

from pathlib import Path

from _distill_args import ENSEMBLE, DistillArguments, check_distill_arguments, load_texts
from _distill_run import DistillRun
from _distill_teachers import load_teachers
from _recipe import header
from _recipe_args import DataArguments, ModelArguments, RecipeError, RecipeParser, RecipeTrainingArguments, Settings
from _recipe_augment import AugmentArguments, make_augmenter
from _recipe_data import check_data_arguments, cut_note, tokenize, tokenize_texts
from _recipe_launch import loss_note, say, sharding
from _recipe_model import ModelSource, find_model
from _recipe_predict import PredictArguments, check_predict_arguments, read_texts
from _textcls import Task, augmented, predict, prepare, recorded, trained
from transformers import Trainer


def distill_parser(arguments_class: type[RecipeTrainingArguments], description: str | None) -> RecipeParser:
    """The parser of the recipe, whose training arguments are an `arguments_class`."""
    parts = (ModelArguments, DataArguments, DistillArguments, AugmentArguments, PredictArguments, arguments_class)
    return RecipeParser(parts, description=description)


def run_distill(parser: RecipeParser, argv: list[str] | None, task: Task) -> None:
    """Distils, evaluates and saves, or predicts alone, as the command line says."""
    model_args, data_args, distill_args, augment_args, predict_args, settings = parser.parse(argv)

    # Everything that can be refused is refused before any training.
    check_data_arguments(data_args)
    check_predict_arguments(predict_args, model_args, data_args, augment_args, settings)
    check_distill_arguments(distill_args, predict_args, settings)
    source = find_model(model_args.model_name_or_path)
    texts = read_texts(predict_args.predict_file, data_args.text_column) if predict_args.predict_file else None
    if predict_args.predict_only:
        trainer = trained(source, data_args.max_seq_length, settings)
    else:
        trainer = distil(source, task, data_args, distill_args, augment_args, settings)
    if texts is not None and predict_args.predict_output is not None:
        predict(trainer, texts, data_args.max_seq_length, predict_args.predict_output)


def distil(
    source: ModelSource,
    task: Task,
    data_args: DataArguments,
    distill_args: DistillArguments,
    augment_args: AugmentArguments,
    settings: Settings,
) -> Trainer:
    """Trains the student, writes the output folder, prints the table; returns the trainer with the student."""
    sources = [find_model(name, "--teacher") for name in distill_args.teacher or []]
    data = data_args.dataset_name or ("local" if data_args.train_file else task.data)
    about = recorded(data_args, augment_args)
    run = DistillRun(settings, source, "text-classification", data, about, distill=distill_args, sources=sources)
    if sharding() is not None:
        raise RecipeError(
            f"teachers are asked as whole models, which {sharding()} cuts up; start in one process or with "
            "recipes/configs/accelerate/ddp.yaml."
        )
    if run.args.distill_alpha == 0:
        raise RecipeError(
            "--distill_alpha 0 leaves the teachers out; give more than 0 and at most 1, or train on the labels alone "
            "with another recipe, such as recipes/medical_textcls.py."
        )
    augmenter = make_augmenter(augment_args, settings["seed"], run.args.device)
    with run.args.main_process_first(desc="loading the data"):  # a dataset on the Hub is fetched once
        splits, unlabelled, notes = load_texts(data_args, distill_args, task.embedded, settings["seed"])
    labels, tokenizer, build = prepare(source, splits["train"].labels, data_args.max_seq_length)
    parameters = run.rehearse(build)
    run.given = load_teachers(sources, labels, data_args.max_seq_length)

    rows = {split: len(part) for split, part in splits.items()}
    shown = {"labelled": rows["train"], "unlabelled": len(unlabelled)} | rows
    del shown["train"]
    say(header(task.title, run, parameters, shown, labels))
    names = [source.shown for source in sources] or [f"{distill_args.ensemble or ENSEMBLE} fine-tuned here"]
    say(f"  teach   {', '.join(names)}")
    if augmenter is not None:
        splits["train"], note = augmented(splits["train"], augmenter)
        notes.append(note)
    datasets, cut = tokenize(splits, labels, tokenizer, data_args.max_seq_length)
    run.unlabelled, count = tokenize_texts(unlabelled, tokenizer, data_args.max_seq_length, "unlabelled")
    also_cut = cut_note({"unlabelled": count}, {"unlabelled": len(unlabelled)}, data_args.max_seq_length)
    for note in (*notes, cut, also_cut, loss_note(run.args, rows)):
        if note is not None:
            say(f"  note    {note}")
    run.labels, run.max_length = labels, data_args.max_seq_length
    run.texts = {split: part.texts for split, part in splits.items()}
    run.texts["train"] = run.texts["train"] + unlabelled
    run.about |= {"shots": data_args.shots, "labelled": len(datasets["train"]), "unlabelled": len(unlabelled)}
    given = [source.base_model or Path(source.path).name for source in sources]
    run.about["teachers"] = given or distill_args.ensemble or ENSEMBLE
    return run(build, datasets)
