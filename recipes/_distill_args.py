"""Distillation in the recipes: its arguments, their checks, and which texts are labelled and which are not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from _recipe_args import DataArguments, RecipeError, Settings
from _recipe_data import Split, check_texts, draw_shots, load_splits
from _recipe_files import listed, read_file
from _recipe_predict import PredictArguments

# Of the data that come with the recipe, whose other training texts are then taken without their labels.
EMBEDDED_SHOTS = 8
ENSEMBLE = 3
TEACHER_EPOCHS = 12.0


@dataclass
class DistillArguments:
    """Who teaches, and on which texts beside the labelled ones."""

    teacher: list[str] | None = field(
        default=None,
        metadata={
            "help": "Fine-tuned text classifiers with the same labels: folders or Hub ids, one or several. Default: "
            "an ensemble that is fine-tuned here."
        },
    )
    ensemble: int | None = field(
        default=None,
        metadata={
            "help": "Without --teacher: how many teachers are fine-tuned on the labelled texts, with the seeds seed, "
            f"seed + 1, ... Default: {ENSEMBLE}."
        },
    )
    teacher_epochs: float | None = field(
        default=None,
        metadata={"help": f"Passes of each of them over the labelled texts. Default: {TEACHER_EPOCHS:g}."},
    )
    keep_teachers: bool = field(
        default=False, metadata={"help": "Keep them in OUTPUT_DIR/teachers, where --teacher takes them from later."}
    )
    unlabelled_file: str | None = field(
        default=None,
        metadata={
            "help": "Texts without labels: csv, json, jsonl or parquet with a text column, or txt, one a line. "
            "Default: the training texts that --shots leaves out."
        },
    )


def check_distill_arguments(distill: DistillArguments, predict: PredictArguments, settings: Settings) -> None:
    """Raises `RecipeError` for distillation arguments that contradict others or are out of range."""
    given = {f.name: getattr(distill, f.name) for f in dataclasses.fields(distill)}
    given = {name: value for name, value in given.items() if value not in (None, False)}
    if predict.predict_only and given:
        raise RecipeError(
            f"--predict_only trains nothing, so --{next(iter(given))} contradicts it; leave one of the two out."
        )
    if distill.teacher is not None:
        for name in ("ensemble", "teacher_epochs", "keep_teachers"):
            if name in given:
                raise RecipeError(f"--{name} is for teachers that are fine-tuned here, and --teacher names others.")
        twice = sorted({name for name in distill.teacher if distill.teacher.count(name) > 1})
        if twice or not distill.teacher:
            raise RecipeError(f"--teacher names {listed(twice) if twice else 'none'}; name each teacher once.")
    if distill.keep_teachers and settings["push_to_hub"]:
        raise RecipeError(
            "--push_to_hub uploads all of the output folder, and --keep_teachers puts the teachers there; leave one "
            "of the two out."
        )
    if distill.ensemble is not None and distill.ensemble < 1:
        raise RecipeError(f"--ensemble {distill.ensemble} must be at least 1.")
    if distill.teacher_epochs is not None and not distill.teacher_epochs > 0:  # also not NaN
        raise RecipeError(f"--teacher_epochs {distill.teacher_epochs:g} must be more than 0.")


def load_texts(
    data: DataArguments, distill: DistillArguments, embedded: Path, seed: int
) -> tuple[dict[str, Split], list[str], list[str]]:
    """Loads and checks the labelled splits and the unlabelled texts; draws the shots, which `data` then names.

    Returns:
        The splits, the unlabelled texts, and notes about what was decided on the way.

    Raises:
        RecipeError: the data are missing, unreadable or unfit for training, or there are no unlabelled texts.
    """
    if data.shots is None and data.train_file is None and data.dataset_name is None:
        data.shots = EMBEDDED_SHOTS
    if distill.unlabelled_file is not None:
        path, source = distill.unlabelled_file, f"--unlabelled_file {distill.unlabelled_file!r}"
        table = read_file(path, (data.text_column,), "--unlabelled_file", lines=True)
        found = check_texts(table, source, data.text_column)
        splits, notes = load_splits(data, embedded, seed)
    else:
        splits, notes = load_splits(dataclasses.replace(data, shots=None), embedded, seed)
        source, found = "the training texts", splits["train"].texts
        if data.shots is not None:
            splits["train"] = draw_shots(splits["train"], data.shots, seed)
            notes.append(
                f"--shots {data.shots}: the labels of {len(splits['train'])} rows, drawn by seed {seed}, are used; "
                "the other training texts are taken without theirs."
            )
    labelled = set(splits["train"].texts)
    texts = [text for text in dict.fromkeys(found) if text not in labelled]
    if not texts:
        raise RecipeError(
            f"{source}: there are no unlabelled texts, none beside the {len(labelled)} labelled ones. Give some with "
            "--unlabelled_file, or with --shots K the labels of K rows per class only."
        )
    if distill.unlabelled_file is not None:
        if len(texts) < len(found):
            notes.append(f"{len(found) - len(texts)} of the unlabelled texts are there already; they are left out.")
        for split in ("validation", "test"):
            shared = len(set(texts) & set(splits[split].texts)) if split in splits else 0
            if shared:
                notes.append(f"{shared} {split} texts are unlabelled texts too; results on them flatter the model.")
    return splits, texts, notes
