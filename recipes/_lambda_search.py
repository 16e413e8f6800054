"""The whole of the λ search: its arguments, and a run that trains over a grid before it trains the model."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _lambda_path import PATH_NAME, PICTURE_NAME, Point, RegularisationPath
from _recipe import Build, Run, free_memory
from _recipe_args import DataArguments, ModelArguments, RecipeError, RecipeParser, RecipeTrainingArguments
from _recipe_augment import AugmentArguments
from _recipe_launch import agreed, is_main_process, say, sharding
from _recipe_output import check_output_dir, clear_output_dir, drop_checkpoints
from _recipe_predict import PredictArguments
from _textcls import Task, run_parsed
from transformers import Trainer, TrainingArguments

from hf_l2sp import Anchor, L2SPTrainer, L2SPTrainingArguments, drift_report
from hf_l2sp.selection import checked_number

SCHEDULES = ("constant", "linear", "cosine", "auto")
# Folder in the output folder, of the trainings while they run.
_RUNS = "search"


@dataclass
class SearchArguments:
    """Which strengths are tried."""

    lambdas: list[float] = field(
        default_factory=lambda: [0.0, 0.01, 0.1, 1.0],
        metadata={"help": "Values of λ; 0 is plain fine-tuning."},
    )
    schedules: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Courses of λ, each with every value: constant, linear, cosine; auto, once, finds its own. "
            "Default: constant and, where it works, auto."
        },
    )


def search_parser(arguments_class: type[RecipeTrainingArguments], description: str | None) -> RecipeParser:
    """The parser of the recipe, whose training arguments are an `arguments_class`."""
    parts = (ModelArguments, DataArguments, SearchArguments, AugmentArguments, PredictArguments, arguments_class)
    return RecipeParser(parts, description=description)


def run_search(parser: RecipeParser, argv: list[str] | None, task: Task) -> None:
    """Searches λ, trains, evaluates and saves, or predicts alone, as the command line says."""
    model_args, data_args, search_args, *rest = parser.parse(argv)
    settings = rest[-1]
    # Refused, not left out, where somebody asks for it.
    works = settings["l2sp_mode"] == "loss"
    search_args.schedules = search_args.schedules or (["constant", "auto"] if works else ["constant"])
    make_run = functools.partial(SearchRun, points=points_of(search_args))
    run_parsed((model_args, data_args, *rest), task, make_run)


def points_of(search: SearchArguments) -> list[Point]:
    """The trainings of a search, the weakest λ first.

    Raises:
        RecipeError: A value is no strength or no schedule.
    """
    unknown = [name for name in search.schedules if name not in SCHEDULES]
    if unknown or not search.schedules:
        raise RecipeError(f"--schedules {' '.join(unknown)} is unknown; give one or more of {', '.join(SCHEDULES)}.")
    try:
        strengths = sorted({checked_number("--lambdas", value) for value in search.lambdas})
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not strengths and search.schedules != ["auto"]:
        raise RecipeError("--lambdas needs one or more values, such as 0 0.01 0.1 1.")
    points = [
        Point("constant" if strength == 0 else schedule, strength)
        for schedule in search.schedules
        if schedule != "auto"
        for strength in strengths
    ]
    if "auto" in search.schedules:
        points.append(Point("auto", L2SPTrainingArguments.l2sp_lambda))
    return list(dict.fromkeys(points))


def changes_of(point: Point) -> dict[str, Any]:
    """The training arguments of a point."""
    changes: dict[str, Any] = {"l2sp_lambda": point.strength, "l2sp_schedule": point.schedule}
    # They are refused where there is no pull.
    return changes if point.strength > 0 else {**changes, "l2sp_beta": 0.0, "l2sp_fisher_samples": 0}


@dataclass
class SearchRun(Run):
    """A `Run` that chooses its λ: it trains with each of them first, as `--lambdas` says.

    Attributes:
        points: The trainings.
    """

    points: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        resume = str(self.settings["resume_from_checkpoint"] or "no").lower()
        if resume not in ("true", "yes", "false", "no", "none"):
            raise RecipeError(
                f"--resume_from_checkpoint {self.settings['resume_from_checkpoint']!r}: a search goes on from the "
                f"{PATH_NAME} in --output_dir; give the flag alone."
            )
        self.resumes = resume in ("true", "yes")
        self.settings["resume_from_checkpoint"] = None
        if self.settings["compare"] and Point("constant", 0.0) not in self.points:
            self.points.insert(0, Point("constant", 0.0))
        super().__post_init__()
        for point in self.points:  # refused now what would be refused in the middle of the search
            self.settings.build(self.arguments_class, **changes_of(point))

    @property
    def file(self) -> Path:
        return self.output_dir / PATH_NAME

    def _find_checkpoint(self) -> str | None:
        folder = self.args.output_dir
        if self.resumes and not Path(folder, PATH_NAME).is_file():
            raise RecipeError(
                f"--resume_from_checkpoint: --output_dir {folder!r} has no {PATH_NAME} to go on from; leave the flag "
                "out to start anew."
            )
        check_output_dir(folder, self.settings["overwrite_output_dir"], self.resumes, self.reads())
        return None

    def clear(self) -> None:
        super().clear()
        for folder in [*self.output_dir.glob(f"{_RUNS}/*"), self.output_dir / _RUNS]:
            _remove(folder)

    def beside(self, build: Build, datasets: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Trains with every λ that is not finished yet, chooses one, and says and draws what was found."""
        about = self._about(datasets)
        path = agreed(lambda: self._open(about))
        left = [point for point in self.points if point not in path.scores]
        if len(left) < len(self.points):
            say(f"\n{len(self.points) - len(left)} of {len(self.points)} trainings are finished already.")
        for number, point in enumerate(left, start=1):
            say(f"\n{number} of {len(left) + 1}: lambda {point.name}")
            path.add(point, *self._measure(point, build, datasets))
            if is_main_process():
                path.save()
            free_memory()
        metric = self._metric()
        own = self.args.greater_is_better if self.args.metric_for_best_model is not None else None
        best = agreed(lambda: path.best(metric, False if own is False else None))
        if is_main_process():
            path.save(best, metric)
            path.draw(best, metric)
        say(f"\n{path.table(best, metric)}\n* the best by {metric}; written to {self.file} and {PICTURE_NAME}")
        say(f"\n{len(left) + 1} of {len(left) + 1}: the model, with lambda {best.name}")
        self.settings.update(changes_of(best))
        self.args = self.settings.build(self.arguments_class)
        if is_main_process():
            drop_checkpoints(self.output_dir)  # of a model that an earlier run has chosen
        return ({"plain": path.scores[Point("constant", 0.0)]} if self.settings["compare"] else {}), datasets

    def _open(self, about: dict[str, Any]) -> RegularisationPath:
        return RegularisationPath.resumed(self.file, about) if self.resumes else RegularisationPath(self.file, about)

    def _metric(self) -> str:
        name = self.args.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    def _about(self, datasets: dict[str, Any]) -> dict[str, Any]:
        """What decides the scores beside λ."""
        config = {n: v for n, v in self._config().items() if n not in ("l2sp_lambda", "l2sp_schedule")}
        model = self.source.base_model or Path(self.source.path).name
        rows = {split: len(part) for split, part in datasets.items()}
        common = {"model": model, "data": self.data, "seed": self.args.seed, "rows": rows, **self.about}
        return {**common, "texts": _digest(datasets), "config": config}

    def _measure(
        self, point: Point, build: Build, datasets: dict[str, Any]
    ) -> tuple[dict[str, Any], float | None, float | None]:
        """Scores and relative drift of one training, and the λ that it has found if it is auto."""
        # Without a pull the trainer keeps no θ0.
        measured = point.strength == 0 and sharding() is None
        origins: list[Anchor] = []

        def build_measured(trainer_class: type[Trainer], args: TrainingArguments, parts: dict[str, Any]) -> Trainer:
            trainer = build(trainer_class, args, parts)
            if measured:
                origins.append(Anchor.from_model(trainer.model))
            return trainer

        folder = f"{_RUNS}/{point.name.replace(' ', '-')}"
        classes = (L2SPTrainer, L2SPTrainingArguments)
        trainer, scores = self.train_apart(folder, build_measured, *classes, datasets, **changes_of(point))
        report = trainer.l2sp_drift_report() if point.strength > 0 else None
        if origins:
            report = drift_report(trainer.model, origins[0])
        if is_main_process():
            _remove(self.output_dir / folder)
            _remove(self.output_dir / _RUNS)
        found = report.settings["lambda"] if report is not None and point.schedule == "auto" else None
        return scores, None if report is None else report.total.drift, found


def _remove(folder: Path) -> None:
    """Deletes what a training has left, and the folder if nothing else is in it."""
    clear_output_dir(str(folder))
    drop_checkpoints(folder, remove_empty=True)


def _digest(datasets: dict[str, Any]) -> str:
    """Of all rows of all splits: the same texts with the same labels have the same."""
    digest = hashlib.sha256()
    for split, part in datasets.items():
        columns = {name: part[name][:] for name in sorted(part.column_names)}
        digest.update(json.dumps([split, columns]).encode())
    return digest.hexdigest()[:16]
