"""Sorts contract clauses by what they regulate: L2-SP fine-tuning on a dozen clauses per class.

Runs as it is, without network, on the embedded model (all-MiniLM-L6-v2) and the embedded contract clauses:

    accelerate launch recipes/legal_textcls.py

beside plain fine-tuning, on 8 clauses per class:

    accelerate launch recipes/legal_textcls.py --compare --shots 8

on data of your own (csv, json, jsonl or parquet with a text and a label column) and another model:

    accelerate launch recipes/legal_textcls.py --train_file train.csv --test_file test.csv \
        --model_name_or_path nlpaueb/legal-bert-base-uncased --output_dir outputs/mine

to predict unlabelled texts too (csv, json, jsonl or parquet with a text column, or txt with a text a line):

    accelerate launch recipes/legal_textcls.py --predict_file new.txt --predict_output predictions.jsonl

later, with the model of that run, without training:

    accelerate launch recipes/legal_textcls.py --predict_only --model_name_or_path outputs/legal_textcls \
        --predict_file new.txt --predict_output predictions.jsonl

with edited copies of the training clauses beside them: --augment swap delete --augment_copies 2

or with the arguments in a file: --config recipes/configs/legal_textcls.yaml. --help lists them all.
"""

from dataclasses import dataclass, field
from pathlib import Path

from _recipe_args import RecipeParser, RecipeTrainingArguments
from _recipe_launch import one_line_errors
from _textcls import Task, run_textcls, textcls_parser

EMBEDDED_DATA = Path(__file__).parent / "data" / "contract_clauses"


@dataclass
class LegalTrainingArguments(RecipeTrainingArguments):
    """`RecipeTrainingArguments` with defaults chosen on the validation split of the embedded clauses.

    Changed defaults:
        output_dir (`str`, defaults to `"outputs/legal_textcls"`)
        learning_rate (`float`, defaults to `3e-4`): 96 clauses make few steps; a third of it learns too little.
        num_train_epochs (`float`, defaults to `8`)
        per_device_train_batch_size (`int`, defaults to `16`)
    """

    output_dir: str | None = field(
        default="outputs/legal_textcls", metadata={"help": "Folder that the model and the results are written to."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    num_train_epochs: float = field(default=8, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size per device in training."})


def make_parser() -> RecipeParser:
    return textcls_parser(LegalTrainingArguments, __doc__)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    run_textcls(make_parser(), argv, Task("Contract clauses", EMBEDDED_DATA, "embedded contract clauses"))


if __name__ == "__main__":
    main()
