"""What augmentation, mix-up and distillation bring with 8 and 16 labelled texts per class, beside L2-SP alone.

    python recipes/benchmarks/scarce_labels.py --data FOLDER [--shots 8 16] [--seeds 5] [--methods ...] \
        [--masked_lm FOLDER]

FOLDER holds train.jsonl and test.jsonl with `text` and `label`. A seed draws the labelled texts and sets the head's
first values and the order of batches, so that methods are compared pairwise. Every method takes the same number of
optimizer steps at the same learning rate. A run that is in the results already is not repeated.
Writes results/scarce_labels.json.

- plain: Trainer; l2sp: L2-SP at the default λ, as in all that follow.
- edits: copies by random swap, deletion and insertion. mask: copies by a masked language model (--masked_lm), trained
  by recipes/domain_adapt_mlm.py.
- mixup: input embeddings of two texts mixed.
- ensemble: mean probabilities of three L2-SP models of different first values. No training of its own.
- distill: a student of that ensemble, on the labelled texts and on unlabelled ones.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _bench import RESULTS, embedded_model, environment, read_results, write_results
from _labelled import SCORES, Split, draw_shots, new_model, passing, read, sample, scores_of
from _paired import paired, spread
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
)
from transformers.utils import logging

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.augment import Augmenter, augment_dataset
from hf_l2sp.distill import L2SPDistillationArguments, L2SPDistillationTrainer, cache_teacher_logits
from hf_l2sp.mixup import MixupArguments, MixupMixin

NAME = "scarce_labels.json"
METHODS = ("plain", "l2sp", "edits", "mask", "mixup", "ensemble", "distill")
CONFIG: dict[str, Any] = {
    "learning_rate": 3e-4,
    "max_steps": 40,
    "per_device_train_batch_size": 16,
    "warmup_steps": 4,
    "l2sp_lambda": 0.01,
    "max_length": 64,
    "test_rows": 400,
    "unlabelled_rows": 400,
    "augment_copies": 4,
    "augment_strength": 0.1,
    "mixup_alpha": 0.4,
    "teachers": 3,
    "distill_alpha": 0.7,
    "distill_temperature": 2.0,
}


class MixupTrainer(MixupMixin, L2SPTrainer): ...


class MixupTrainingArguments(MixupArguments, L2SPTrainingArguments): ...


class Cell:
    """One draw of labelled texts: trains and scores the methods on it."""

    def __init__(self, train: Split, test: Split, shots: int, seed: int, masked_lm: str | None) -> None:
        self.seed, self.masked_lm = seed, masked_lm
        self.names = sorted(set(train.labels))
        self.tokenizer = AutoTokenizer.from_pretrained(embedded_model())
        self.collator = DataCollatorWithPadding(self.tokenizer)
        drawn = draw_shots(train, shots, seed)
        taken = set(drawn.texts)
        others = train.take([row for row, text in enumerate(train.texts) if text not in taken])
        self.labelled = self._dataset(drawn)
        self.unlabelled = self._tokens(self._dataset(sample(others, CONFIG["unlabelled_rows"])))
        self.test = self._tokens(self._dataset(test))
        self._teachers: list[Any] = []

    def _dataset(self, split: Split) -> Dataset:
        return Dataset.from_dict({"text": split.texts, "labels": [self.names.index(label) for label in split.labels]})

    def _tokens(self, dataset: Dataset) -> Dataset:
        return dataset.map(
            lambda batch: self.tokenizer(batch["text"], truncation=True, max_length=CONFIG["max_length"]),
            batched=True,
            remove_columns="text",
        )

    def _train(self, trainer_class: Any, arguments_class: Any, data: Dataset, seed: int, **changes: Any) -> Trainer:
        names = ("learning_rate", "max_steps", "per_device_train_batch_size", "warmup_steps", "l2sp_lambda")
        settings = {name: CONFIG[name] for name in names} | changes
        with tempfile.TemporaryDirectory() as folder:
            args = arguments_class(**passing(folder, seed), logging_strategy="no", **settings)
            trainer = trainer_class(
                model=new_model(self.names, seed),
                args=args,
                train_dataset=data,
                processing_class=self.tokenizer,
                data_collator=self.collator,
            )
            trainer.train()
        return trainer

    def _tested(self, trainer: Trainer) -> dict[str, float]:
        return scores_of(trainer.predict(self.test).predictions, self.test["labels"])

    def teachers(self) -> list[Any]:
        while len(self._teachers) < CONFIG["teachers"]:
            seed = self.seed + 100 * len(self._teachers)
            self._teachers.append(self._train(L2SPTrainer, L2SPTrainingArguments, self._tokens(self.labelled), seed))
        return self._teachers

    def _augmented(self, names: list[str], **masked: Any) -> Dataset:
        copies, strength = CONFIG["augment_copies"], CONFIG["augment_strength"]
        augmenter = Augmenter(names, copies=copies, strength=strength, seed=self.seed, **masked)
        return self._tokens(augment_dataset(self.labelled, augmenter))

    def plain(self) -> dict[str, float]:
        tokens = self._tokens(self.labelled)
        return self._tested(self._train(L2SPTrainer, L2SPTrainingArguments, tokens, self.seed, l2sp_lambda=0.0))

    def l2sp(self) -> dict[str, float]:
        if not self._teachers:  # the first teacher is this very model
            self._teachers.append(
                self._train(L2SPTrainer, L2SPTrainingArguments, self._tokens(self.labelled), self.seed)
            )
        return self._tested(self._teachers[0])

    def edits(self) -> dict[str, float]:
        data = self._augmented(["swap", "delete", "insert"])
        return self._tested(self._train(L2SPTrainer, L2SPTrainingArguments, data, self.seed))

    def mask(self) -> dict[str, float]:
        model = AutoModelForMaskedLM.from_pretrained(self.masked_lm)
        data = self._augmented(["mask"], model=model, tokenizer=AutoTokenizer.from_pretrained(self.masked_lm))
        return self._tested(self._train(L2SPTrainer, L2SPTrainingArguments, data, self.seed))

    def mixup(self) -> dict[str, float]:
        settings = {"mixup_alpha": CONFIG["mixup_alpha"]}
        data = self._tokens(self.labelled)
        return self._tested(self._train(MixupTrainer, MixupTrainingArguments, data, self.seed, **settings))

    def ensemble(self) -> dict[str, float]:
        logits = [torch.tensor(teacher.predict(self.test).predictions) for teacher in self.teachers()]
        return scores_of(torch.stack(logits).softmax(-1).mean(0).log().numpy(), self.test["labels"])

    def distill(self) -> dict[str, float]:
        hidden = self.unlabelled.remove_columns("labels").add_column("labels", [-100] * len(self.unlabelled))
        rows = concatenate_datasets([self._tokens(self.labelled), hidden.cast(self.unlabelled.features)])
        models = [teacher.model for teacher in self.teachers()]
        names = dict(enumerate(self.names))
        rows = cache_teacher_logits(rows, models, self.collator, batch_size=50, id2label=names)
        settings = {"distill_alpha": CONFIG["distill_alpha"], "distill_temperature": CONFIG["distill_temperature"]}
        return self._tested(
            self._train(L2SPDistillationTrainer, L2SPDistillationArguments, rows, self.seed, **settings)
        )


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of every method, and its mean difference from L2-SP alone with a 95 % interval.

    The interval is that of a paired bootstrap over the seeds.
    """
    cells: dict[tuple[str, int, str], dict[int, dict[str, float]]] = {}
    for run in runs:
        cells.setdefault((run["data"], run["shots"], run["method"]), {})[run["seed"]] = run["scores"]
    rows = []
    for (data, shots, method), found in cells.items():
        row: dict[str, Any] = {"data": data, "shots": shots, "method": method, "seeds": len(found)}
        for score in SCORES:
            row[score] = spread([scores[score] for scores in found.values()])
            base = cells.get((data, shots, "l2sp"), {})
            pairs = [scores[score] - base[seed][score] for seed, scores in found.items() if seed in base]
            if method != "l2sp" and pairs:
                row[score]["beside_l2sp"] = paired(pairs)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["data"], row["shots"], METHODS.index(row["method"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--shots", type=int, nargs="+", default=[8, 16], help="labelled texts per class")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[m for m in METHODS if m != "mask"])
    parser.add_argument("--masked_lm", help="folder of a trained masked language model, for the method mask")
    options = parser.parse_args()
    if "mask" in options.methods and not options.masked_lm:
        parser.error("the method mask needs --masked_lm")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data = options.data.resolve().name
    train, test = read(options.data, "train"), sample(read(options.data, "test"), CONFIG["test_rows"])
    result = read_results(NAME) if (RESULTS / NAME).exists() else {"config": CONFIG, "runs": []}
    if result["config"] != CONFIG:
        raise SystemExit(f"{NAME} holds runs of another configuration; move it away to start anew.")
    done = {(run["data"], run["shots"], run["seed"], run["method"]) for run in result["runs"]}
    for seed in range(1, options.seeds + 1):
        for shots in options.shots:
            wanted = [m for m in METHODS if m in options.methods and (data, shots, seed, m) not in done]
            cell = Cell(train, test, shots, seed, options.masked_lm) if wanted else None
            for method in wanted:
                scores = getattr(cell, method)()
                result["runs"].append({"data": data, "shots": shots, "seed": seed, "method": method, "scores": scores})
                result["summary"] = summary(result["runs"])
                result["environment"] = environment()
                write_results(NAME, result)
                shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
                print(f"{data}  {shots:>3} per class  seed {seed}  {method:<9} {shown}", flush=True)


if __name__ == "__main__":
    main()
