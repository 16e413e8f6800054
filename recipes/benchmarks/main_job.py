"""The main job over seeds: plain fine-tuning against L2-SP, and the course of the scores over λ.

    python recipes/benchmarks/main_job.py [--seeds 5] [--lambdas 0.01 0.1 1] [--shots all 8] [--jobs 1]

Runs recipes/medical_textcls.py with its defaults on the embedded notes. A run that is in the
results already is not repeated, so a study that was cut off goes on. Writes results/main_job.json and .png.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from _bench import RECIPES, RESULTS, environment, read_results, write_results
from _paired import spread

SCORES = ("test_f1_macro", "test_loss", "test_ece", "test_accuracy", "test_mcc")
NAME = "main_job.json"
COLORS = ("#2f6db3", "#d9722e", "#3a8f5d")


def run(shots: int | None, strength: float, seed: int) -> dict[str, float]:
    """Scores of one training; λ 0 is plain fine-tuning (bit for bit that of Trainer)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RECIPES / "medical_textcls.py"), "--output_dir", f"{folder}/out"]
        command += ["--seed", str(seed), "--l2sp_lambda", str(strength), "--save_strategy", "no"]
        command += ["--disable_tqdm", "true"]
        command += [] if shots is None else ["--shots", str(shots)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        scores = json.loads(Path(folder, "out", "all_results.json").read_text(encoding="utf-8"))
    return {name: scores[name] for name in SCORES}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds for each number of shots and λ."""
    groups: dict[tuple[int | None, float], list[dict[str, Any]]] = {}
    for entry in runs:
        groups.setdefault((entry["shots"], entry["lambda"]), []).append(entry)
    rows = []
    for (shots, strength), entries in sorted(groups.items(), key=lambda item: (item[0][0] or 10**9, item[0][1])):
        row: dict[str, Any] = {"shots": shots, "lambda": strength, "seeds": len(entries)}
        for score in SCORES:
            row[score] = spread([entry["scores"][score] for entry in entries])
        rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), dpi=130, layout="constrained")
    axes = figure.subplots(1, 3)
    titles = ("macro-F1 (higher is better)", "NLL (lower is better)", "ECE (lower is better)")
    for axis, score, title in zip(axes, SCORES[:3], titles, strict=True):
        for shots, color in zip(sorted({r["shots"] or 10**9 for r in rows}, reverse=True), COLORS, strict=False):
            shots = None if shots == 10**9 else shots
            part = [row for row in rows if row["shots"] == shots]
            means, stds = ([row[score][k] for row in part] for k in ("mean", "std"))
            label = "all (20 per class)" if shots is None else f"{shots} per class"
            axis.errorbar(range(len(part)), means, yerr=stds, marker="o", capsize=3, color=color, label=label)
            axis.set_xticks(range(len(part)), ["plain" if r["lambda"] == 0 else f"{r['lambda']:g}" for r in part])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("λ")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle("Clinical notes, MiniLM: mean and standard deviation over seeds", weight="bold")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--shots", nargs="+", default=["all"], help="training notes per class: numbers, or all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    result = read_results(NAME) if (RESULTS / NAME).exists() else {"runs": []}
    done = {(r["shots"], r["lambda"], r["seed"]) for r in result["runs"]}
    shots = [None if given == "all" else int(given) for given in options.shots]
    jobs = [(k, s, seed) for seed in range(1, options.seeds + 1) for k in shots for s in (0.0, *options.lambdas)]
    with ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(run, *job): job for job in jobs if job not in done}
        for future in as_completed(running):
            (k, strength, seed), scores = running[future], future.result()
            result["runs"].append({"shots": k, "lambda": strength, "seed": seed, "scores": scores})
            result["summary"] = summary(result["runs"])
            result["environment"] = environment()
            write_results(NAME, result)
            shown = "  ".join(f"{name} {scores[name]:.3f}" for name in SCORES[:3])
            print(f"shots {k or 'all':>4}  lambda {strength:<5g} seed {seed}  {shown}", flush=True)
    draw(result["summary"], RESULTS / "main_job.png")


if __name__ == "__main__":
    main()
