"""Writes the committed results into README.md and the data's README, between their markers.

    python recipes/benchmarks/readme.py [--check]

With --check nothing is written, and the exit code is 1 where a README does not show the committed results.
"""

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

from _bench import RECIPES, read_results

SHOWN = ("f1_macro", "nll")  # of the quality study
FILES = (RECIPES.parent / "README.md", RECIPES / "data" / "clinical_notes" / "README.md")


def interval(found: dict[str, float]) -> str:
    """A mean difference and its 95 % interval."""
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


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


def _cell(found: dict[str, float]) -> str:
    return f"{found['mean']:.3f} ± {found['std']:.3f}"


def domains() -> str:
    result = read_results("domains.json")
    lines = ["| recipe | data, training texts | score | plain | L2-SP | seeds on which L2-SP is better |"]
    lines.append("|---|---|---|---|---|---|")
    names = {"test_f1_macro": "macro-F1", "test_f1": "entity F1", "test_loss": "NLL"}
    for row in result["summary"]:
        unit = "entity type" if row["recipe"].endswith("_ner") else "class"
        texts = "all" if row["shots"] is None else f"{row['shots']} per {unit}"
        for score, name in names.items():
            found = row["scores"].get(score)
            if found is not None:
                better = f"{found['l2sp_better']} of {row['seeds']}"
                cells = (row["recipe"], f"{row['data']}, {texts}", name, _cell(found["plain"]), _cell(found["l2sp"]))
                lines.append(f"| {' | '.join(cells)} | {better} |")
    steps, rows = result["config"]["common"]["max_steps"], result["config"]["rows"]["test"]
    lines.append(f"\nMean ± standard deviation over the seeds; {steps} steps of 16 texts, {rows} test texts (or all).")
    return "\n".join(lines)


def scarce_labels() -> str:
    result = read_results("scarce_labels.json")
    named = {
        "plain": "plain fine-tuning",
        "l2sp": "L2-SP (λ = 0.01)",
        "edits": "L2-SP + swap, delete, insert",
        "mask": "L2-SP + words of a masked language model",
        "mixup": "L2-SP + mix-up of embeddings",
        "ensemble": "ensemble of 3 L2-SP models",
        "distill": "L2-SP + distillation of that ensemble",
    }
    lines = ["| per class | method | macro-F1 | beside L2-SP [95 %] | NLL | beside L2-SP [95 %] | ECE |"]
    lines.append("|---|---|---|---|---|---|---|")

    def beside(found: dict[str, Any]) -> str:
        other = found.get("beside_l2sp")
        return "" if other is None else interval(other)

    for row in result["summary"]:
        cells = [str(row["shots"]), named[row["method"]]]
        for score in ("f1_macro", "nll"):
            cells += [_cell(row[score]), beside(row[score])]
        lines.append(f"| {' | '.join([*cells, _cell(row['ece'])])} |")
    config, data = result["config"], sorted({row["data"] for row in result["summary"]})
    lines.append(
        f"\n{', '.join(data)}, {max(row['seeds'] for row in result['summary'])} draws, {config['test_rows']} test "
        f"texts of {config['max_length']} tokens, {config['max_steps']} steps of 16 for every method; distillation "
        f"sees {config['unlabelled_rows']} unlabelled texts."
    )
    return "\n".join(lines)


def domain_adaptation() -> str:
    result = read_results("domain_adaptation.json")["summary"]
    start, common = result["adaptation"]["start"], result["adaptation"]["common_domain_perplexity"]
    names = {0.0: "plain"}
    lines = ["| adaptation | domain perplexity | general perplexity | general, at equal domain perplexity | drift |"]
    lines += ["|---|---|---|---|---|", f"| start | {start['domain']:.0f} | {start['general']:.0f} | | |"]
    for run in result["adaptation"]["runs"]:
        name, end = names.get(run["lambda"], f"L2-SP, λ = {run['lambda']:g}"), run["end"]
        drift = "" if run["drift"] is None else f"{run['drift']:.4f}"
        name += f", {run['max_steps']} steps"
        at_common = "" if run["general_at_common_domain"] is None else f"{run['general_at_common_domain']:.0f}"
        lines.append(f"| {name} | {end['domain']:.0f} | {end['general']:.0f} | {at_common} | {drift} |")
    lines[0] = lines[0].replace("equal domain perplexity", f"domain perplexity {common:.0f}")
    lines += ["", "| then few-shot classification from | anchor | draws | macro-F1 | NLL |", "|---|---|---|---|---|"]
    models = {"general": "the general model", "plain": "plain adaptation"}
    for row in result["classification"]:
        model = models.get(row["model"], f"L2-SP adaptation, λ = {row['model'].removeprefix('lambda ')}")
        scores = f"{_cell(row['test_f1_macro'])} | {_cell(row['test_loss'])}"
        lines.append(f"| {model} | {row['anchor']} | {row['seeds']} | {scores} |")
    return "\n".join(lines)


def quality() -> str:
    result = read_results("quality.json")
    methods, shots = result["summary"]["methods"], result["summary"]["shots"]
    sets = list(dict.fromkeys(name for row in methods for name in row["sets"]))
    lines = [f"| method | {' | '.join(sets)} | mean: macro-F1 [95 %] | NLL [95 %] | better F1, NLL |"]
    lines.append(f"|---|{'---|' * len(sets)}---|---|---|")
    for row in methods:
        cells = []
        for name in sets:
            found = row["sets"].get(name)
            if found is None:
                cells.append("")
                continue
            key, sign = ("mean", "") if row["method"] == "plain" else ("added", "+")
            cells.append(" / ".join(f"{found[score][key]:{sign}.3f}" for score in SHOWN) + f" ({found['draws']})")
        if row["method"] == "plain":
            cells += ["", "", ""]
        else:
            pooled = [row["all"][score] for score in SHOWN]
            cells += [interval(found) for found in pooled]
            cells.append(" and ".join(str(found["wins"]) for found in pooled) + f" of {row['draws']}")
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    training, rows = result["config"]["training"], result["config"]["test_rows"]
    steps, batch, rate = (training[key] for key in ("max_steps", "per_device_train_batch_size", "learning_rate"))
    lines.append(
        f"\nmacro-F1 / NLL with {shots} texts per class: of plain fine-tuning, and of the others what they add on "
        f"the same draws (their number in brackets). {steps} steps of {batch}, learning rate {rate:g}, {rows} test "
        "texts. Intervals are those of a paired bootstrap over data sets and draws."
    )
    return "\n".join(lines)


def oracle() -> str:
    lines = [
        "| data, labelled texts | draws | plain | auto | auto beside plain | best λ | auto beside it "
        "| auto beside the best λ of the other draws |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")

    def give_or_take(error: float | None) -> str:
        return "" if error is None else f" ± {error:.3f}"

    def added(found: dict[str, Any]) -> str:
        return " / ".join(f"{found[s]['auto_adds']:+.3f}{give_or_take(found[s]['error'])}" for s in SHOWN)

    summary = read_results("quality.json")["summary"]
    others = {(row["data"], row["shots"]): row["differences"] for row in summary["other_draws"]}
    for row in summary["oracle"]:
        scores = [" / ".join(f"{row[score][name]:.3f}" for score in SHOWN) for name in ("plain", "auto")]
        texts = f"{row['data']}, {'all' if row['shots'] == 0 else str(row['shots']) + ' per class'}"
        searched = len(row["grid"]) > 1
        found = row["oracle"]["f1_macro"]
        best = f"{row['best']:g} of {len(row['grid'])} ({found['draws']}): {found['own_mean']:.3f}"
        cells = [texts, str(row["draws"]), *scores, added(row["plain"])]
        cells += [best + give_or_take(found["own_error"]), added(row["oracle"])] if searched else ["", ""]
        other = others.get((row["data"], row["shots"]))
        cells.append("" if other is None else " / ".join(f"{statistics.mean(other[s]):+.3f}" for s in SHOWN))
        lines.append(f"| {' | '.join(cells)} |")
    whole, part = (
        f"{' / '.join(interval(mean[s]) for s in SHOWN)} ({mean['cells']} rows)"
        for mean in (summary["overall"], summary["overall_other_draws"])
    )
    lines.append(f"| mean [95 %] | | | | {whole} | | | {part} |")
    lines.append(
        "\nmacro-F1 / NLL; differences with their standard error over the draws. The best λ of the grid, 0 among it, "
        "is chosen by macro-F1 *on the test texts*, on the draws in brackets, which no search can do; with "
        "its macro-F1 and the standard error of that. It has the luck of the draws that it was chosen on; in the last "
        "column each draw is set against the λ that is best on the test texts of all other draws."
    )
    return "\n".join(lines)


def auto_cost() -> str:
    result = read_results("auto_cost.json")
    lines = ["| training rows | time, beside the rest of the training | memory, beside a constant λ |"]
    lines.append("|---|---|---|")
    for case, found in result["cases"].items():
        memory = f"{found['memory_mib']:+.1f} MiB ({found['memory_percent_of_model']:+.1f} % of the model)"
        lines.append(f"| {case} | {found['time_percent']:.2f} % | {memory} |")
    lines.append(f"\n{result['what']}.")
    return "\n".join(lines)


SECTIONS = {
    "quality": quality,
    "oracle": oracle,
    "auto_cost": auto_cost,
    "main_job": main_job,
    "speed": speed,
    "memory": memory,
    "clinical_notes": clinical_notes,
    "upstream_tests": upstream_tests,
    "domains": domains,
    "domain_adaptation": domain_adaptation,
    "scarce_labels": scarce_labels,
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
