"""`Run` by itself: which splits are scored, and what it hands back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer

from hf_l2sp import L2SPTrainer
from hf_l2sp.metrics import compute_classification_metrics

from .recipe_harness import notes, results_of

import medical_textcls  # noqa: E402  # isort: skip
from _recipe import Run  # noqa: E402  # isort: skip
from _recipe_model import find_model  # noqa: E402  # isort: skip


def test_every_split_is_scored_and_the_trained_model_handed_back(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def split(per_class: int, seed: int) -> datasets.Dataset:
        rows = notes(per_class, seed)
        labels = [["heart", "lung", "skin"].index(row["label"]) for row in rows]
        return datasets.Dataset.from_dict({**tokenizer([row["text"] for row in rows]), "label": labels})

    def build(trainer_class: type[Trainer], arguments: Any, data: dict[str, Any]) -> Trainer:
        return trainer_class(
            model=AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3),
            args=arguments,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_classification_metrics,
        )

    words = ["--output_dir", str(tmp_path), "--max_steps", "2", "--disable_tqdm", "true", "--compare"]
    *_, settings = medical_textcls.make_parser().parse(words)
    run = Run(settings, find_model(tiny_model), "text-classification", "local", {"shots": None})
    sizes = {"train": 3, "validation": 2, "test": 2, "hard": 4, "old": 1}
    trainer = run(build, {name: split(count, seed) for seed, (name, count) in enumerate(sizes.items())})
    results = results_of(tmp_path)
    for prefix, name in (
        ("train", "train"),
        ("eval", "validation"),
        ("test", "test"),
        ("hard", "hard"),
        ("old", "old"),
    ):
        assert results[f"{prefix}_samples"] == 3 * sizes[name]
        assert prefix == "train" or {f"{prefix}_loss", f"{prefix}_f1_macro", f"{prefix}_ece"} <= set(results)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    named = [line[0] for line in lines if len(line) == 4 and line[0].endswith("_f1_macro")]
    assert named == ["eval_f1_macro", "test_f1_macro", "hard_f1_macro", "old_f1_macro"]
    # The L2-SP run's, not the plain one's, and trained.
    assert type(trainer) is L2SPTrainer and trainer.state.global_step == 2
    weights = load_file(tmp_path / "model.safetensors")
    assert all(value.equal(weights[name]) for name, value in trainer.model.state_dict().items() if name in weights)
