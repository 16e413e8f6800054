"""Predictions for unlabelled texts in the recipes: arguments, their checks, the texts read and the answers written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _recipe_args import DataArguments, ModelArguments, RecipeError, Settings
from _recipe_augment import AugmentArguments
from _recipe_data import check_texts
from _recipe_files import read_file
from _recipe_launch import launched_arguments, sharding
from transformers import Trainer, TrainingArguments


@dataclass
class PredictArguments:
    """Unlabelled texts that the fine-tuned model is asked about."""

    predict_file: str | None = field(
        default=None,
        metadata={"help": "Texts to predict: csv, json, jsonl or parquet with a text column, or txt, one a line."},
    )
    predict_output: str | None = field(
        default=None, metadata={"help": "The .jsonl file that the predictions are written to, one line per text."}
    )
    predict_only: bool = field(
        default=False,
        metadata={"help": "No training: predict with the fine-tuned model that --model_name_or_path names."},
    )


def check_predict_arguments(
    predict: PredictArguments,
    model: ModelArguments,
    data: DataArguments,
    augment: AugmentArguments,
    settings: Settings,
) -> None:
    """Raises `RecipeError` for prediction arguments that contradict others, or an output that cannot be written."""
    if predict.predict_only and predict.predict_file is None:
        raise RecipeError("--predict_only needs --predict_file IN --predict_output OUT.jsonl: what to predict.")
    if predict.predict_file is None and predict.predict_output is None:
        return
    if predict.predict_file is None or predict.predict_output is None:
        given, missing = ("output", "file") if predict.predict_file is None else ("file", "output")
        value = getattr(predict, f"predict_{given}")
        raise RecipeError(f"--predict_{given} {value!r} needs --predict_{missing} beside it.")
    check_row_order(settings, "every answer belongs to the text in its place")
    if predict.predict_only:
        _check_predict_only(model, data, augment, settings)
    read = {"predict_file": predict.predict_file}
    read |= {flag: getattr(data, flag) for flag in ("train_file", "validation_file", "test_file")}
    _check_output(Path(predict.predict_output), read, settings["overwrite_output_dir"])


def check_row_order(settings: Settings, why: str) -> None:
    """Raises `RecipeError` for arguments with which Trainer evaluates some rows only, or in an order of its own."""
    unfit = {
        "--group_by_length": settings.get("group_by_length"),  # transformers 4
        "--train_sampling_strategy group_by_length": settings.get("train_sampling_strategy") == "group_by_length",
        "--dataloader_drop_last": settings["dataloader_drop_last"],
        "--batch_eval_metrics": settings["batch_eval_metrics"],
        "--eval_do_concat_batches false": not settings["eval_do_concat_batches"],
    }
    for flag, given in unfit.items():
        if given:
            raise RecipeError(
                f"{flag} changes what Trainer evaluates: all rows are needed at once and in their order, since {why}; "
                "leave it out."
            )


def _check_predict_only(
    model: ModelArguments, data: DataArguments, augment: AugmentArguments, settings: Settings
) -> None:
    if model.model_name_or_path is None:
        raise RecipeError(
            "--predict_only needs --model_name_or_path: the folder of a fine-tuned model, such as the --output_dir of "
            "an earlier run. The embedded model is not trained for the task."
        )
    flags = ("train_file", "validation_file", "test_file", "dataset_name", "shots")
    given = {flag: getattr(data, flag) for flag in flags} | {"augment": augment.augment}
    given |= {flag: settings[flag] for flag in ("compare", "resume_from_checkpoint", "push_to_hub")}
    for flag, value in given.items():
        if value not in (None, False):
            raise RecipeError(f"--predict_only trains nothing, so --{flag} contradicts it; leave one of the two out.")


def _check_output(output: Path, read: dict[str, str | None], overwrite: bool) -> None:
    name = f"--predict_output {str(output)!r}"
    if output.suffix.lower() != ".jsonl":
        raise RecipeError(
            f"{name} has the extension {output.suffix!r}; predictions are JSON lines: name a .jsonl file."
        )
    if output.is_dir():
        raise RecipeError(f"{name} is a folder; name a file in it.")
    for flag, path in read.items():
        if path is not None and Path(path).resolve() == output.resolve():
            raise RecipeError(f"{name} is also the --{flag}, which would be lost; name another file.")
    if output.exists() and not overwrite:
        raise RecipeError(f"{name} exists; name another file, or add --overwrite_output_dir to replace it.")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise RecipeError(f"{name} cannot be written: {str(folder)!r} is not a folder that may be written to.")


def trainer_to_predict(load: Callable[[], tuple[Any, Any, Any]], settings: Settings) -> Trainer:
    """A trainer that holds a fine-tuned model as it is.

    Args:
        load: Gives the model, its tokenizer and the data collator of the task.
        settings: Values of the training arguments.

    Raises:
        RecipeError: the launch shards models, or as `load` does.
    """
    with tempfile.TemporaryDirectory() as folder:  # Trainer makes its output folder, which stays empty
        nothing = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
        args = launched_arguments(settings, TrainingArguments, output_dir=folder, **nothing)
        if sharding() is not None:
            raise RecipeError(
                f"--predict_only does not go with {sharding()}; start it in one process or with "
                "recipes/configs/accelerate/ddp.yaml."
            )
        model, tokenizer, collator = load()
        return Trainer(model=model, args=args, processing_class=tokenizer, data_collator=collator)


def read_texts(path: str, text_column: str) -> list[str]:
    """The texts of `--predict_file`, in its order.

    Raises:
        RecipeError: the file or its column is missing or unreadable, it has no texts, or some are unfit (with their
            rows).
    """
    return check_texts(
        read_file(path, (text_column,), "--predict_file", lines=True), f"--predict_file {path!r}", text_column
    )


def write_predictions(path: str, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line, whole or not at all; the folder is made if need be.

    Raises:
        RecipeError: it cannot be written.
    """
    output = Path(path)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RecipeError(f"--predict_output {path!r} cannot be written: {error}.") from error
