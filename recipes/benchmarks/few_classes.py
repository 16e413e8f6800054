"""Easier tasks for quality.py, which are fitted sooner: the texts of a few of a data set's classes.

    python recipes/benchmarks/few_classes.py --data FOLDER --sets medical_abstracts --classes 3 --output TASKS
    python recipes/benchmarks/quality.py --data TASKS --sets medical_abstracts_3

The classes are drawn at random, but the same every time. Writes TASKS/medical_abstracts_3/train.jsonl and test.jsonl.
"""

import argparse
import json
import random
from pathlib import Path

from _labelled import RecipeError, Split, read


def drawn(names: set[str], count: int) -> set[str]:
    """Some classes of all.

    Raises:
        RecipeError: There are not as many.
    """
    if not 2 <= count <= len(names):
        raise RecipeError(f"--classes {count}: there are {len(names)} classes; take 2 to {len(names)}.")
    return set(random.Random(0).sample(sorted(names), count))


def limited(split: Split, names: set[str]) -> list[dict[str, str]]:
    """The rows of these classes, in their order."""
    rows = zip(split.texts, split.labels, strict=True)
    return [{"text": text, "label": label} for text, label in rows if label in names]


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
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in limited(split, kept)]
            (target / f"{split.source}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{target}: {', '.join(sorted(kept))}")


if __name__ == "__main__":
    main()
