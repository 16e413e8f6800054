"""Sorts medical notes by specialty: L2-SP fine-tuning of a sentence model on a few hundred texts.

Runs as it is, without network, on the embedded model (all-MiniLM-L6-v2) and the embedded clinical notes:

    accelerate launch recipes/medical_textcls.py

beside plain fine-tuning, on 16 notes per class:

    accelerate launch recipes/medical_textcls.py --compare --shots 16

on data of your own (csv, json, jsonl or parquet with a text and a label column) and another model:

    accelerate launch recipes/medical_textcls.py --train_file train.csv --test_file test.csv \
        --model_name_or_path emilyalsentzer/Bio_ClinicalBERT --output_dir outputs/mine

to predict unlabelled texts too (csv, json, jsonl or parquet with a text column, or txt with a text a line):

    accelerate launch recipes/medical_textcls.py --predict_file new.txt --predict_output predictions.jsonl

later, with the model of that run, without training:

    accelerate launch recipes/medical_textcls.py --predict_only --model_name_or_path outputs/medical_textcls \
        --predict_file new.txt --predict_output predictions.jsonl

with edited copies of the training notes beside them: --augment swap delete --augment_copies 2

or with the arguments in a file: --config recipes/configs/medical_textcls.yaml. --help lists them all.
"""

from dataclasses import dataclass, field
from pathlib import Path

from _recipe_args import RecipeParser, RecipeTrainingArguments
from _recipe_launch import one_line_errors
from _textcls import Task, run_textcls, textcls_parser

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
    return textcls_parser(MedicalTrainingArguments, __doc__)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    run_textcls(make_parser(), argv, Task("Text classification", EMBEDDED_DATA, "embedded clinical notes"))


if __name__ == "__main__":
    main()
