"""The recipes on real data of their domains: plain fine-tuning beside L2-SP, few labels, several seeds.

    python recipes/benchmarks/domains.py --data FOLDER [--seeds 3] [--only sentiment clinical_ner ...]

FOLDER holds a folder per data set with train, validation and test.jsonl, prepared as RUNS names them. Each run is the
recipe with --compare, on texts drawn by the seed; of validation and test data it sees the same sample in every run.
A run that is in the results already is not repeated.
Writes results/domains.json.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _bench import RECIPES, RESULTS, environment, read_results, write_results
from _paired import spread

NAME = "domains.json"
# Plain Trainer and L2-SP get the same; nothing is tuned on these data.
COMMON = {"max_steps": 40, "warmup_steps": 4, "per_device_train_batch_size": 16, "learning_rate": 3e-4}
COMMON |= {"max_seq_length": 64}
ROWS = {"validation": 50, "test": 400}
CLASSES = ("test_f1_macro", "test_loss", "test_ece", "test_accuracy")
ENTITIES = ("test_f1", "test_precision", "test_recall", "test_loss")


@dataclass
class Job:
    """A recipe on a data set."""

    recipe: str
    data: str
    shots: int | None  # None: all of the training data, where a type is too rare for a draw
    scores: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


RUNS = (
    Job("medical_textcls", "medical_abstracts", 16, CLASSES),
    Job("sentiment", "clothing_reviews", 16, CLASSES),
    Job("legal_textcls", "cuad_clauses", 8, CLASSES),
    Job("clinical_ner", "ncbi_disease", 64, ENTITIES, {"stride": 16}),
    Job("finance_ner", "fin_sec_agreements", None, ENTITIES, {"stride": 16}),
    Job("finance_ner", "wnut17", 16, ENTITIES, {"stride": 16}),
)


def sample(path: Path, folder: Path, rows: int) -> Path:
    """A file in `folder` with so many of the lines, in their order; the same in every run."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    taken = random.Random(0).sample(range(len(lines)), min(rows, len(lines)))
    part = folder / path.name
    part.write_text("".join(lines[index] for index in sorted(taken)), encoding="utf-8")
    return part


def run(job: Job, data: Path, seed: int) -> dict[str, dict[str, float]]:
    """The scores of both trainings."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RECIPES / f"{job.recipe}.py"), "--compare", "--output_dir", f"{folder}/out"]
        for split in ("train", "validation", "test"):
            path = data / job.data / f"{split}.jsonl"
            command += [f"--{split}_file", str(sample(path, Path(folder), ROWS[split]) if split in ROWS else path)]
        settings = {**COMMON, **job.settings, "seed": seed, "save_strategy": "no", "disable_tqdm": "true"}
        settings |= {} if job.shots is None else {"shots": job.shots}
        command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{job.recipe} on {job.data} failed:\n{done.stdout}\n{done.stderr}")
        found = json.loads(Path(folder, "out", "comparison.json").read_text(encoding="utf-8"))
    return {name: {score: found[name][score] for score in job.scores} for name in ("plain", "l2sp")}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, and on how many of them L2-SP was better."""
    groups: dict[tuple[str, str, int | None], list[dict[str, Any]]] = {}
    for entry in runs:
        groups.setdefault((entry["recipe"], entry["data"], entry["shots"]), []).append(entry)
    rows = []
    for (recipe, data, shots), entries in groups.items():
        row: dict[str, Any] = {"recipe": recipe, "data": data, "shots": shots, "seeds": len(entries), "scores": {}}
        for score in entries[0]["scores"]["plain"]:
            plain, l2sp = ([entry["scores"][name][score] for entry in entries] for name in ("plain", "l2sp"))
            lower_is_better = score.endswith(("_loss", "_ece"))
            better = sum((b < a) if lower_is_better else (b > a) for a, b in zip(plain, l2sp, strict=True))
            row["scores"][score] = {"plain": spread(plain), "l2sp": spread(l2sp), "l2sp_better": better}
        rows.append(row)
    order = [(job.recipe, job.data) for job in RUNS]
    return sorted(rows, key=lambda row: order.index((row["recipe"], row["data"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets' folders")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="recipes or data sets")
    options = parser.parse_args()
    result = read_results(NAME) if (RESULTS / NAME).exists() else {"runs": []}
    result["config"] = {"common": COMMON, "rows": ROWS, "runs": [asdict(job) for job in RUNS]}
    done = {(entry["recipe"], entry["data"], entry["shots"], entry["seed"]) for entry in result["runs"]}
    wanted = [job for job in RUNS if not options.only or {job.recipe, job.data} & set(options.only)]
    for seed in range(1, options.seeds + 1):
        for job in wanted:
            about = {"recipe": job.recipe, "data": job.data, "shots": job.shots, "seed": seed}
            if tuple(about.values()) in done:
                continue
            scores = run(job, options.data, seed)
            result["runs"].append({**about, "scores": scores})
            result["summary"] = summary(result["runs"])
            result["environment"] = environment()
            write_results(NAME, result)
            shown = "  ".join(f"{s} {scores['plain'][s]:.3f} / {scores['l2sp'][s]:.3f}" for s in job.scores)
            print(f"{job.recipe}  {job.data}  seed {seed}  plain / L2-SP: {shown}", flush=True)


if __name__ == "__main__":
    main()
