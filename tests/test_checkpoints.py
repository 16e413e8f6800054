"""Whole checkpoints and others: told apart, chosen, deleted, and explained where they cannot be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp import checkpoints as module
from hf_l2sp.checkpoints import _delete_leftovers, _is_leftover, checkpoints_in, last_complete, why_incomplete
from hf_l2sp.state import mark_complete, read_state, write_state


def make(model, data, folder, cls=L2SPTrainer, **kwargs):
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **({"l2sp_lambda": 0.3} if cls is L2SPTrainer else {}),
    )
    config = L2SPTrainingArguments if cls is L2SPTrainer else TrainingArguments
    args = config(**{**settings, **kwargs})
    return cls(model=model, args=args, train_dataset=data, eval_dataset=data[:8])


@pytest.fixture(scope="module")
def finished(tiny_bert_dir, classification_data, tmp_path_factory):
    """A run of four steps with checkpoints 2 and 4. Read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    torch.manual_seed(0)
    make(load(tiny_bert_dir), classification_data, folder).train()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def load(folder):
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.accepts_loss_kwargs = False
    return model


@pytest.fixture
def model(tiny_bert_dir):
    torch.manual_seed(0)
    return load(tiny_bert_dir)


def edit(folder, **changes):
    path = folder / "l2sp_state.json"
    state = json.loads(path.read_text())
    state.update(changes)
    path.write_text(json.dumps({key: value for key, value in state.items() if value is not None}))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- judging --------------------------------------------------------------------------------------------------------

DAMAGE = {
    "marked": (lambda folder: edit(folder, complete=False), "the process that wrote it ended before it was done"),
    "no trainer state": (lambda folder: (folder / "trainer_state.json").unlink(), "it has no trainer_state.json"),
    "half a trainer state": (
        lambda folder: cut(folder / "trainer_state.json"),
        "its trainer_state.json cannot be read",
    ),
    "half a state": (lambda folder: cut(folder / "l2sp_state.json"), "l2sp_state.json is damaged"),
    "strange mark": (lambda folder: edit(folder, complete="perhaps"), "complete is 'perhaps'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole(run, model, classification_data, caplog, damage):
    act, cause = DAMAGE[damage]
    act(run / "checkpoint-4")
    assert cause in why_incomplete(run / "checkpoint-4")
    assert last_complete(checkpoints_in(run))[0] == str(run / "checkpoint-2")
    with pytest.raises(ValueError) as caught:
        make(model, classification_data, run).train(resume_from_checkpoint=f"{run / 'checkpoint-4'}/")
    assert cause in str(caught.value) and "checkpoint-4/ is not complete: " in str(caught.value)
    assert f"Resume from {run / 'checkpoint-2'}, the last complete one there" in str(caught.value)
    trainer = make(model, classification_data, run)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer._l2sp_checkpoint == str(run / "checkpoint-2")
    told = [record.getMessage() for record in caplog.records if "not complete" in record.getMessage()]
    assert len(told) == 1 and cause in told[0] and f"{run / 'checkpoint-4'} is not complete" in told[0]
    assert "can be deleted" in told[0] and f"goes on from {run / 'checkpoint-2'}" in told[0]
    assert why_incomplete(run / "checkpoint-4") is None  # written again


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: edit(folder, complete=None),  # of an earlier version
        lambda folder: (folder / "l2sp_state.json").unlink(),  # of plain Trainer
        lambda folder: edit(folder, format_version=2),  # refused where it is resumed from
        lambda folder: (folder / "optimizer.pt").unlink(),  # Trainer does without
    ],
)
def test_what_passes(run, change):
    change(run / "checkpoint-4")
    assert why_incomplete(run / "checkpoint-4") is None


def test_later_format_is_refused_and_not_skipped(run, model, classification_data):
    edit(run / "checkpoint-4", format_version=2)
    with pytest.raises(ValueError, match="has format version 2"):
        make(model, classification_data, run).train(resume_from_checkpoint=True)


def test_order_is_that_of_the_steps(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100-old", "checkpoints", "checkpoint-x", "run-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert [Path(path).name for path in checkpoints_in(tmp_path)] == ["checkpoint-10", "checkpoint-9"]
    assert checkpoints_in(tmp_path / "nowhere") == []


def test_whole_run_is_resumed_without_a_word(run, model, classification_data, caplog):
    trainer = make(model, classification_data, run, max_steps=5)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer._l2sp_checkpoint == str(run / "checkpoint-4") and "complete" not in caplog.text


def test_nothing_to_resume_from(model, classification_data, tmp_path):
    trainer = make(model, classification_data, tmp_path / "run")
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):  # that of Trainer
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="Can't find a valid checkpoint at"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
    half = tmp_path / "run" / "checkpoint-2"
    half.mkdir()
    with pytest.raises(
        ValueError, match=rf"No complete checkpoint found .*{half} is not complete \(it has no .*without resume_from"
    ):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=f"The checkpoint {half} is not complete: .* No checkpoint there is: start"):
        trainer.train(resume_from_checkpoint=str(half))


# --- marking --------------------------------------------------------------------------------------------------------


def test_mark_comes_last_and_before_the_push(model, classification_data, tmp_path, monkeypatch):
    """A folder that is pushed must be complete, or what is downloaded again could not be resumed from."""
    seen = []

    def look(name):
        seen.append((name, read_state(tmp_path / "run" / "checkpoint-2")["complete"]))

    def spy(name):
        whole = getattr(Trainer, name)

        def method(self, *args, **kwargs):
            look(name)
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, name, method)

    saves = ("_save", "_save_optimizer_and_scheduler", "_save_rng_state")
    for name in saves:
        spy(name)
    monkeypatch.setattr("hf_l2sp.outputs.push_checkpoint", lambda trainer, folder: look("push"))
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    trainer = make(model, classification_data, tmp_path / "run", max_steps=2)
    trainer.args.push_to_hub = True
    trainer.train()
    assert seen == [*((name, False) for name in saves), ("push", True)]
    assert "save_to_json" not in vars(trainer.state)


def test_final_folder_is_marked(model, classification_data, tmp_path, monkeypatch):
    trainer = make(model, classification_data, tmp_path / "run", save_strategy="no", max_steps=1)
    trainer.train()
    seen = []
    whole = Trainer._save

    def save(self, folder=None, *args, **kwargs):
        seen.append(read_state(tmp_path / "run")["complete"])
        return whole(self, folder, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_save", save)
    trainer.save_model()
    assert seen == [False] and read_state(tmp_path / "run")["complete"] is True


def test_mark_changes_nothing_else(tmp_path):
    write_state(tmp_path, {"anchor": {"fingerprint": "é", "source": None}}, complete=False)
    before = (tmp_path / "l2sp_state.json").read_text()
    mark_complete(tmp_path)
    assert (tmp_path / "l2sp_state.json").read_text() == before.replace('"complete": false', '"complete": true')
    assert os.listdir(tmp_path) == ["l2sp_state.json"]


def test_unfinished_state_files_do_not_stay(tmp_path, monkeypatch):
    (tmp_path / ".l2sp_state.json.123").write_text("{")  # of a process that was killed
    write_state(tmp_path, {"anchor": {}}, complete=False)
    assert os.listdir(tmp_path) == ["l2sp_state.json"]

    def full(self, *args, **kwargs):
        self.write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        mark_complete(tmp_path)
    assert os.listdir(tmp_path) == ["l2sp_state.json"]
    assert json.loads((tmp_path / "l2sp_state.json").read_text())["complete"] is False


# --- deleting -------------------------------------------------------------------------------------------------------


def test_older_checkpoint_stays_until_the_new_one_is_whole(
    model, tiny_bert_dir, classification_data, tmp_path, monkeypatch
):
    """With save_total_limit 1 nothing would be left if the older one went first."""

    def fail(folder):
        if folder.endswith("checkpoint-4"):
            raise OSError(errno.ENOSPC, "No space left on device")
        mark_complete(folder)

    monkeypatch.setattr(module, "mark_complete", fail)
    trainer = make(model, classification_data, tmp_path / "run", save_total_limit=1)
    with pytest.raises(OSError, match="No space left on device"):
        trainer.train()
    assert why_incomplete(tmp_path / "run" / "checkpoint-2") is None
    monkeypatch.undo()
    trainer = make(load(tiny_bert_dir), classification_data, tmp_path / "run", save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._l2sp_checkpoint.endswith("checkpoint-2")
    assert [Path(path).name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-4"]


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("order", ["number", "time"])
def test_leftovers_do_not_take_the_place_of_whole_checkpoints(run, model, classification_data, limit, order):
    """Resumed with other save steps, so that the half-written folders are never written again."""
    for name in ("checkpoint-3", "checkpoint-9"):
        shutil.copytree(run / "checkpoint-4", run / name)
        edit(run / name, complete=False)
    for name in ("checkpoint-7", "checkpoint-8"):
        (run / name).mkdir()
    (run / "checkpoint-7" / ".l2sp_state.json.123").write_text("{")
    # Trainer goes by the time where the oldest and the newest are more than a second apart.
    for number, name in enumerate(["checkpoint-2", "checkpoint-4", *(f"checkpoint-{n}" for n in (3, 7, 8, 9))]):
        then = time.time() - (3600 - number if order == "time" else -1)
        os.utime(run / name, (then, then))
    trainer = make(model, classification_data, run, max_steps=6, save_total_limit=limit)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    there = {int(path.rpartition("-")[2]) for path in checkpoints_in(run)}
    # Without a limit nothing is deleted: nobody asked for it.
    assert there == ({4, 6} if limit else {2, 3, 4, 6, 7, 8, 9})
    assert why_incomplete(run / "checkpoint-6") is None


@pytest.mark.parametrize(
    ("change", "leftover"),
    [
        (lambda folder: edit(folder, complete=False), True),
        (lambda folder: None, False),
        (lambda folder: edit(folder, complete=None), False),
        (lambda folder: edit(folder, complete=False, format_version=2), False),
        (lambda folder: cut(folder / "l2sp_state.json"), False),
        (lambda folder: (folder / "l2sp_state.json").unlink(), False),
        (lambda folder: (folder / "trainer_state.json").unlink(), False),
        (lambda folder: shutil.rmtree(folder), False),
        (lambda folder: (shutil.rmtree(folder), folder.mkdir()), True),
    ],
)
def test_only_what_was_never_complete_may_be_deleted(run, change, leftover):
    change(run / "checkpoint-4")
    assert _is_leftover(str(run / "checkpoint-4")) is leftover


def test_killed_while_a_leftover_is_deleted(run, monkeypatch):
    """At no moment does what is left look like a whole checkpoint, or like something that must stay."""
    folder = run / "checkpoint-4"
    (folder / "global_step4").mkdir()
    (folder / "global_step4" / "shard.pt").write_text("half")
    edit(folder, complete=False)
    deleted = []

    def spy(name):
        whole = getattr(os, name)

        def delete(path, **kwargs):
            whole(path, **kwargs)
            deleted.append(Path(path).name)
            assert not folder.exists() or (why_incomplete(folder) and _is_leftover(str(folder))), deleted

        monkeypatch.setattr(os, name, delete)

    spy("unlink")
    spy("rmdir")
    _delete_leftovers(str(run))
    assert not folder.exists() and (run / "checkpoint-2").exists()
    assert {"shard.pt", "optimizer.pt", "trainer_state.json", "l2sp_state.json", folder.name} < set(deleted)


def test_stale_files_of_a_half_written_checkpoint_go(run, model, classification_data):
    """Of a run with another number of processes, for example; those of a whole one are Trainer's business."""
    for name in ("rng_state_1.pth", ".tmpAbCdEf", "global_step4/shard.pt"):
        path = run / "checkpoint-4" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("stale")
    edit(run / "checkpoint-4", complete=False)
    (run / "checkpoint-2" / "mine.txt").write_text("kept")
    make(model, classification_data, run).train(resume_from_checkpoint=True)
    assert set(os.listdir(run / "checkpoint-4")) == set(os.listdir(run / "checkpoint-2")) - {"mine.txt"}
    make(model, classification_data, run).train()
    assert (run / "checkpoint-2" / "mine.txt").read_text() == "kept"


def test_best_model_is_loaded_at_the_end(model, classification_data, tmp_path):
    settings = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=1)
    trainer = make(model, classification_data, tmp_path / "run", **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert why_incomplete(best) is None
    saved = load(best)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), trainer.model.parameters(), strict=True))


def test_checkpoints_of_a_search_lie_in_folders_of_their_own(tiny_bert_dir, classification_data, tmp_path):
    pytest.importorskip("optuna", reason="optuna is an extra of hf-l2sp")
    trainer = make(load(tiny_bert_dir), classification_data, tmp_path / "run", max_steps=2, eval_strategy="epoch")
    trainer.model_init = lambda trial=None: load(tiny_bert_dir)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"l2sp_lambda": trial.suggest_float("l2sp_lambda", 0.2, 0.2)}, n_trials=1
    )
    checkpoint = tmp_path / "run" / "run-0" / "checkpoint-2"
    assert why_incomplete(checkpoint) is None and read_state(checkpoint)["complete"] is True
    assert read_state(checkpoint)["strength"]["base"] == 0.2
    edit(checkpoint, complete=False)
    with pytest.raises(ValueError, match=f"{checkpoint} is not complete"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


# --- folders and disks that cannot be written to --------------------------------------------------------------------


def test_file_in_the_way_is_named_by_the_constructor(model, classification_data, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError) as caught:
            make(model, classification_data, folder)
        assert f"output_dir='{folder}' cannot be written to ([Errno" in str(caught.value)
        assert "remove the file that is in the way or choose another output_dir" in str(caught.value)
    with pytest.raises(FileExistsError):
        make(model, classification_data, tmp_path / "file", l2sp_lambda=0.0)


def test_other_errors_of_the_constructor_are_left_alone(classification_data, tmp_path):
    def model_init():
        raise FileNotFoundError(errno.ENOENT, "no such model", str(tmp_path / "model"))

    args = L2SPTrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True)
    with pytest.raises(FileNotFoundError, match="no such model"):
        L2SPTrainer(model_init=model_init, args=args, train_dataset=classification_data)
    with pytest.raises(FileNotFoundError):
        L2SPTrainer(model_init=model_init)


def test_folder_is_tried_before_training(model, classification_data, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    trainer = make(model, classification_data, tmp_path / "run")
    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="Read-only file system.*no checkpoint could be saved. Make it writable"):
        trainer.train()
    assert trainer.state.global_step == 0
    monkeypatch.undo()
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="File exists"):
        trainer.train()
    assert trainer.state.global_step == 0
    # Nothing is to be saved, or the run is Trainer's.
    make(model, classification_data, tmp_path / "other", save_strategy="no", max_steps=1).train()
    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    make(model, classification_data, tmp_path / "other", save_strategy="no", max_steps=1).train()
    make(model, classification_data, tmp_path / "other", l2sp_lambda=0.0, max_steps=1).train()
    assert sorted(os.listdir(tmp_path / "other")) == ["checkpoint-1"]


def test_file_in_the_way_of_a_checkpoint(model, classification_data, tmp_path):
    trainer = make(model, classification_data, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-4").write_text("")
    with pytest.raises(OSError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'run' / 'checkpoint-4'} cannot be written: ") and "File exists" in message
    assert f"The last complete checkpoint is {tmp_path / 'run' / 'checkpoint-2'}." in message


FAILURES = {
    "system": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    "folder gone": RuntimeError("Parent directory /x does not exist."),
    "distributed": CheckpointException("save", {1: (OSError(errno.EDQUOT, "Disk quota exceeded"), None)}),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_to_write(model, classification_data, tmp_path, monkeypatch, failure):
    trainer = make(model, classification_data, tmp_path / "run", max_steps=2)

    def save(*args, **kwargs):
        raise FAILURES[failure]

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(OSError) as caught:
        trainer.train()
    assert caught.value.__cause__ is FAILURES[failure]
    assert f"{tmp_path / 'run' / 'checkpoint-2'} cannot be written: " in str(caught.value)
    assert "There is no complete checkpoint yet" in str(caught.value) and "MiB free there" in str(caught.value)
    assert read_state(tmp_path / "run" / "checkpoint-2")["complete"] is False
    monkeypatch.setattr(trainer, "_save", save)
    with pytest.raises(OSError, match=f"{tmp_path / 'run'} cannot be written"):
        trainer.save_model()


@pytest.mark.parametrize(
    "failure",
    [
        OSError("403 Client Error: Forbidden for url"),  # of the Hub's client
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        TimeoutError(errno.ETIMEDOUT, "timed out"),
        RuntimeError("CUDA out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_failures_are_passed_on(model, classification_data, tmp_path, monkeypatch, failure):
    trainer = make(model, classification_data, tmp_path / "run", max_steps=2)

    def save(*args, **kwargs):
        raise failure

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(type(failure)) as caught:
        trainer.train()
    assert caught.value is failure
    assert read_state(tmp_path / "run" / "checkpoint-2")["complete"] is False
    assert "save_to_json" not in vars(trainer.state)


# --- λ = 0 ----------------------------------------------------------------------------------------------------------


def test_lambda_zero_is_trainer_file_for_file(tiny_bert_dir, classification_data, tmp_path):
    def trained(cls, folder, resume, **kwargs):
        torch.manual_seed(0)
        trainer = make(load(tiny_bert_dir), classification_data, folder, cls, **kwargs)
        (folder / "checkpoint-9").mkdir()  # neither skipped nor deleted
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()

    for cls, name, kwargs in ((Trainer, "plain", {}), (L2SPTrainer, "zero", {"l2sp_lambda": 0.0})):
        trained(cls, tmp_path / name, None, **kwargs)
        with pytest.raises(ValueError, match="Can't find a valid checkpoint at .*checkpoint-9"):
            trained(cls, tmp_path / "again" / name, True, **kwargs)
    names = [{str(p.relative_to(tmp_path / n)): p for p in (tmp_path / n).rglob("*")} for n in ("plain", "zero")]
    assert names[0].keys() == names[1].keys() and "checkpoint-4/optimizer.pt" in names[0]
    for name, path in names[0].items():
        if path.is_file() and path.name not in ("trainer_state.json", "training_args.bin"):
            assert path.read_bytes() == names[1][name].read_bytes(), name
