"""Finds problems, drugs, doses and tests in clinical notes: L2-SP fine-tuning on a few dozen sentences.

Runs as it is, without network, on the embedded model (all-MiniLM-L6-v2) and the embedded clinical sentences:

    accelerate launch recipes/clinical_ner.py

beside plain fine-tuning, on sentences until every type of entity is in 16 of them:

    accelerate launch recipes/clinical_ner.py --compare --shots 16

on data of your own (lists of tokens and tags in json, jsonl or parquet, or a token and its tag a line in conll, bio,
iob, tsv or txt; IOB2, or another --tag_scheme; integer tags with --tag_names) and another model:

    accelerate launch recipes/clinical_ner.py --train_file train.conll --test_file test.conll \
        --model_name_or_path emilyalsentzer/Bio_ClinicalBERT --output_dir outputs/mine

to find entities, with their places, in raw texts too (csv, json, jsonl or parquet with a text column, or txt with a
text a line) or in lists of tokens (the formats above, txt aside):

    accelerate launch recipes/clinical_ner.py --predict_file new.txt --predict_output entities.jsonl

later, with the model of that run, without training:

    accelerate launch recipes/clinical_ner.py --predict_only --model_name_or_path outputs/clinical_ner \
        --predict_file new.txt --predict_output entities.jsonl

with edited copies of the training sentences beside them: --augment swap delete --augment_copies 2

or with the arguments in a file: --config recipes/configs/clinical_ner.yaml. --help lists them all.
"""

from dataclasses import dataclass, field
from pathlib import Path

from _ner import NerTask, ner_parser, run_ner
from _recipe_args import RecipeParser, RecipeTrainingArguments
from _recipe_launch import one_line_errors

EMBEDDED_DATA = Path(__file__).parent / "data" / "clinical_ner"


@dataclass
class ClinicalTrainingArguments(RecipeTrainingArguments):
    """`RecipeTrainingArguments` with defaults chosen on the validation split of the embedded sentences.

    Changed defaults:
        output_dir (`str`, defaults to `"outputs/clinical_ner"`)
        learning_rate (`float`, defaults to `3e-4`): 90 sentences make few steps.
        num_train_epochs (`float`, defaults to `15`): a minute on two cores
        per_device_train_batch_size (`int`, defaults to `8`)
    """

    output_dir: str | None = field(
        default="outputs/clinical_ner", metadata={"help": "Folder that the model and the results are written to."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    num_train_epochs: float = field(default=15, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Batch size per device in training."})


def make_parser() -> RecipeParser:
    return ner_parser(ClinicalTrainingArguments, __doc__)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    task = NerTask("Clinical entities", EMBEDDED_DATA, "embedded clinical sentences", "recipes/clinical_ner.py")
    run_ner(make_parser(), argv, task)


if __name__ == "__main__":
    main()
