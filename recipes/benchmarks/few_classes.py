"""Easier tasks for quality.py, which are fitted sooner: the texts of a few of a data set's classes.

    python recipes/benchmarks/few_classes.py --data FOLDER --sets medical_abstracts --classes 3 --output TASKS
    python recipes/benchmarks/quality.py --data TASKS --sets medical_abstracts_3

The classes are drawn at random, but the same every time. Writes TASKS/medical_abstracts_3/train.jsonl and test.jsonl.
"""

import argparse
import random
from pathlib import Path

from _labelled import RecipeError, read
from datasets import Dataset


def drawn(names: set[str], count: int) -> set[str]:
    """Some classes of all.

    Raises:
        RecipeError: There are not as many.
    """
    if not 2 <= count <= len(names):
        raise RecipeError(f"--classes {count}: there are {len(names)} classes; take 2 to {len(names)}.")
    return set(random.Random(0).sample(sorted(names), count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets' folders")
    parser.add_argument("--sets", nargs="+", required=True)
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for the new data sets' folders")
    options = parser.parse_args()
    for name in options.sets:
        target = options.output / f"{name}_{options.classes}"
        try:
            train, test = (read(options.data / name, split) for split in ("train", "test"))
            kept = drawn(set(train.labels), options.classes)
            target.mkdir(parents=True)
        except FileExistsError:
            raise SystemExit(f"{target} is there already; move it away to have it made anew.") from None
        except RecipeError as error:
            raise SystemExit(f"{name}: {error}") from error
        for split in (train, test):
            rows = split.take([row for row, label in enumerate(split.labels) if label in kept])
            table = Dataset.from_dict({"text": rows.texts, "label": rows.labels})
            table.to_json(target / f"{split.source}.jsonl", force_ascii=False)
        print(f"{target}: {', '.join(sorted(kept))}")


if __name__ == "__main__":
    main()
