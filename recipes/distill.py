"""Learns from few labels and from teachers: an ensemble, or a larger model, labels texts that nobody has labelled.

Runs as it is, without network, on the embedded model (all-MiniLM-L6-v2) and the embedded clinical notes: teachers are
fine-tuned with L2-SP on 8 labelled notes per class and say what they think of the other training notes, whose labels
are not looked at; a student learns from both, with L2-SP:

    accelerate launch recipes/distill.py

beside the same student without a teacher, with as many optimizer steps on the labelled notes:

    accelerate launch recipes/distill.py --compare

with data of your own (csv, json, jsonl or parquet; the unlabelled texts also as txt, a text a line):

    accelerate launch recipes/distill.py --train_file few.csv --unlabelled_file many.txt --test_file test.csv \
        --model_name_or_path distilbert/distilbert-base-uncased --output_dir outputs/mine

with fine-tuned teachers that there are already, such as larger models, which may have another tokenizer:

    accelerate launch recipes/distill.py --train_file few.csv --unlabelled_file many.txt --teacher outputs/large

or with the arguments in a file: --config recipes/configs/distill.yaml. --help lists them all. --predict_file,
--predict_only and --augment work as in recipes/medical_textcls.py.

Source: Hinton, Vinyals and Dean, 2015 (arXiv 1503.02531).
"""

from dataclasses import dataclass, field
from pathlib import Path

from _distill import distill_parser, run_distill
from _recipe_args import RecipeParser, RecipeTrainingArguments
from _recipe_launch import one_line_errors
from _textcls import Task

from hf_l2sp.distill import DistillationArguments

EMBEDDED_DATA = Path(__file__).parent / "data" / "clinical_notes"


@dataclass
class DistillTrainingArguments(DistillationArguments, RecipeTrainingArguments):
    """`RecipeTrainingArguments` and `DistillationArguments`, with defaults chosen on the embedded validation notes.

    They are those of the student, and but for the seed and the number of epochs of the teachers that are fine-tuned.

    Changed defaults:
        output_dir (`str`, defaults to `"outputs/distill"`)
        learning_rate (`float`, defaults to `3e-4`): few texts make few steps.
        num_train_epochs (`float`, defaults to `5`): minutes on two cores
        per_device_train_batch_size (`int`, defaults to `16`)
        distill_alpha (`float`, defaults to `0.9`): most texts have no label.
    """

    # Not on the command line: --teacher takes its place.
    distill_teacher: str | None = field(default=None, init=False)
    compare: bool = field(
        default=False,
        metadata={
            "help": "Train the student without a teacher first, on the labelled texts alone, with the same seed and "
            "number of optimizer steps, and compare."
        },
    )
    output_dir: str | None = field(
        default="outputs/distill", metadata={"help": "Folder that the model and the results are written to."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    num_train_epochs: float = field(default=5, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Batch size per device in training."})
    distill_alpha: float = field(
        default=0.9,
        metadata={"help": "Weight α of the teacher term, more than 0: (1−α)·task + α·T²·KL."},
    )


def make_parser() -> RecipeParser:
    return distill_parser(DistillTrainingArguments, __doc__)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    run_distill(
        make_parser(), argv, Task("Text classification from teachers", EMBEDDED_DATA, "embedded clinical notes")
    )


if __name__ == "__main__":
    main()
