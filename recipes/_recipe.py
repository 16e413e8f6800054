"""What the recipes share: the way from arguments to a trained, evaluated and saved model."""

from __future__ import annotations

import gc
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from _recipe_args import RecipeError, Settings
from _recipe_launch import agreed, check_layers, is_main_process, launched_arguments, say
from _recipe_model import ModelSource, find_model, quiet_loading
from _recipe_output import (
    check_output_dir,
    clear_output_dir,
    comparison,
    drop_checkpoints,
    find_checkpoint,
    lower_is_better,
    result_table,
    write_json,
    write_report,
)
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_model_param_count

import hf_l2sp
from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.publish import PushError
from hf_l2sp.run_record import describe_predictions

Build = Callable[[type[Trainer], TrainingArguments, dict[str, Any]], Trainer]


@dataclass
class Run:
    """Trains, evaluates and saves; made before anything is loaded, so that the output folder is checked first.

    Attributes:
        settings: Values of the training arguments.
        source: Where the model comes from.
        task: Name of the task's pipeline.
        data: The data as the model card names them, without paths.
        about: What `comparison.json` records beside the training arguments.
        options: Further arguments of the pipeline, as the line names them that says how to use the result.

    Raises:
        RecipeError: a training argument is wrong or the output folder is in use.
    """

    # What a recipe that trains in another way has in their place.
    trainer_class = L2SPTrainer
    arguments_class = L2SPTrainingArguments

    settings: Settings
    source: ModelSource
    task: str
    data: str
    about: dict[str, Any]
    options: str = ""

    def __post_init__(self) -> None:
        self.predictions: dict[str, Any] = {}  # what the report tells of them, by split
        # Pushed once, when all files are written: Trainer would push from within save_model, before the report.
        self.push = self.settings["push_to_hub"]
        self.settings["push_to_hub"] = False
        if self.push and not self.settings["hub_model_id"]:
            self.settings["hub_model_id"] = Path(self.settings["output_dir"]).absolute().name
        self.args = launched_arguments(self.settings, self.arguments_class)
        self.output_dir = Path(self.args.output_dir)
        self.checkpoint = agreed(self._find_checkpoint)
        if self.l2sp_on and importlib.util.find_spec("matplotlib") is None:
            raise RecipeError("the report is drawn with matplotlib: pip install 'hf-l2sp[recipes]'.")

    def _find_checkpoint(self) -> str | None:
        checkpoint = find_checkpoint(self.settings["resume_from_checkpoint"], self.args.output_dir)
        check_output_dir(self.args.output_dir, self.settings["overwrite_output_dir"], checkpoint, self.reads())
        return checkpoint

    def reads(self) -> tuple[str | None, ...]:
        """Folders that the run reads models from."""
        return self.source.path, self.args.l2sp_anchor

    @property
    def l2sp_on(self) -> bool:
        return self.args.l2sp_lambda > 0

    def rehearse(self, build: Build) -> int:
        """Refuses now what the trainers would refuse later, after minutes of plain training; counts the parameters.

        Args:
            build: `(trainer class, arguments, datasets) -> trainer`, of a freshly loaded, equally initialised model.

        Raises:
            RecipeError: the model, L2-SP or the Hub refuse.
        """
        if self.args.l2sp_anchor is not None:
            find_model(self.args.l2sp_anchor, "--l2sp_anchor")
        with tempfile.TemporaryDirectory() as folder:
            args = self.settings.build(self.arguments_class, output_dir=folder, report_to="none")
            try:
                trainer = build(self.trainer_class, args, {"train": [], "validation": []})
                check_layers(trainer.model)
                if self.l2sp_on:
                    with quiet_loading():
                        trainer.create_optimizer()
            except (OSError, ValueError) as error:
                raise RecipeError(str(error)) from error
            if self.push:
                agreed(lambda: self._create_repository(trainer))
        return get_model_param_count(trainer.model)

    def _create_repository(self, trainer: Trainer) -> None:
        try:
            trainer.init_hf_repo()
        except Exception as error:  # network, login and permission errors have no common class
            raise RecipeError(
                f"--push_to_hub: the repository {self.args.hub_model_id!r} cannot be created: {error}. Log in with "
                "'hf auth login', or leave the flag out."
            ) from error

    def __call__(self, build: Build, datasets: dict[str, Any]) -> Trainer:
        """Trains on `train`, evaluates on all other splits, writes the output folder, prints the table.

        Args:
            build: `(trainer class, arguments, datasets) -> trainer`, of a freshly loaded, equally initialised model.
            datasets: `train`, `validation`, perhaps `test`; scores on any other split begin with its name.

        Returns:
            The trainer of the L2-SP run, with the trained model.
        """
        gc.collect()  # the model of the rehearsal
        if self.settings["overwrite_output_dir"]:
            agreed(self.clear)
        results, datasets = self.beside(build, datasets)
        # Anew for each trainer: this resets what the one before left in accelerate, on which DeepSpeed insists.
        trainer = build(self.trainer_class, self.settings.build(self.arguments_class), datasets)
        described = self.predictions if self.task == "text-classification" else None
        results[self.column()] = _train_and_score(trainer, datasets, self.checkpoint, described)
        card = self._save(trainer, results)
        table = result_table(results, difference=self.settings["compare"])
        say(f"\n{self.headline()}\n\n{table}\n(lower is better for {lower_is_better(results)})")
        say(f"\nWritten to {self.output_dir}: the model, README.md (model card), all_results.json")
        if self.l2sp_on:
            say("and l2sp_report.html: scores, training and how far each layer moved from the pretrained weights.")
        say(f'Use it: transformers.pipeline("{self.task}", model="{self.output_dir}"{self.options})')
        # The launcher ends all processes when one fails, be it in leaving: none leaves before the results are written.
        trainer.accelerator.wait_for_everyone()
        if self.push:
            self._push(trainer, card)
        return trainer

    def column(self) -> str:
        """What the table calls the model of the run."""
        return "L2-SP" if self.l2sp_on else "lambda 0"

    def clear(self) -> None:
        """Deletes what an earlier run wrote."""
        clear_output_dir(self.args.output_dir)

    def beside(self, build: Build, datasets: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """What is trained before the model: with `--compare` plain `Trainer`.

        Returns:
            Its scores, by column of the table, and the datasets for the model.
        """
        if not self.settings["compare"]:
            return {}, datasets
        say("\n1 of 2: plain Trainer")
        _, scores = self.train_apart("plain", build, Trainer, TrainingArguments, datasets)
        free_memory()
        say("\n2 of 2: L2-SP")
        return {"plain": scores}, datasets

    def train_apart(
        self,
        name: str,
        build: Build,
        trainer_class: type[Trainer],
        arguments_class: type[TrainingArguments],
        datasets: dict[str, Any],
        **changes: Any,
    ) -> tuple[Trainer, dict[str, Any]]:
        """Trains and scores another model with the same arguments but for `changes`.

        It has the folder `name` in the output folder, where its checkpoints do not outlive it.
        """
        folder = self.output_dir / name
        if not self.args.load_best_model_at_end:
            changes["save_strategy"] = "no"
        trainer = build(
            trainer_class, self.settings.build(arguments_class, output_dir=str(folder), **changes), datasets
        )
        scores = _train_and_score(trainer, datasets, None)
        if is_main_process():
            drop_checkpoints(folder, remove_empty=True)
        return trainer, scores

    def _save(self, trainer: Trainer, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        trainer.save_model()
        trainer.save_state()
        (*_, metrics) = results.values()
        if is_main_process():
            write_json(self.output_dir / "all_results.json", metrics)  # the card tells its scores
        card = {"finetuned_from": self.source.base_model, "license": self.source.licence}
        card |= {"tasks": self.task, "dataset": self.data}
        trainer.create_model_card(**card)
        # Asked of every process: where the model is sharded, each of them knows a part.
        report = trainer.l2sp_drift_report() if self.l2sp_on else None
        if not is_main_process():
            return card
        if self.settings["compare"]:
            model = self.source.base_model or Path(self.source.path).name
            about = {"model": model, "data": self.data, "seed": self.args.seed, **self.about, "config": self._config()}
            write_json(self.output_dir / "comparison.json", {**self.compared(results), **about})
        if report is not None:
            report.save(self.output_dir / "l2sp_report.json")
            report.plot(self.output_dir / "l2sp_report.png")
            write_report(self.output_dir, self.predictions)
        else:
            say("l2sp_lambda is 0: nothing is anchored, so there is no l2sp_report and no l2sp_state.json.")
        return card

    def compared(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The runs of `comparison.json`, from the scores by column of the table."""
        plain, l2sp = results.values()
        return comparison(plain=plain, l2sp=l2sp)

    def _config(self) -> dict[str, Any]:
        """The training arguments that decide the result."""
        names = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "weight_decay")
        names += ("gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "optim", "max_grad_norm")
        values = self.args.to_dict()
        names += tuple(name for name in values if name.startswith(("l2sp_", "distill_")))
        chosen = {name: values[name] for name in names}
        versions = {module.__name__: module.__version__ for module in (hf_l2sp, transformers, torch)}
        return {**chosen, "world_size": self.args.world_size, "versions": versions}

    def headline(self) -> str:
        args = self.args
        strength = f"lambda {args.l2sp_lambda:g} ({args.l2sp_schedule})" if self.l2sp_on else "lambda 0"
        shots = "all rows" if self.about["shots"] is None else f"{self.about['shots']} shots"
        return f"{self.source.shown}, {shots}, seed {args.seed}, {strength}"

    def _push(self, trainer: Trainer, card: dict[str, Any]) -> None:
        try:
            trainer.push_to_hub(**card)
        except Exception as error:  # network, login and permission errors have no common class
            folder = str(self.output_dir)
            where = f"The trained model is complete in {folder!r}; push it again with "
            where += f"push_folder({folder!r}, {self.args.hub_model_id!r}) of hf_l2sp.publish."
            raise RecipeError(
                f"--push_to_hub failed: {error}" + ("" if isinstance(error, PushError) else f". {where}")
            ) from error
        say(f"Pushed to the Hub as {trainer.hub_model_id}.")


def free_memory() -> None:
    """Gives back what models hold that are used no more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Bar(ProgressCallback):
    """The progress bar, with loss and drift beside it instead of a line of numbers for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            numbers = {"loss": f"{logs.get('task_loss', logs['loss']):.3f}"}
            if "l2sp_drift" in logs:
                numbers["drift"] = f"{logs['l2sp_drift']:.2%}"
            self.training_bar.set_postfix(numbers)


def _train_and_score(
    trainer: Trainer, datasets: dict[str, Any], checkpoint: str | None, described: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The scores; `described`, where given, gets what the report tells of a classifier's predictions."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Bar)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics = {**trainer.evaluate(metric_key_prefix="eval"), **metrics}
    for split in datasets:
        if split not in ("train", "validation"):
            found = trainer.predict(datasets[split], metric_key_prefix=split)
            metrics.update(found.metrics)
            if described is not None:
                names = [name for _, name in sorted(trainer.model.config.id2label.items())]
                described[split] = describe_predictions(found.predictions, found.label_ids, names)
    for split in datasets:
        metrics[f"{'eval' if split == 'validation' else split}_samples"] = len(datasets[split])
    return metrics


def header(title: str, run: Run, parameters: int, rows: dict[str, int], labels: Sequence[str] = ()) -> str:
    """The few lines that a run begins with."""
    lines = [
        title,
        f"  model   {run.source.shown}, {parameters / 1e6:.1f}M parameters",
        f"  data    {', '.join(f'{count} {split}' for split, count in rows.items())}",
    ]
    if labels:
        lines.append(f"  labels  {len(labels)}: {', '.join(labels[:12])}{', ...' if len(labels) > 12 else ''}")
    if run.args.world_size > 1:
        batch = run.args.world_size * run.args.train_batch_size * run.args.gradient_accumulation_steps
        lines.append(f"  launch  {run.args.world_size} processes on {run.args.device.type}, {batch} texts per step")
    return "\n".join(lines)
