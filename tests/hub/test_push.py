"""A push with the real client: what arrives, what does not, and what can be made of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from . import worker
from .conftest import BASE, Remote
from .server import TOKEN

REPO = "team/notes-model"


@pytest.fixture(scope="module")
def pushed(remote: Remote) -> dict[str, Any]:
    """Trained on a model of the Hub with `push_to_hub`, checkpoints and TensorBoard; evaluated, pushed at the end."""
    out = str(remote.home / "out")
    remote.hub.requests.clear()
    options = {"hub_model_id": REPO, "hub_strategy": "checkpoint", "hub_private_repo": True, "hub_token": TOKEN}
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "run_name": f"run on {worker.HOST}", "report_to": "tensorboard"}
    training = remote(worker.train, out, BASE, max_steps=4, push_to_hub=True, **options, **saving, **best)
    while_training = [message for _, message, _ in remote.hub.repositories[REPO].commits]
    scores = remote(worker.evaluate, out)
    result = remote(worker.push, out, dataset="notes of the test")
    assert "commit" in result, result
    return {
        "out": out,
        "training": training,
        "while_training": while_training,
        "scores": scores,
        "requests": remote.new_requests(),
        "files": remote.hub.repositories[REPO].files,
    }


def card_of(files: dict[str, bytes]) -> tuple[dict[str, Any], str]:
    _, header, body = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(header), body


def test_commits_and_files(pushed: dict[str, Any], remote: Remote) -> None:
    assert pushed["training"] == {"steps": 4, "messages": []}
    # The second save came while the first was under way, or not.
    assert pushed["while_training"][:3] == [
        "initial commit",
        "Training in progress, step 2",
        "Training in progress, step 2, checkpoint",
    ]
    assert remote.hub.repositories[REPO].private
    root = {path for path in pushed["files"] if "/" not in path}
    assert root - {"special_tokens_map.json", "vocab.txt"} == {
        ".gitattributes",
        "README.md",
        "all_results.json",
        "config.json",
        "l2sp_report.json",
        "l2sp_report.png",
        "l2sp_state.json",
        "model.safetensors",
        "settings.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    }
    folders = {path.split("/")[0] for path in pushed["files"] if "/" in path}
    assert folders == {"last-checkpoint"}
    assert {"optimizer.pt", "trainer_state.json", "l2sp_state.json", "model.safetensors"} <= {
        Path(path).name for path in pushed["files"] if "/" in path
    }
    assert json.loads(pushed["files"]["l2sp_state.json"])["complete"] is True
    # What Trainer keeps for itself is still there.
    local = Path(pushed["out"])
    assert (local / "training_args.bin").is_file() and list(local.glob("runs/*/*tfevents*"))


def test_nothing_private_is_uploaded(pushed: dict[str, Any], remote: Remote) -> None:
    """Neither token nor path, host or text in any commit, and no file with another name for them."""
    private = [TOKEN, str(remote.home), remote.home.parent.name, worker.HOST, "private_base", *worker.TEXTS]
    commits = remote.hub.repositories[REPO].commits
    assert len(commits) > 3
    for _, message, files in commits:
        for path, content in files.items():
            for word in private:
                assert word.encode() not in content, (message, path, word)
                assert word not in path
            assert not re.search(r"training_args\.bin|tfevents|\.jsonl$|\.log$", path)
    assert len(remote.hub.hosts) == 1
    # They are in what was not uploaded, or the test would see nothing.
    local = Path(pushed["out"])
    assert TOKEN.encode() in (local / "training_args.bin").read_bytes()
    assert str(local).encode() in (local / "trainer_state.json").read_bytes()
    state = json.loads(pushed["files"]["trainer_state.json"])
    assert state["best_model_checkpoint"] in ("checkpoint-2", "checkpoint-4")
    assert json.loads(pushed["files"]["settings.json"]) == {"train_file": "run.log", "shots": 4}


def test_card(pushed: dict[str, Any], tmp_path: Path) -> None:
    data, body = card_of(pushed["files"])
    assert {"l2-sp", "hf-l2sp", "generated_from_trainer"} <= set(data["tags"])
    assert data["base_model"] == BASE and data["library_name"] == "transformers"
    report = json.loads(pushed["files"]["l2sp_report.json"])
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", body, flags=re.MULTILINE))
    assert rows["λ"] == "0.01" and rows["schedule"] == "constant" and rows["mode"] == "loss"
    assert rows["drift ‖θ − θ0‖ / ‖θ0‖"] == f"{report['total']['drift']:.4f}" and report["total"]["drift"] > 0
    assert rows["anchor θ0"] == f"{BASE} at {report['anchor']['revision']}"
    assert "1802.01483" in body and "](l2sp_report.png)" in body and "](l2sp_report.json)" in body
    assert pushed["files"]["l2sp_report.png"].startswith(b"\x89PNG") and report["layers"]


def test_results_are_a_valid_model_index(pushed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(pushed["files"]["README.md"])
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    told = {(r.dataset_split, r.metric_type, r.metric_name): r.metric_value for r in results}
    assert told == {
        ("validation", "accuracy", "accuracy"): 0.5,
        ("validation", "f1", "f1 macro"): 0.25,
        ("validation", "loss", "loss"): pushed["scores"]["eval_loss"],
        ("test", "accuracy", "accuracy"): 0.625,
        ("test", "loss", "loss"): 0.75,
    }
    assert {(r.task_type, r.dataset_name) for r in results} == {("text-classification", "notes of the test")}
    name, again = model_index_to_eval_results(card_of(pushed["files"])[0]["model-index"])
    assert name == "notes-model" and len(again) == len(results)


def test_downloaded_model_is_the_trained_one(pushed: dict[str, Any], remote: Remote, tmp_path: Path) -> None:
    assert remote(worker.same_weights, pushed["out"], REPO, str(tmp_path / "cache"))
    assert remote(worker.classify, pushed["out"], REPO, str(tmp_path / "cache"))


def test_anchor_can_be_had_again(pushed: dict[str, Any], remote: Remote, tmp_path: Path) -> None:
    again = remote(worker.anchor_again, REPO, str(tmp_path))
    assert again["source"] == BASE and again["revision"] == remote.hub.repositories[BASE].commits[-1][0]
    assert again["fingerprint"] == again["of_folder"] == again["recorded"]
    assert again["fingerprint"] == remote(worker.fingerprint, pushed["out"])


def test_training_goes_on_from_the_checkpoint_on_the_hub(
    pushed: dict[str, Any], remote: Remote, tmp_path: Path
) -> None:
    assert remote(worker.resume, str(tmp_path / "out"), BASE, REPO, str(tmp_path / "cache")) == 6


def test_second_push_sends_only_what_has_changed(pushed: dict[str, Any], remote: Remote) -> None:
    before = dict(remote.hub.repositories[REPO].files)
    remote(worker.push, pushed["out"], dataset="notes of the test", license="mit")
    asked = remote.new_requests()
    assert not [request for request in asked if request.startswith("PUT")]
    after = remote.hub.repositories[REPO].files
    assert {path for path in after if after[path] != before.get(path)} == {"README.md"}
    assert card_of(after)[0]["license"] == "mit"


def test_local_base_model(remote: Remote) -> None:
    """θ0 from a folder: its path stays here; the base model that the card names tells where θ0 is to be had."""
    out = str(remote.home / "local")
    remote(worker.train, out, remote.local_base)
    remote(worker.matplotlib_is_there, False)
    for named, source in ((None, None), (BASE, BASE)):
        assert "commit" in remote(worker.push, out, finetuned_from=named)
        files = remote.hub.repositories["somebody/local"].files
        assert json.loads(files["l2sp_state.json"])["anchor"]["source"] == source
        assert json.loads(files["l2sp_report.json"])["anchor"]["source"] == source
        assert not any(str(remote.home).encode() in content for content in files.values())
        assert card_of(files)[0].get("base_model") == named
    remote(worker.matplotlib_is_there, True)
    assert f"| anchor θ0 | a local copy of {BASE} |" in card_of(files)[1]
    assert json.loads((Path(out) / "l2sp_state.json").read_text())["anchor"]["source"] == remote.local_base
    assert not remote.hub.repositories["somebody/local"].private


@pytest.mark.slow
def test_lambda_0_pushes_as_trainer_does(remote: Remote) -> None:
    uploaded = []
    for name, options in (("plain", {"plain": True}), ("zero", {"l2sp_lambda": 0.0})):
        out = str(remote.home / name)
        remote(worker.train, out, BASE, push_to_hub=True, save_strategy="steps", save_steps=1, **options)
        assert "commit" in remote(worker.push, out)
        repository = remote.hub.repositories[f"somebody/{name}"]
        different = ("README.md", "training_args.bin")  # the name of the folder
        files = {path: content for path, content in repository.files.items() if path not in different}
        uploaded.append((sorted(repository.files), files))
    assert uploaded[0] == uploaded[1]
    assert "training_args.bin" in uploaded[0][0] and "l2sp_state.json" not in uploaded[0][0]
