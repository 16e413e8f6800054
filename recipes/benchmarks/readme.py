"""Writes the committed results into README.md and the data's README, between their markers.

    python recipes/benchmarks/readme.py [--check]

With --check nothing is written, and the exit code is 1 where a README does not show the committed results.
"""

import argparse
import re
from pathlib import Path

from _bench import RECIPES, read_results

FILES = (RECIPES.parent / "README.md", RECIPES / "data" / "clinical_notes" / "README.md")


def main_job() -> str:
    lines = [
        "| training notes | method | macro-F1 | NLL | ECE |",
        "|---|---|---|---|---|",
    ]
    for row in read_results("main_job.json")["summary"]:
        notes = "all, 20 per class" if row["shots"] is None else f"{row['shots']} per class"
        method = "plain fine-tuning" if row["lambda"] == 0 else f"L2-SP, λ = {row['lambda']:g}"
        method += " (default)" if row["lambda"] == 0.01 else ""
        cells = [f"{row[s]['mean']:.3f} ± {row[s]['std']:.3f}" for s in ("test_f1_macro", "test_loss", "test_ece")]
        lines.append(f"| {notes} | {method} | {' | '.join(cells)} |")
    seeds = {row["seeds"] for row in read_results("main_job.json")["summary"]}
    lines.append(f"\nMean ± standard deviation over {'/'.join(map(str, sorted(seeds)))} seeds, 240 test notes.")
    return "\n".join(lines)


def speed() -> str:
    result = read_results("speed.json")
    return (
        f"One pass takes {result['pass_ms']:.0f} ms, {result['added_by_pass_percent']:.1f} % of a plain step of "
        f"{result['plain_step_ms']:.0f} ms ({result['what']}, {result['environment']['threads']} threads)."
    )


def memory() -> str:
    result = read_results("memory.json")
    rounding = result["bfloat16"]
    lines = [
        f"Peak memory grows by the anchor ({result['anchor_mib']:.0f} MiB) and "
        f"{max(result['beyond_the_anchor_mib'], 0):.0f} MiB more ({result['what']}). In bytes per anchored parameter:",
        "",
        "| dtype of θ0 | offload | memory that stays taken | file in `output_dir` |",
        "|---|---|---|---|",
    ]
    for row in result["storage"]:
        dtype = "auto (float32 here)" if row["dtype"] == "auto" else row["dtype"]
        taken, written = row["resident_bytes_per_parameter"], row["written_bytes_per_parameter"]
        lines.append(f"| {dtype} | {row['offload']} | {taken:.2f} | {written:.2f} |")
    squared, gradient = (f"{100 * abs(rounding[key]):.2g} %" for key in ("squared", "gradient"))
    buffer = (1 << 20) / result["anchored_parameters"]
    lines += [
        "",
        f"{buffer:.2f} of it is the buffer of the pass, 1 MiB. This is a CPU, where `cpu` is `none`: it empties the",
        "memory of an accelerator only. With `disk` and `auto` θ0 is the model's own file, mapped, so that nothing is",
        "written; the system may keep its pages, and drops them when memory is short. bfloat16 is not exact for a",
        f"float32 model: after {rounding['steps']} steps with the main job's settings ‖θ − θ0‖² is {squared} off, and",
        f"the gradient of the penalty {gradient}. A bfloat16 model with `auto` loses nothing.",
    ]
    return "\n".join(lines)


def clinical_notes() -> str:
    result = read_results("clinical_notes.json")
    scores, runs = result["test_f1_macro"], read_results("main_job.json")["summary"]
    tuned = {row["lambda"]: row["test_f1_macro"]["mean"] for row in runs if row["shots"] is None}
    rows = [("TF-IDF bag of " + name + ", logistic regression", f1) for name, f1 in scores["bag of words"].items()]
    rows.append(("MiniLM, frozen, logistic regression", scores["frozen MiniLM embeddings, linear"]))
    rows.append(("MiniLM, fine-tuned (plain)", tuned[0.0]))
    rows.append(("MiniLM, fine-tuned (L2-SP, default λ)", tuned[0.01]))
    table = ["| model, trained on the training notes | test macro-F1 |", "|---|---|"]
    table += [f"| {name} | {f1:.3f} |" for name, f1 in rows]
    table.append(
        f"\nLargest cosine of TF-IDF 1-2-grams between notes of two splits: "
        f"{result['largest_cosine_across_splits']:.3f}; within a split: {result['largest_cosine_within_a_split']:.3f}."
    )
    return "\n".join(table)


def upstream_tests() -> str:
    runs = []
    for version, found in read_results("upstream_tests.json").items():
        passed = {name: counts["passed"] for name, counts in found["counts"].items()}
        lost = {name: len(tests) for name, tests in found["pass_with_trainer_only"].items()}
        kept = ", ".join(f"{passed[name]} with {name} ({lost[name]} lost)" for name in lost)
        runs.append(f"{version}: {passed['Trainer']} pass with `Trainer`, {kept}")
    return (
        "Hugging Face's own tests of `Trainer`, run with `L2SPTrainer` in its place (one process, CPU, offline): "
        + "; ".join(runs)
        + ". Names and causes are in [results/upstream_tests.json](recipes/benchmarks/results/upstream_tests.json)."
    )


SECTIONS = {
    "main_job": main_job,
    "speed": speed,
    "memory": memory,
    "clinical_notes": clinical_notes,
    "upstream_tests": upstream_tests,
}


def filled(text: str) -> str:
    """The text with every marked section replaced by what the results say now."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- results: {name} -->\n{SECTIONS[name]()}\n<!-- /results -->"

    return re.sub(r"<!-- results: (\w+) -->\n.*?<!-- /results -->", fill, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale: list[Path] = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if filled(text) != text:
            stale.append(path)
            if not check:
                path.write_text(filled(text), encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(RECIPES.parent)}: {'does not show the committed results' if check else 'updated'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
