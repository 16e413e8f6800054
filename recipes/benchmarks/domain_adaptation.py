"""Adapting to a domain by masked words: what L2-SP keeps of the general model, and what few-shot classifiers gain.

    python recipes/benchmarks/domain_adaptation.py --data DIR [--lambdas 0.001 0.01 0.1] [--seeds 3]

DIR holds mlm_biomedical (domain text: train.jsonl, validation.jsonl), mlm_reviews (general text: train.jsonl) and
medical_abstracts (labelled: train.jsonl, validation.jsonl, test.jsonl). All runs are those of the recipes' programs.

1. recipes/domain_adapt_mlm.py, plain (λ 0) and for each λ, from the same warmed-up head. Both perplexities are taken
   every few steps. A run that learns less also forgets less, so general perplexities are compared where the domain
   perplexity is the same: at the highest one that a run ends at, interpolated along the courses of the others. These
   are still in full swing there, at a high learning rate, which alone makes the general perplexity worse. So plain is
   also run with fewer steps, to come to rest near there.
2. recipes/medical_textcls.py on few abstracts per class, from the general model and from the adapted ones, with θ0 the
   general or the adapted model.

What is in the results already is not run again; adapted models are kept in --work. Writes
results/domain_adaptation.json and .png.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _bench import RECIPES, RESULTS, embedded_model, environment, read_results, write_results
from _paired import spread

NAME = "domain_adaptation.json"
SCORES = ("test_accuracy", "test_f1_macro", "test_loss", "test_ece")
CONFIG: dict[str, Any] = {
    "adaptation": {
        "max_seq_length": 64,
        "per_device_train_batch_size": 16,
        "max_steps": 100,
        "learning_rate": 2e-4,
        "warmup_steps": 10,
        "head_warmup_steps": 120,
        "eval_steps": 20,
        "max_eval_rows": 96,
        "seed": 1,
    },
    "classification": {
        "max_seq_length": 128,
        "per_device_train_batch_size": 8,
        "max_steps": 30,
        "shots": 8,
        "l2sp_lambda": 0.01,
    },
    "test_rows": "every fifth of medical_abstracts/test.jsonl",
}


def run(recipe: str, **arguments: Any) -> None:
    """Runs a recipe's program; stops with its output where it fails."""
    command = [sys.executable, str(RECIPES / recipe), "--disable_tqdm", "true", "--save_strategy", "no"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")


# --------------------------------------------------------------------------- adaptation


def adapt(data: Path, folder: Path, strength: float, steps: int) -> dict[str, Any]:
    """Adapts the embedded model; the course of both perplexities and the drift."""
    run(
        "domain_adapt_mlm.py",
        train_file=data / "mlm_biomedical" / "train.jsonl",
        validation_file=data / "mlm_biomedical" / "validation.jsonl",
        general_file=data / "mlm_reviews" / "train.jsonl",
        output_dir=folder,
        overwrite_output_dir=True,
        l2sp_lambda=strength,
        **{**CONFIG["adaptation"], "max_steps": steps},
    )
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    points: dict[int, dict[str, float]] = {}
    names = {"start_perplexity": "domain", "start_general_perplexity": "general"}
    names |= {"eval_perplexity": "domain", "general_perplexity": "general"}
    for entry in log:
        for name in names.keys() & entry.keys():
            points.setdefault(entry["step"], {})[names[name]] = entry[name]
    drifts = [entry["l2sp_drift"] for entry in log if "l2sp_drift" in entry]
    course = [{"step": step, **points[step]} for step in sorted(points)]
    return {"lambda": strength, "max_steps": steps, "course": course, "drift": drifts[-1] if drifts else None}


def general_at(course: list[dict[str, float]], domain: float) -> float | None:
    """General perplexity where the domain perplexity first falls to a value, log-linear between two evaluations."""
    for before, after in zip(course, course[1:], strict=False):
        if after["domain"] <= domain <= before["domain"]:
            share = math.log(before["domain"] / domain) / math.log(before["domain"] / after["domain"])
            return math.exp((1 - share) * math.log(before["general"]) + share * math.log(after["general"]))
    return None


def adaptation_summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Start, end, and the general perplexity where the runs have the same domain perplexity."""
    lowest = [min(point["domain"] for point in entry["course"]) for entry in runs]
    common = max(low for low, entry in zip(lowest, runs, strict=True) if is_full(entry))
    rows = [
        {
            "lambda": entry["lambda"],
            "max_steps": entry["max_steps"],
            "drift": entry["drift"],
            "end": entry["course"][-1],
            "general_at_common_domain": general_at(entry["course"], common),
        }
        for entry in sorted(runs, key=lambda entry: (entry["lambda"], -entry["max_steps"]))
    ]
    return {"start": runs[0]["course"][0], "common_domain_perplexity": common, "runs": rows}


def is_full(entry: dict[str, Any]) -> bool:
    """Whether a run has all steps: that with fewer ones is there to be compared with."""
    return entry["max_steps"] == CONFIG["adaptation"]["max_steps"]


# --------------------------------------------------------------------------- classification


def classify(data: Path, model: Path | None, anchor: Path | None, seed: int) -> dict[str, float]:
    """Test scores of a classifier that is trained on a few abstracts per class."""
    with tempfile.TemporaryDirectory() as folder:
        test = Path(folder, "test.jsonl")
        lines = (data / "medical_abstracts" / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        test.write_text("".join(lines[::5]), encoding="utf-8")
        validation = Path(folder, "validation.jsonl")  # nothing is chosen by it
        lines = (data / "medical_abstracts" / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        validation.write_text("".join(lines[:16]), encoding="utf-8")
        more = {"model_name_or_path": model, "l2sp_anchor": anchor}
        run(
            "medical_textcls.py",
            train_file=data / "medical_abstracts" / "train.jsonl",
            validation_file=validation,
            test_file=test,
            output_dir=f"{folder}/out",
            seed=seed,
            **CONFIG["classification"],
            **{name: value for name, value in more.items() if value is not None},
        )
        scores = json.loads(Path(folder, "out", "all_results.json").read_text(encoding="utf-8"))
    return {name: scores[name] for name in SCORES}


def arms(work: Path, strengths: list[float]) -> dict[tuple[str, str], tuple[Path | None, Path | None]]:
    """(Model, θ0) as the results name them, and the arguments that make them."""
    found: dict[tuple[str, str], tuple[Path | None, Path | None]] = {("general", "general"): (None, None)}
    for strength in (0.0, *strengths):
        name, folder = ("plain" if strength == 0 else f"lambda {strength:g}"), work / f"adapted-{strength:g}"
        # The folder of a plain run records no θ0: its own weights are the default.
        found[name, "general"] = folder, Path(embedded_model()) if strength == 0 else None
        found[name, "adapted"] = folder, folder
    return found


def classification_summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of each model and θ0."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in runs:
        groups.setdefault((entry["model"], entry["anchor"]), []).append(entry["scores"])
    rows = []
    for (model, anchor), scores in groups.items():
        row: dict[str, Any] = {"model": model, "anchor": anchor, "seeds": len(scores)}
        for name in SCORES:
            row[name] = spread([one[name] for one in scores])
        rows.append(row)
    return rows


# --------------------------------------------------------------------------- all of it


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """General over domain perplexity along the training: from the start at the right to the end at the left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    for entry in sorted(runs, key=lambda entry: (entry["lambda"], -entry["max_steps"])):
        domain, general = ([point[text] for point in entry["course"]] for text in ("domain", "general"))
        label = "plain" if entry["lambda"] == 0 else f"λ = {entry['lambda']:g}"
        label += "" if is_full(entry) else f", {entry['max_steps']} steps"
        axis.plot(domain, general, marker="o", markersize=4, label=label, linestyle="-" if is_full(entry) else ":")
    axis.set_xlabel("perplexity on domain text")
    axis.set_ylabel("perplexity on general text")
    axis.set_title("Lower left is better; a training begins at the right", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks/domain_adaptation"), metavar="DIR")
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0.001, 0.01, 0.1])
    parser.add_argument("--plain_steps", type=int, nargs="*", default=[80], help="steps of further plain runs")
    parser.add_argument("--classify", type=float, nargs="*", default=[0.1], help="λ of the models to classify with")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    result = read_results(NAME) if (RESULTS / NAME).exists() else {"adaptation": [], "classification": []}
    result["config"] = CONFIG

    def save() -> None:
        result["summary"] = {
            "adaptation": adaptation_summary(result["adaptation"]),
            "classification": classification_summary(result["classification"]),
        }
        result["environment"] = environment()
        write_results(NAME, result)

    steps = CONFIG["adaptation"]["max_steps"]
    for strength, count in [(s, steps) for s in (0.0, *options.lambdas)] + [(0.0, n) for n in options.plain_steps]:
        full = count == steps
        folder = options.work / (f"adapted-{strength:g}" if full else f"plain-{count}")
        known = [e for e in result["adaptation"] if (e["lambda"], e["max_steps"]) == (strength, count)]
        needed = full and strength in (0.0, *options.classify)
        if known and (not needed or (folder / "config.json").is_file()):
            continue
        entry = adapt(options.data, folder, strength, count)
        result["adaptation"] = [e for e in result["adaptation"] if e not in known] + [entry]
        save()
        print(f"lambda {strength:<6g} {entry['course'][0]} -> {entry['course'][-1]}", flush=True)
    done = {(entry["model"], entry["anchor"], entry["seed"]) for entry in result["classification"]}
    for seed in range(1, options.seeds + 1):
        for (model, anchor), paths in arms(options.work, options.classify).items():
            if (model, anchor, seed) in done:
                continue
            scores = classify(options.data, *paths, seed)
            result["classification"].append({"model": model, "anchor": anchor, "seed": seed, "scores": scores})
            save()
            print(f"{model:<12} θ0 {anchor:<8} seed {seed}  {scores}", flush=True)
    draw(result["adaptation"], RESULTS / NAME.replace(".json", ".png"))


if __name__ == "__main__":
    main()
