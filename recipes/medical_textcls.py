"""Sorts medical notes by specialty: L2-SP fine-tuning of a sentence model on a few hundred texts.

Runs as it is, without network, on the embedded model (all-MiniLM-L6-v2) and the embedded clinical notes:

    accelerate launch recipes/medical_textcls.py

beside plain fine-tuning, on 16 notes per class:

    accelerate launch recipes/medical_textcls.py --compare --shots 16

on data of your own (csv, json, jsonl or parquet with a text and a label column) and another model:

    accelerate launch recipes/medical_textcls.py --train_file train.csv --test_file test.csv \
        --model_name_or_path emilyalsentzer/Bio_ClinicalBERT --output_dir outputs/mine

or with the arguments in a file: --config recipes/configs/medical_textcls.yaml. --help lists them all.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _recipe import Run, header
from _recipe_args import DataArguments, ModelArguments, RecipeParser, RecipeTrainingArguments
from _recipe_data import check_data_arguments, label_order, load_splits, to_model_order, tokenize
from _recipe_launch import loss_note, one_line_errors, say
from _recipe_model import find_model, load_config, load_model, load_tokenizer
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, set_seed

from hf_l2sp.metrics import compute_classification_metrics

EMBEDDED_DATA = Path(__file__).parent / "data" / "clinical_notes"


@dataclass
class MedicalTrainingArguments(RecipeTrainingArguments):
    """`RecipeTrainingArguments` with defaults chosen on the validation split of the embedded notes.

    Changed defaults:
        output_dir (`str`, defaults to `"outputs/medical_textcls"`)
        learning_rate (`float`, defaults to `3e-4`): 160 texts make few steps.
        num_train_epochs (`float`, defaults to `6`): minutes on two cores
        per_device_train_batch_size (`int`, defaults to `16`)
    """

    output_dir: str | None = field(
        default="outputs/medical_textcls", metadata={"help": "Folder that the model and the results are written to."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    num_train_epochs: float = field(default=6, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size per device in training."})


def make_parser() -> RecipeParser:
    return RecipeParser((ModelArguments, DataArguments, MedicalTrainingArguments), description=__doc__)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    model_args, data_args, settings = make_parser().parse(argv)

    # Everything that can be refused is refused here, before any text is tokenized.
    check_data_arguments(data_args)
    source = find_model(model_args.model_name_or_path)
    data = data_args.dataset_name or ("local" if data_args.train_file else "embedded clinical notes")
    about = {"shots": data_args.shots, "max_seq_length": data_args.max_seq_length}
    run = Run(settings, source, "text-classification", data, about)
    with run.args.main_process_first(desc="loading the data"):  # a dataset on the Hub is fetched once
        splits, notes = load_splits(data_args, EMBEDDED_DATA, settings["seed"])
    config = load_config(source)
    names = to_model_order(label_order(splits["train"].labels), config)
    config = load_config(
        source,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type="single_label_classification",
    )
    tokenizer = load_tokenizer(source, config, data_args.max_seq_length)

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

    parameters = run.rehearse(build)
    rows = {split: len(part) for split, part in splits.items()}
    say(header("Text classification", run, parameters, rows, names))
    datasets, cut_note = tokenize(splits, names, tokenizer, data_args.max_seq_length)
    for note in (*notes, cut_note, loss_note(run.args, rows)):
        if note is not None:
            say(f"  note    {note}")
    run(build, datasets)


if __name__ == "__main__":
    main()
