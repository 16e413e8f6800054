"""θ0 stays θ0: killed and resumed runs, trainers built on checkpoints, and refusals where it cannot be had."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import is_accelerate_available

from hf_l2sp import Anchor, L2SPTrainer, L2SPTrainingArguments, interpolate

from .harness import snapshot

WORKER = Path(__file__).with_name("training_worker.py")
# accelerate before 1.15 shuffles the epoch that a run resumes in as if it were the first: plain Trainer resumes bit
# for bit in the first epoch only, which has six steps here. Remove when 1.15 is the floor.
KILLS = (5, 9) if is_accelerate_available("1.15") else (3, 5)


def work(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(WORKER), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def comparable_logs(folder: Path) -> list[dict]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in history[:-1]]


@pytest.mark.parametrize("unfreeze", [False, True])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tiny_bert_dir, tmp_path, unfreeze):
    extra = ["--unfreeze"] if unfreeze else []
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = work(tiny_bert_dir, str(whole), *extra)
    assert done.returncode == 0, done.stderr[-2000:]
    for kill, resume in zip(KILLS, ([], ["--resume"]), strict=True):  # killed twice: a resumed run is killed too
        killed = work(tiny_bert_dir, str(cut), "--kill", str(kill), *resume, *extra)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
        assert not (cut / "outcome.json").exists()
    resumed = work(tiny_bert_dir, str(cut), "--resume", *extra)
    assert resumed.returncode == 0, resumed.stderr[-2000:]

    a, b = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()
    for name in ("optimizer.pt", "scheduler.pt"):
        x, y = (torch.load(f / "checkpoint-12" / name, weights_only=True) for f in (whole, cut))
        assert equal(x, y), name
    assert json.loads((whole / "outcome.json").read_text()) == json.loads((cut / "outcome.json").read_text())
    assert (whole / "l2sp_state.json").read_bytes() == (cut / "l2sp_state.json").read_bytes()
    names = json.loads((cut / "outcome.json").read_text())["names"]
    assert any("embeddings" in name for name in names)
    # The last log window before the end was trained in one process in both runs.
    assert comparable_logs(whole)[-1] == comparable_logs(cut)[-1]
    assert comparable_logs(whole)[-1]["l2sp_distance"] > 0


def equal(x, y) -> bool:
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def trainer_for(model, data, folder, cls=L2SPTrainer, config=L2SPTrainingArguments, **kwargs):
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    if config is L2SPTrainingArguments:
        settings["l2sp_lambda"] = 0.3
    return cls(model=model, args=config(**{**settings, **kwargs}), train_dataset=data)


@pytest.fixture
def pretrained(tiny_bert_dir, tmp_path):
    """A pretrained folder that a test may move or delete."""
    folder = tmp_path / "pretrained"
    shutil.copytree(tiny_bert_dir, folder)
    return folder


@pytest.fixture
def trained(pretrained, classification_data, tmp_path):
    """A run of four steps with checkpoints 2 and 4, and θ0 as it was before."""
    model = load(pretrained)
    origin = snapshot(model)
    trainer = trainer_for(model, classification_data, tmp_path / "run")
    trainer.train()
    return tmp_path / "run", origin, trainer


def load(folder):
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.accepts_loss_kwargs = False
    return model


def test_every_checkpoint_and_the_final_folder_hold_the_state(trained):
    folder, _, trainer = trained
    trainer.save_model()
    for at in (folder, folder / "checkpoint-2", folder / "checkpoint-4"):
        state = json.loads((at / "l2sp_state.json").read_text())
        assert state["format_version"] == 1
        assert state["hf_l2sp_version"]
        assert state["anchor"]["fingerprint"] == trainer.l2sp_anchor.fingerprint
        assert state["anchor"]["source"].endswith("pretrained")
        assert state["anchor"]["revision"] is None
        assert state["strength"]["base"] == 0.3 and state["strength"]["schedule"] == "constant"
    assert json.loads((folder / "checkpoint-2" / "l2sp_state.json").read_text())["strength"]["step"] == 2


def test_trainer_on_a_checkpoint_folder_keeps_the_pretrained_anchor(trained, classification_data, tmp_path):
    folder, origin, first = trained
    for checkpoint in (folder / "checkpoint-2", folder / "checkpoint-4"):
        model = load(checkpoint)
        again = trainer_for(model, classification_data, tmp_path / "again", max_steps=1)
        again.train()
        assert again.l2sp_anchor.fingerprint == first.l2sp_anchor.fingerprint
        assert all(torch.equal(again.l2sp_anchor[name], origin[name]) for name in again.l2sp_anchor)
        assert "classifier.weight" not in again.l2sp_anchor
        assert again.state.log_history[0]["l2sp_distance"] > 0.01
        # ... and its own checkpoints say so, so that the chain never ends.
        state = json.loads((tmp_path / "again" / "checkpoint-1" / "l2sp_state.json").read_text())
        assert state["anchor"]["source"].endswith("pretrained")
        shutil.rmtree(tmp_path / "again")


def test_checkpoint_folder_and_resume_together(trained, classification_data, tmp_path):
    folder, _, first = trained
    model = load(folder / "checkpoint-2")
    resumed = trainer_for(model, classification_data, folder)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    for (name, a), (_, b) in zip(first.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_anchor_that_is_gone_is_refused_with_the_fix(trained, pretrained, classification_data, tmp_path):
    folder, origin, _ = trained
    moved = tmp_path / "moved"
    pretrained.rename(moved)
    model = load(folder / "checkpoint-4")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"l2sp_state\.json as .*pretrained.*set l2sp_anchor"):
        trainer_for(model, classification_data, tmp_path / "x").train()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    fixed = trainer_for(model, classification_data, tmp_path / "x", l2sp_anchor=str(moved), max_steps=1)
    fixed.train()
    assert all(torch.equal(fixed.l2sp_anchor[name], origin[name]) for name in fixed.l2sp_anchor)
    # The fine-tuned weights become θ0 only when that is said.
    on_purpose = trainer_for(
        load(folder / "checkpoint-4"),
        classification_data,
        tmp_path / "y",
        l2sp_anchor=str(folder / "checkpoint-4"),
        max_steps=1,
    )
    on_purpose.train()
    assert on_purpose.state.log_history[0]["l2sp_distance"] == 0.0


def test_anchor_that_was_replaced_is_refused(trained, pretrained, classification_data, tmp_path):
    folder, _, _ = trained
    other = load(pretrained)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    other.bert.save_pretrained(pretrained)
    with pytest.raises(ValueError, match="1 of 39 tensors differ, first bert.embeddings.word_embeddings.weight"):
        trainer_for(load(folder / "checkpoint-4"), classification_data, tmp_path / "x").train()


def test_resuming_against_another_anchor_raises(trained, pretrained, classification_data, tmp_path):
    folder, _, _ = trained
    checkpoint = str(folder / "checkpoint-2")
    model = load(pretrained)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    before = snapshot(model)
    with pytest.raises(ValueError, match="anchor differs from the one .* was trained against.*fingerprint"):
        trainer_for(model, classification_data, folder).train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters()), "nothing may have been loaded"
    # The same weights with the anchor named are right.
    named = trainer_for(model, classification_data, folder, l2sp_anchor=str(pretrained))
    named.train(resume_from_checkpoint=checkpoint)


def test_second_trainer_on_a_trained_model_resumes_only_with_the_anchor_named(
    trained, pretrained, classification_data, tmp_path
):
    folder, origin, first = trained
    again = trainer_for(first.model, classification_data, folder)
    with pytest.raises(ValueError, match="Hand the trainer the same pretrained model"):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    named = trainer_for(first.model, classification_data, folder, l2sp_anchor=str(pretrained))
    named.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert all(torch.equal(named.l2sp_anchor[name], origin[name]) for name in named.l2sp_anchor)


def test_second_trainer_on_a_trained_model_warns(trained, classification_data, tmp_path, caplog):
    _, _, first = trained
    with caplog.at_level("WARNING"):
        trainer_for(first.model, classification_data, tmp_path / "second", max_steps=1).train()
    assert "already trained by another L2SPTrainer in this process" in caplog.text


def test_resuming_a_plain_run_warns_that_the_anchor_cannot_be_checked(
    pretrained, classification_data, tmp_path, caplog
):
    plain = trainer_for(load(pretrained), classification_data, tmp_path / "plain", Trainer, TrainingArguments)
    plain.train()
    model = load(pretrained)
    origin = snapshot(model)
    trainer = trainer_for(model, classification_data, tmp_path / "plain")
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    assert "has no l2sp_state.json" in caplog.text
    assert all(torch.equal(trainer.l2sp_anchor[name], origin[name]) for name in trainer.l2sp_anchor)


def test_damaged_state_file_is_refused(trained, pretrained, classification_data):
    folder, _, _ = trained
    path = folder / "checkpoint-2" / "l2sp_state.json"
    path.write_text(path.read_text()[:300])
    with pytest.raises(ValueError, match="is damaged"):
        trainer_for(load(pretrained), classification_data, folder).train(resume_from_checkpoint=str(path.parent))


def test_anchor_can_be_made_again_from_the_final_folder(trained, classification_data):
    """What the state file is for: anyone can re-create θ0 and go back to it."""
    folder, origin, trainer = trained
    trainer.save_model()
    state = json.loads((folder / "l2sp_state.json").read_text())
    model = load(folder)
    anchor = Anchor.from_pretrained(state["anchor"]["source"], model)
    assert anchor.fingerprint == state["anchor"]["fingerprint"]
    interpolate(model, anchor, 0.0)
    assert all(torch.equal(p, origin[n]) for n, p in model.bert.named_parameters(prefix="bert"))
