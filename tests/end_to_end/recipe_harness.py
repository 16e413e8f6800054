"""A tiny pretrained model and notes that it can learn, for running recipes in seconds."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# Recipes are programs: they import their neighbours as a program started in that folder does.
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

CONFIGS = RECIPES / "configs" / "accelerate"
WORDS = {"heart": "pulse valve aorta beat", "lung": "breath cough wheeze sputum", "skin": "rash itch mole blister"}
FILLERS = "today the patient reports some more for two weeks".split()
KNOWN = (*FILLERS, *" ".join(WORDS.values()).split())
RESULTS = {
    "README.md",
    "all_results.json",
    "config.json",
    "l2sp_report.html",
    "l2sp_report.json",
    "l2sp_report.png",
    "l2sp_state.json",
    "model.safetensors",
    "run.json",
    "tokenizer.json",
    "trainer_state.json",
}


def save_tiny_model(folder: Path, words: Sequence[str] = KNOWN) -> str:
    """Saves a BERT encoder of two narrow layers, without dropout, and a WordPiece tokenizer that knows `words`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    vocabulary = {word: index for index, word in enumerate(words)}
    wordpiece = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=wordpiece, model_max_length=32, **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,  # so narrow a model needs larger weights to tell words apart
    )
    set_seed(0)
    BertModel(config).save_pretrained(folder)
    return str(folder)


def notes(per_class: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose label is told by the words in them, among fillers."""
    draw = random.Random(seed)
    rows = [
        {"text": " ".join(draw.sample(FILLERS, 3) + draw.sample(words.split(), 2)), "label": label}
        for label, words in WORDS.items()
        for _ in range(per_class)
    ]
    draw.shuffle(rows)
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def results_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


def launch(config: str, *words: str, timeout: float = 300) -> tuple[int, str, str]:
    """Runs `accelerate launch --config_file CONFIG WORDS`; exit code, standard output and standard error.

    Args:
        config: Name of a file in `recipes/configs/accelerate`, or `torchrun` for two processes started by torchrun.
        words: The program and its arguments.
        timeout: Seconds until the launch counts as hanging and all its processes are ended.
    """
    if config == "torchrun":
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    else:
        command = ["accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", *command, *words]
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as launcher:
        try:
            out, err = launcher.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):  # the launcher and what it started
                os.killpg(launcher.pid, signal.SIGKILL)
    return launcher.returncode, out, err
