"""Chooses the strength λ of L2-SP on the validation data: fine-tunes with each of several, and shows what they do.

Runs as it is, without network, on the embedded model (all-MiniLM-L6-v2) and the embedded clinical notes, with λ = 0
(plain fine-tuning), 0.01, 0.1 and 1, and with l2sp_schedule="auto"; the model is then trained with the best of them:

    accelerate launch recipes/lambda_search.py

with other values, courses of λ and another score:

    accelerate launch recipes/lambda_search.py --lambdas 0 0.03 0.1 0.3 --schedules constant linear \
        --metric_for_best_model f1_macro

on data of your own (csv, json, jsonl or parquet with a text and a label column) and another model:

    accelerate launch recipes/lambda_search.py --train_file train.csv --test_file test.csv --shots 16 \
        --model_name_or_path distilbert/distilbert-base-uncased --output_dir outputs/mine

after a kill, or with more values, from the trainings that are finished:

    accelerate launch recipes/lambda_search.py --output_dir outputs/mine --resume_from_checkpoint ...

or with the arguments in a file: --config recipes/configs/lambda_search.yaml. --help lists them all. --predict_file,
--predict_only and --augment work as in recipes/medical_textcls.py.

lambda_search.json and lambda_search.png in the output folder have score, negative log-likelihood and drift for every
λ. The scores on validation data have chosen, and auto measures on those data: report those on test data.
"""

from dataclasses import dataclass, field
from pathlib import Path

from _lambda_search import run_search, search_parser
from _recipe_args import RecipeParser, RecipeTrainingArguments
from _recipe_launch import one_line_errors
from _textcls import Task

EMBEDDED_DATA = Path(__file__).parent / "data" / "clinical_notes"


@dataclass
class SearchTrainingArguments(RecipeTrainingArguments):
    """`RecipeTrainingArguments` of all trainings, close to the defaults of recipes/medical_textcls.py.

    Changed defaults:
        output_dir (`str`, defaults to `"outputs/lambda_search"`)
        learning_rate (`float`, defaults to `3e-4`): 160 texts make few steps.
        num_train_epochs (`float`, defaults to `3`): six trainings, minutes on two cores
        per_device_train_batch_size (`int`, defaults to `16`)
    """

    # Not on the command line: --lambdas and --schedules take their place.
    l2sp_lambda: float = field(default=0.01, init=False)
    l2sp_schedule: str = field(default="constant", init=False)
    compare: bool = field(
        default=False,
        metadata={"help": "Put plain fine-tuning, λ = 0, beside the chosen model in the last table, too."},
    )
    output_dir: str | None = field(
        default="outputs/lambda_search", metadata={"help": "Folder that the model and the results are written to."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    num_train_epochs: float = field(default=3, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size per device in training."})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "Score on the validation data that chooses λ. Default: loss."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Alone: go on from the trainings that lambda_search.json has."}
    )


def make_parser() -> RecipeParser:
    return search_parser(SearchTrainingArguments, __doc__)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    run_search(make_parser(), argv, Task("Search for λ", EMBEDDED_DATA, "embedded clinical notes"))


if __name__ == "__main__":
    main()
