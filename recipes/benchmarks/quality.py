"""Which method, which λ: data sets × shots × seeds × methods, paired by seed.

    python recipes/benchmarks/quality.py --data FOLDER [--sets medical_abstracts ...] [--shots 8 16] [--seeds 5] \
        [--methods plain "l2sp 0.1" ...] [--workers 2] [--float32]

FOLDER holds a folder per data set with train.jsonl and test.jsonl of `text` and `label`, or of `tokens` and
`ner_tags`. A seed draws the labelled texts and sets the head's first values and the order of batches. A run that is in
the results already is not repeated, so that a killed study goes on where it was. Methods are those of
_quality_methods.py, the settings all of them share those of _quality_cell.py.
Where a CPU has no instructions for bfloat16 it is many times slower than float32: --float32 trains without it. Every
run says which it was.
Writes results/quality.json with a summary, results/quality.png and results/quality_lambda.png.
"""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from _bench import RESULTS, environment, read_results, write_results
from _labelled import SCORES, RecipeError
from _quality_cell import MAX_LENGTH, TEST_ROWS, TRAINING, cell_of, timed
from _quality_methods import METHODS
from _quality_plots import draw_methods, draw_strengths
from _quality_summary import summary
from transformers.utils import logging

NAME = "quality.json"
CONFIG = {"training": TRAINING, "max_length": MAX_LENGTH, "test_rows": TEST_ROWS}
Key = tuple[str, int, int, str]


def run(folder: Path, shots: int, seed: int, method: str, bf16: bool) -> dict[str, Any]:
    """One training, in a process of its own."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cell = cell_of(folder, shots, seed, bf16)
    found, seconds = timed(lambda: METHODS[method](cell))
    about = {
        "data": folder.name,
        "shots": shots,
        "seed": seed,
        "method": method,
        "rows": len(cell.train),
        "bf16": bf16,
    }
    return {**about, **found, "cpu_seconds": round(seconds, 1)}


def key(entry: dict[str, Any]) -> Key:
    return entry["data"], entry["shots"], entry["seed"], entry["method"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets' folders")
    parser.add_argument("--sets", nargs="+", default=["medical_abstracts"])
    parser.add_argument("--shots", type=int, nargs="+", default=[8, 16], help="labelled texts per class, 0: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--float32", action="store_true", help="train in float32 instead of bfloat16")
    parser.add_argument("--output", default=NAME)
    options = parser.parse_args()
    result = read_results(options.output) if (RESULTS / options.output).exists() else {"config": CONFIG, "runs": []}
    if result["config"] != CONFIG:
        raise SystemExit(f"{options.output} holds runs of another configuration; move it away to start anew.")
    done = {key(entry) for entry in result["runs"]}
    wanted = [
        (options.data.resolve() / name, shots, seed, method)
        for seed in options.seeds
        for name in options.sets
        for shots in options.shots
        for method in options.methods
        if (name, shots, seed, method) not in done
    ]
    for folder, shots, seed in {job[:3] for job in wanted}:
        try:
            # Refuses now what it would refuse in the middle of the study.
            len(cell_of(folder, shots, seed, not options.float32).labelled)
        except RecipeError as error:
            raise SystemExit(f"{folder.name}: {error}") from error
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        waiting = [pool.submit(run, *job, not options.float32) for job in wanted]
        for number, future in enumerate(as_completed(waiting), 1):
            entry = future.result()
            result["runs"].append(entry)
            result["environment"] = environment()
            write_results(options.output, result)
            shown = "  ".join(f"{name} {entry['scores'][name]:.3f}" for name in SCORES)
            print(f"{number}/{len(wanted)}  {'  '.join(map(str, key(entry)))}  {shown}", flush=True)
    conclude(result, options.output)


def conclude(result: dict[str, Any], name: str) -> None:
    """Adds the summary, and draws it."""
    order = list(METHODS)
    result["runs"].sort(key=lambda run: (run["data"], run["shots"], order.index(run["method"]), run["seed"]))
    result["summary"] = summary(result["runs"])
    write_results(name, result)
    picture = RESULTS / name
    draw_methods(result["summary"]["methods"], picture.with_suffix(".png"))
    draw_strengths(result["summary"]["strengths"], picture.with_name(f"{picture.stem}_lambda.png"))


if __name__ == "__main__":
    main()
