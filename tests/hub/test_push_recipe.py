"""A recipe with --push_to_hub as a program of its own: what it asks the Hub, what arrives, what can be made of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..end_to_end.recipe_harness import RECIPES, notes, write_jsonl
from . import worker
from .conftest import BASE, Remote
from .server import TOKEN

REPO = "somebody/notes-by-recipe"
# Where the program starts: no machine but this one is called, and the host has a name to look for.
ONLY_HERE = f"""
import socket
connect = socket.socket.connect
def only_here(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost"):
        raise OSError(f"the recipe called {{address}}")
    return connect(self, address)
socket.socket.connect = only_here
socket.gethostname = lambda: {worker.HOST!r}
"""


@pytest.fixture(scope="module")
def pushed(remote: Remote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Output folder, requests, uploaded files and rows of data of a run on a model of the Hub."""
    data, out = remote.home / "private_data", remote.home / "recipe_out"
    data.mkdir()
    splits = {name: notes(per_class, seed) for name, per_class, seed in (("train", 8, 1), ("test", 4, 2))}
    for name, rows in splits.items():
        write_jsonl(data / f"{name}.jsonl", rows)
    started = tmp_path_factory.mktemp("started")
    (started / "sitecustomize.py").write_text(ONLY_HERE, encoding="utf-8")
    words = ["--push_to_hub", "--hub_model_id", REPO, "--hub_private_repo", "true", "--output_dir", str(out)]
    words += ["--train_file", str(data / "train.jsonl"), "--test_file", str(data / "test.jsonl")]
    words += ["--model_name_or_path", BASE, "--max_steps", "20", "--learning_rate", "1e-2", "--use_cpu"]
    words += ["--max_seq_length", "32", "--compare", "--report_to", "tensorboard"]
    remote.hub.requests.clear()
    done = subprocess.run(
        [sys.executable, str(RECIPES / "medical_textcls.py"), *words],
        env={**os.environ, **remote.environment, "PYTHONPATH": str(started), "HF_HOME": str(remote.home / "another")},
        capture_output=True,
        text=True,
        cwd=remote.home,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        "out": out,
        "said": done.stdout,
        "requests": remote.new_requests(),
        "files": remote.hub.repositories[REPO].files,
        "texts": [row["text"] for rows in splits.values() for row in rows],
    }


def test_requests(pushed: dict[str, Any]) -> None:
    """The repository is opened before anything is trained; the model goes up once, at the end, in one commit."""
    asked = pushed["requests"]
    writes = [request for request in asked if not request.startswith(("GET", "HEAD"))]
    assert writes[0] == "POST /api/repos/create -> 200"
    (commit,) = (request for request in writes if "/commit/" in request)
    assert commit == f"POST /api/models/{REPO}/commit/main -> 200" and writes[-1] == commit
    assert not [request for request in asked if re.search(r"-> 5\d\d$|no such route|dropped", request)]
    # The base model is read from the Hub, and large files go there by their hash.
    assert any(request.startswith(f"GET /{BASE}/resolve/") for request in asked)
    assert len([request for request in writes if request.startswith("PUT /large/")]) == 2  # weights and picture
    assert f"Pushed to the Hub as {REPO}." in pushed["said"]


def test_uploaded_files(pushed: dict[str, Any], remote: Remote) -> None:
    assert set(pushed["files"]) - {"special_tokens_map.json", "vocab.txt"} == {
        ".gitattributes",
        "README.md",
        "all_results.json",
        "comparison.json",
        "config.json",
        "eval_predictions.json",  # counts alone
        "l2sp_report.json",
        "l2sp_report.png",
        "l2sp_state.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    }
    assert remote.hub.repositories[REPO].private
    kept = {path.name for path in pushed["out"].rglob("*")}
    assert {"run.json", "l2sp_report.html"} <= kept and any("tfevents" in name for name in kept)


def test_nothing_private_is_uploaded(pushed: dict[str, Any], remote: Remote) -> None:
    private = [TOKEN, str(remote.home), remote.home.parent.name, "private_data", "private_base", worker.HOST]
    private += pushed["texts"]
    for _, message, files in remote.hub.repositories[REPO].commits:
        for path, content in files.items():
            found = [word for word in private if word.encode() in content or word in path]
            assert not found, (message, path, found)
    # They are in what stays, or this test would see nothing.
    assert "private_data" in (pushed["out"] / "run.json").read_text(encoding="utf-8")


def test_card_and_state(pushed: dict[str, Any], remote: Remote) -> None:
    _, header, body = pushed["files"]["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["base_model"] == BASE and "l2-sp" in card["tags"] and "](l2sp_report.png)" in body
    results = json.loads(pushed["files"]["all_results.json"])
    told = {
        metric["type"]: metric["value"]
        for result in card["model-index"][0]["results"]
        for metric in result["metrics"]
        if result["dataset"].get("split") == "test"
    }
    assert told["accuracy"] == pytest.approx(results["test_accuracy"]) and results["test_accuracy"] > 0.5
    anchor = json.loads(pushed["files"]["l2sp_state.json"])["anchor"]
    assert anchor["source"] == BASE and anchor["revision"] == remote.hub.repositories[BASE].commits[-1][0]


def test_loads_again_by_its_name(pushed: dict[str, Any], remote: Remote, tmp_path: Path) -> None:
    assert remote(worker.weights_equal, str(pushed["out"]), REPO, str(tmp_path / "cache"))
    texts = pushed["texts"][:6]
    labels = remote(worker.answers, REPO, texts)
    assert labels == remote(worker.answers, str(pushed["out"]), texts)
    assert set(labels) <= {"heart", "lung", "skin"} and len(set(labels)) > 1
